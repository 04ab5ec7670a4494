"""What all console pages share: log-in, security headers, and fragments that cost nothing when nothing changed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import wraps
from typing import Any

from django.contrib.auth.views import redirect_to_login
from django.http import HttpRequest, HttpResponse, HttpResponseBase, HttpResponseNotModified
from django.shortcuts import resolve_url
from django.template.loader import render_to_string
from django.utils.cache import patch_vary_headers
from django.utils.http import urlencode

from qoe_service.catalogue.models import Application

View = Callable[..., HttpResponseBase]
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'{styles}; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_NAVIGATION = 6
_TIME_TEXT = re.compile(r"(<time[^>]*>)[^<]*")


def console_page(*, with_chart: bool = False) -> Callable[[View], View]:
    """A page for logged-in operators. Only pages with a chart allow the styles that plotly.js makes at run time."""

    def decorate(view: View) -> View:
        @wraps(view)
        def answer(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
            if not request.user.is_authenticated:
                return _ask_to_log_in(request)
            return secured(view(request, *args, **kwargs), with_chart=with_chart)

        return answer

    return decorate


def secured(response: HttpResponseBase, *, with_chart: bool = False) -> HttpResponseBase:
    """The answer with headers that keep foreign code and stale copies out."""
    response["Content-Security-Policy"] = _POLICY.format(styles=" 'unsafe-inline'" if with_chart else "")
    response["Cache-Control"] = "private, no-cache"
    patch_vary_headers(response, ["HX-Request", "Cookie"])
    return response


def _ask_to_log_in(request: HttpRequest) -> HttpResponseBase:
    if not request.headers.get("HX-Request"):
        return redirect_to_login(request.get_full_path())
    # A fragment cannot show a log-in form: the whole page goes there, and comes back afterwards.
    here = request.headers.get("HX-Current-URL", "/")
    target = f"{resolve_url('web:login')}?{urlencode({'next': re.sub(r'^https?://[^/]+', '', here)})}"
    return HttpResponse(status=401, headers={"HX-Redirect": target})


def live_page(request: HttpRequest, name: str, context: dict[str, Any]) -> HttpResponse:
    """The whole page ``web/NAME.html``, or for htmx only its live part, with an ETag."""
    if not request.headers.get("HX-Request"):
        navigation = Application.objects.only("name", "title")[:_NAVIGATION]
        return HttpResponse(render_to_string(f"web/{name}.html", {**context, "navigation": navigation}, request))
    return tagged(request, render_to_string(f"web/{name}_live.html", context, request), "text/html; charset=utf-8")


def tagged(request: HttpRequest, body: str, content_type: str) -> HttpResponse:
    """The body, or 304 where the caller has it. Relative times do not count: the browser lets them grow by itself."""
    digest = hashlib.sha256(_TIME_TEXT.sub(r"\1", body).encode()).hexdigest()[:24]
    etag = f'W/"{digest}"'
    known = {each.strip() for each in request.headers.get("If-None-Match", "").split(",")}
    response = HttpResponseNotModified() if etag in known else HttpResponse(body, content_type=content_type)
    response["ETag"] = etag
    return response
