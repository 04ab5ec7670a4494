"""The REST API: one NinjaAPI with the routers of the apps. What errors look like stands in problems.py."""

from __future__ import annotations

from ninja import NinjaAPI
from ninja.openapi.docs import Swagger

from qoe_service import problems
from qoe_service.catalogue.api import router as catalogue
from qoe_service.decisions.api import router as decisions
from qoe_service.fleet.api import router as fleet
from qoe_service.rollouts.api import router as rollouts
from qoe_service.strict_json import StrictParser

api = NinjaAPI(
    title="Edge QoE",
    version="1",
    description="Devices enrol, report and follow; apps rate. Every error is a Problem body (RFC 9457).",
    docs_url="/docs",
    openapi_url="/openapi.json",
    docs=Swagger(),
    parser=StrictParser(),
)
problems.register(api)
for router in (fleet, catalogue, decisions, rollouts):
    api.add_router("/v1", router)
