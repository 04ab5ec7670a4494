"""The Catalogue page of an application, its chart, and what its buttons do."""

from __future__ import annotations

import json

from django.contrib import messages
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import get_object_or_404
from django.utils import timezone
from django.views.decorators.http import require_http_methods, require_safe

from qoe_service.catalogue import roles
from qoe_service.catalogue.models import Application
from qoe_service.errors import NotPermitted, ServiceError
from web import catalogue_actions, catalogue_chart, catalogue_rows
from web.pages import console_page, live_page, tagged


@require_http_methods(["GET", "HEAD", "POST"])
@console_page(with_chart=True)
def catalogue(request: HttpRequest, name: str) -> HttpResponse:
    """The family of one application; a press of a button comes by POST and leads back."""
    application = get_object_or_404(Application.objects.select_related("dataset"), pk=name)
    if request.method == "POST":
        _act(request, application)
        return HttpResponseRedirect(request.get_full_path())
    now = timezone.now()
    family = catalogue_rows.family(application=application, device_class=request.GET.get("class", ""), now=now)
    context = {
        "now": now,
        "section": name,
        "application": application,
        "classes": family.classes,
        "device_class": family.device_class,
        "passes": catalogue_rows.passes(),
        "may": roles.held_by(request.user),
        "family": family,
    }
    return live_page(request, "catalogue", context)


@require_safe
@console_page()
def catalogue_figure(request: HttpRequest, name: str) -> HttpResponse:
    """Accuracy against latency on one device class as a figure for plotly.js."""
    application = get_object_or_404(Application, pk=name)
    device_class = request.GET.get("class", "")
    family = catalogue_rows.family(application=application, device_class=device_class, now=timezone.now())
    return tagged(request, json.dumps(catalogue_chart.figure(family), allow_nan=False), "application/json")


def _act(request: HttpRequest, application: Application) -> None:
    verb, _, subject = request.POST.get("do", "").partition(":")
    wanted = catalogue_actions.Wanted(
        application=application,
        subject=subject,
        actor=request.user.get_username(),
        now=timezone.now(),
        passes=request.POST.get("passes", ""),
    )
    try:
        messages.success(request, catalogue_actions.perform(verb, wanted, request.user))
    except NotPermitted as error:
        raise PermissionDenied(error.detail) from None
    except ServiceError as error:
        messages.error(request, error.detail)
