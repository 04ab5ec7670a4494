"""What a device asks for: check-in, its desired document, and wake-ups. Each only for itself."""

from __future__ import annotations

import random

from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.utils import timezone
from django.utils.http import parse_etags
from ninja import Router

from device_agents.wire import CheckIn, CheckInReply, Identifier, SignedDesired
from qoe_service.fleet.api import DeviceAuth, device_of
from qoe_service.rollouts import check_in as check_ins
from qoe_service.rollouts import desired, push

router = Router(tags=["rollouts"], auth=DeviceAuth())
rng = random.Random()


@router.post("/devices/{device_id}/check-in", response=CheckInReply)
def check_in(request: HttpRequest, device_id: Identifier, body: CheckIn) -> CheckInReply:
    """Report state and telemetry; learn when to come again and whether there is anything new."""
    device = device_of(request, device_id)
    return check_ins.check_in(device=device, report=body, rng=rng, now=timezone.now())


@router.get("/devices/{device_id}/desired", response={200: SignedDesired, 304: None})
def desired_document(request: HttpRequest, device_id: Identifier) -> HttpResponse:
    """The signed document of what the device should run; 304 while its version is the one in If-None-Match."""
    device = device_of(request, device_id)
    version = desired.version_of(device_id=device.pk)
    if desired.etag_of(version) in parse_etags(request.headers.get("If-None-Match", "")):
        return HttpResponse(status=304, headers={"ETag": desired.etag_of(version)})
    answer = desired.signed(device=device, version=version, now=timezone.now())
    return HttpResponse(
        answer.model_dump_json(),
        content_type="application/json",
        headers={"ETag": desired.etag_of(version), "Cache-Control": "no-store"},
    )


@router.get("/devices/{device_id}/wake-up", response={200: None})
def wake_up(request: HttpRequest, device_id: Identifier) -> StreamingHttpResponse:
    """Server-sent events: ``wake`` with the version of the desired document, now and at every change."""
    device = device_of(request, device_id)
    return StreamingHttpResponse(
        push.stream(device_id=device.pk, age_s=push.max_age_s(rng)),
        content_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )
