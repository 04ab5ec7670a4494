"""Composition root of the routes."""

from __future__ import annotations

from django.urls import include, path

from qoe_service import gauges, readiness
from qoe_service.api import api
from qoe_service.catalogue.downloads import artifact, weights

urlpatterns = [
    path("healthz", readiness.live),
    path("readyz", readiness.ready),
    path("metrics", gauges.metrics),
    path("artifacts/sha256/<str:digest>", artifact),
    path("artifacts/sha256/<str:digest>/weights", weights),
    path("api/", api.urls),
    path("", include("web.urls")),
]
