"""manage.py revoke device|credential|key|signing-key|ban|job [ID]: takes back what was issued, banned or queued."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, NamedTuple

from django.core.management.base import BaseCommand, CommandError
from django.db import transaction
from django.db.models import Q
from django.utils import timezone

from qoe_service.catalogue import jobs
from qoe_service.catalogue.models import Job
from qoe_service.decisions import policies
from qoe_service.decisions.models import Ban
from qoe_service.errors import Conflict, InvalidInput, ServiceError
from qoe_service.fleet import audit, enrolment, keys
from qoe_service.fleet.models import ApplicationKey, Device, SigningKey

ACTOR = "command"


class Kind(NamedTuple):
    """One kind of thing: the rows that can be taken back, and how one is; it answers with a line for the operator."""

    listed: Callable[[datetime], Iterable[tuple[object, ...]]]
    revoke: Callable[[str, datetime], str]


def _revoke_device(given: str, now: datetime) -> str:
    enrolment.revoke(device_id=given, actor=ACTOR, now=now)
    return f"device {given} is revoked"


def _rotate_credential(given: str, now: datetime) -> str:
    return f"credential {enrolment.rotate_credential(device_id=given, actor=ACTOR, now=now)}"


def _revoke_key(given: str, now: datetime) -> str:
    keys.revoke_application_key(key_id=_number(given), actor=ACTOR, now=now)
    return f"application key {given} is revoked"


def _retire_signing_key(given: str, now: datetime) -> str:
    keys.retire_signing_key(key_id=given, actor=ACTOR, now=now)
    return f"signing key {given} is retired"


def _lift_ban(given: str, now: datetime) -> str:
    with transaction.atomic():
        policies.lift_ban(ban_id=_number(given), now=now)
        audit.record(actor=ACTOR, verb="lift_ban", subject=f"ban:{given}", now=now)
    return f"ban {given} is lifted"


def _cancel_job(given: str, now: datetime) -> str:
    with transaction.atomic():
        if not jobs.cancel(job_id=_number(given), now=now):
            raise Conflict(f"job {given} has ended already", field="job")
        audit.record(actor=ACTOR, verb="cancel_job", subject=f"job:{given}", now=now)
    return f"job {given} is cancelled"


def _number(given: str) -> int:
    if not (given.isascii() and given.isdigit() and len(given) < 19):
        raise InvalidInput(f"must be a number, is {given!r}", field="ID")
    return int(given)


def _devices(_: datetime) -> Iterable[tuple[object, ...]]:
    return Device.objects.filter(revoked_at=None).values_list("pk", "name")


def _bans(now: datetime) -> Iterable[tuple[object, ...]]:
    live = Ban.objects.filter(Q(expires_at=None) | Q(expires_at__gt=now)).order_by("pk")
    return live.values_list("pk", "application", "device", "variant_digest", "reason")


KINDS = {
    "device": Kind(_devices, _revoke_device),
    "credential": Kind(_devices, _rotate_credential),
    "key": Kind(
        lambda _: (
            ApplicationKey.objects.filter(revoked_at=None).order_by("pk").values_list("pk", "application", "label")
        ),
        _revoke_key,
    ),
    "signing-key": Kind(
        lambda _: SigningKey.objects.filter(retired_at=None).order_by("pk").values_list("pk"), _retire_signing_key
    ),
    "ban": Kind(_bans, _lift_ban),
    "job": Kind(
        lambda _: Job.objects.filter(state__in=(Job.State.QUEUED, Job.State.RUNNING)).values_list(
            "pk", "application", "base__name", "compression_pass", "state"
        ),
        _cancel_job,
    ),
}


class Command(BaseCommand):
    help = "Revoke a device or key, replace a device's credential, lift a ban, cancel a job. Without ID: list them."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("kind", choices=KINDS)
        parser.add_argument("id", nargs="?", metavar="ID", help="unless given, what there is to revoke is listed")

    def handle(self, *, kind: str, id: str | None, **_: Any) -> None:  # noqa: A002 - argparse names it
        now = timezone.now()
        if id is None:
            for row in KINDS[kind].listed(now):
                self.stdout.write(" ".join(str(part) for part in row if part is not None))
            return
        try:
            self.stdout.write(KINDS[kind].revoke(id, now))
        except ServiceError as error:
            raise CommandError(error.detail) from None
