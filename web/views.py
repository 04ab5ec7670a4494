"""Every page of the console: find the row, read what the page shows, render. No rules."""

from __future__ import annotations

import json
from typing import Any

from django.contrib.auth.views import LoginView, LogoutView
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import get_object_or_404
from django.template.loader import render_to_string
from django.utils import timezone
from django.views.decorators.http import require_safe

from qoe_service.catalogue.models import Application
from qoe_service.decisions.evaluation import qoe_over_time
from qoe_service.decisions.models import Decision
from qoe_service.fleet.models import Device
from web import charts, verdicts
from web.application_rows import application_detail
from web.decision_rows import decision_detail
from web.device_rows import device_detail
from web.fleet_rows import Filters, fleet_table, totals
from web.pages import console_page, live_page, secured, tagged
from web.policy_states import policy_states


class LogIn(LoginView):
    """Name and password, and on to the page that was asked for."""

    template_name = "web/login.html"
    redirect_authenticated_user = True

    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        return secured(super().dispatch(request, *args, **kwargs))


class LogOut(LogoutView):
    """Ends the session; only by POST."""


@require_safe
@console_page()
def fleet(request: HttpRequest) -> HttpResponse:
    """Every device and what it runs."""
    now = timezone.now()
    context = {
        "now": now,
        "section": "fleet",
        "totals": totals(now=now),
        "policies": policy_states(now=now),
        "table": fleet_table(filters=Filters.read(request.GET), page_number=request.GET.get("page"), now=now),
    }
    return live_page(request, "fleet", context)


@require_safe
@console_page()
def device(request: HttpRequest, device_id: str) -> HttpResponse:
    """One device."""
    now = timezone.now()
    row = get_object_or_404(Device, pk=device_id)
    return live_page(request, "device", {"now": now, "section": "fleet", "detail": device_detail(device=row, now=now)})


@require_safe
@console_page(with_chart=True)
def application(request: HttpRequest, name: str) -> HttpResponse:
    """One application."""
    now = timezone.now()
    row = get_object_or_404(Application, pk=name)
    detail = application_detail(application=row, now=now)
    return live_page(request, "application", {"now": now, "section": name, "application": row, "detail": detail})


@require_safe
@console_page()
def decision(request: HttpRequest, decision_id: str) -> HttpResponse:
    """Why this one, and what came of it."""
    row = get_object_or_404(Decision.objects.select_related("device", "application"), pk=decision_id)
    context = {"now": timezone.now(), "section": "fleet", "detail": decision_detail(decision=row)}
    return live_page(request, "decision", context)


@require_safe
@console_page()
def verdict(request: HttpRequest, name: str) -> HttpResponse:
    """The verdict line of one application, as a fragment."""
    line = verdicts.verdict_line(application=get_object_or_404(Application, pk=name), now=timezone.now())
    return tagged(request, render_to_string("web/parts/verdict.html", {"verdict": line}), "text/html; charset=utf-8")


@require_safe
@console_page()
def qoe_chart(request: HttpRequest, name: str) -> HttpResponse:
    """QoE over time as a figure for plotly.js."""
    row = get_object_or_404(Application, pk=name)
    figure = charts.qoe_figure(qoe_over_time(application=row, now=timezone.now()))
    return tagged(request, json.dumps(figure, allow_nan=False), "application/json")


@require_safe
@console_page()
def qoe_words(request: HttpRequest, name: str) -> HttpResponse:
    """The same chart in words and as a table, for those who cannot see it."""
    row = get_object_or_404(Application, pk=name)
    curve = qoe_over_time(application=row, now=timezone.now())
    context = {"curve": curve, "words": charts.qoe_words(curve)}
    return tagged(request, render_to_string("web/parts/qoe_words.html", context), "text/html; charset=utf-8")
