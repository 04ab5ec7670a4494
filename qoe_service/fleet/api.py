"""Enrolment over HTTP, and the bearer authentication that the other apps' endpoints use."""

from __future__ import annotations

from typing import cast

from django.conf import settings
from django.http import HttpRequest
from django.utils import timezone
from ninja import Router
from ninja.security import HttpBearer

from device_agents.wire import EnrolmentReply, EnrolmentRequest
from qoe_service.errors import NotPermitted
from qoe_service.fleet import enrolment, keys, limits
from qoe_service.fleet.models import ApplicationKey, Device

router = Router(tags=["fleet"])


class DeviceAuth(HttpBearer):
    """``Authorization: Bearer`` with a device credential; ``request.auth`` becomes the Device."""

    def authenticate(self, request: HttpRequest, token: str) -> Device:  # noqa: ARG002  (the signature is ninja's)
        device = enrolment.authenticate_device(credential=token)
        limits.take(caller=f"device:{device.pk}", limit=settings.DEVICE_REQUESTS_PER_MINUTE, now=timezone.now())
        return device


class ApplicationAuth(HttpBearer):
    """``Authorization: Bearer`` with an application key; ``request.auth`` becomes the ApplicationKey."""

    def authenticate(self, request: HttpRequest, token: str) -> ApplicationKey:  # noqa: ARG002  (as above)
        key = keys.authenticate_application(secret=token)
        limits.take(caller=f"application:{key.pk}", limit=settings.APPLICATION_REQUESTS_PER_MINUTE, now=timezone.now())
        return key


class DeviceOrApplicationAuth(HttpBearer):
    """Either of the two, told apart by ``isinstance(request.auth, Device)``."""

    def authenticate(self, request: HttpRequest, token: str) -> Device | ApplicationKey:
        if enrolment.find_device(credential=token) is not None:
            return DeviceAuth().authenticate(request, token)
        return ApplicationAuth().authenticate(request, token)


def device_of(request: HttpRequest, device_id: str) -> Device:
    """The authenticated device, which must be the one that the path names."""
    device = cast(Device, getattr(request, "auth", None))
    if device.pk != device_id:
        raise NotPermitted("this credential belongs to another device", field="device_id")
    return device


@router.post("/devices/enrol", response=EnrolmentReply)
def enrol(request: HttpRequest, body: EnrolmentRequest) -> EnrolmentReply:
    """Trade an enrolment token for a device credential, which is shown this once."""
    now = timezone.now()
    limits.take(caller=f"enrolment:{_source_of(request)}", limit=settings.ENROLMENTS_PER_MINUTE, now=now)
    device, credential = enrolment.enrol(request=body, now=now)
    return EnrolmentReply(
        device_id=device.pk,
        credential=credential,
        trusted_keys=keys.trusted_keys(now=now),
        check_in_interval_s=settings.CHECK_IN_INTERVAL_S,
        keys_version=keys.keys_version(),
    )


def _source_of(request: HttpRequest) -> str:
    """The address that asks. Only the last hop was written by our own proxy; what stands before it anyone may claim."""
    forwarded = request.headers.get("X-Forwarded-For", "") if settings.TRUST_PROXY else ""
    return forwarded.rpartition(",")[2].strip()[:64] or str(request.META.get("REMOTE_ADDR", ""))
