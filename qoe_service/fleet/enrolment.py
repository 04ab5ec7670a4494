"""How an agent becomes a device, proves to be it, and stops being it."""

from __future__ import annotations

import uuid
from datetime import datetime, timedelta

from django.db import transaction
from django.db.models import F

from device_agents.wire import EnrolmentRequest
from qoe_service.errors import InvalidInput, NotAuthenticated, NotFound
from qoe_service.fleet import audit
from qoe_service.fleet.models import Device, EnrolmentToken
from qoe_service.fleet.secrets import is_same, new_secret, sha256_of


def issue_token(*, label: str, uses: int, ttl_s: float | None, actor: str, now: datetime) -> str:
    """A new enrolment token; only its hash is kept, so it is shown this once."""
    if uses < 1:
        raise InvalidInput("must be at least 1", field="uses")
    if ttl_s is not None and ttl_s <= 0:
        raise InvalidInput("must be above 0 seconds", field="ttl_s")
    secret = new_secret("qoe_enrol")
    expires_at = now + timedelta(seconds=ttl_s) if ttl_s is not None else None
    with transaction.atomic():
        token = EnrolmentToken.objects.create(
            label=label, secret_sha256=sha256_of(secret), uses_left=uses, expires_at=expires_at, created_at=now
        )
        audit.record(actor=actor, verb="issue_token", subject=f"enrolment-token:{token.pk}", now=now)
    return secret


def enrol(*, request: EnrolmentRequest, now: datetime) -> tuple[Device, str]:
    """A new device and its credential, in exchange for one use of an enrolment token."""
    credential = new_secret("qoe_device")
    with transaction.atomic():
        token = _spend_token(request.token, now)
        device = Device.objects.create(
            id=f"d-{uuid.uuid4().hex}",
            name=request.name,
            device_class=request.device_class,
            credential_sha256=sha256_of(credential),
            labels=dict(request.labels),
            hardware=request.hardware.model_dump(mode="json"),
            agent_version=request.agent_version,
            enrolled_at=now,
        )
        audit.record(
            actor=f"device:{device.pk}",
            verb="enrol",
            subject=f"device:{device.pk}",
            now=now,
            detail={"token": token.pk},
        )
    return device, credential


def _spend_token(secret: str, now: datetime) -> EnrolmentToken:
    stored = sha256_of(secret)
    token = EnrolmentToken.objects.filter(secret_sha256=stored).first()
    if token is None or not is_same(token.secret_sha256, stored) or not token.is_usable(now):
        raise NotAuthenticated("the enrolment token is unknown, used up, expired or revoked", field="token")
    # Two agents may hold the last use at the same moment: the row count says who had it.
    spent = EnrolmentToken.objects.filter(pk=token.pk, uses_left__gt=0, revoked_at=None).update(
        uses_left=F("uses_left") - 1
    )
    if not spent:
        raise NotAuthenticated("the enrolment token is used up", field="token")
    return token


def find_device(*, credential: str) -> Device | None:
    """The device that this credential was issued to, revoked or not."""
    stored = sha256_of(credential)
    try:
        device = Device.objects.get(credential_sha256=stored)
    except Device.DoesNotExist:
        return None
    return device if is_same(device.credential_sha256, stored) else None


def authenticate_device(*, credential: str) -> Device:
    """The device that this credential was issued to, unless it is revoked."""
    device = find_device(credential=credential)
    if device is None:
        raise NotAuthenticated("unknown device credential")
    if device.revoked_at is not None:
        raise NotAuthenticated("this device was revoked")
    return device


def revoke(*, device_id: str, actor: str, now: datetime) -> None:
    """Refuse the device from now on. Revoking twice changes nothing."""
    with transaction.atomic():
        if Device.objects.filter(pk=device_id, revoked_at=None).update(revoked_at=now):
            audit.record(actor=actor, verb="revoke", subject=f"device:{device_id}", now=now)
        elif not Device.objects.filter(pk=device_id).exists():
            raise NotFound(f"no device {device_id}", field="device_id")


def rotate_credential(*, device_id: str, actor: str, now: datetime) -> str:
    """A new credential for the device; the old one ends at once."""
    credential = new_secret("qoe_device")
    with transaction.atomic():
        if not Device.objects.filter(pk=device_id).update(credential_sha256=sha256_of(credential)):
            raise NotFound(f"no device {device_id}", field="device_id")
        audit.record(actor=actor, verb="rotate_credential", subject=f"device:{device_id}", now=now)
    return credential
