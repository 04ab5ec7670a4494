"""The gate before a class of devices: it gets a variant only after one of them measured it, or where an operator has
explicitly said that it may be tried unmeasured: for a whole application, or for one variant. The safe baseline is such
a word too.
"""

from __future__ import annotations

from datetime import datetime

from django.db import transaction

from qoe_service.catalogue.models import Application, Variant
from qoe_service.catalogue.places import Place, isa_of
from qoe_service.catalogue.profiles import measured_at_place
from qoe_service.fleet import audit
from qoe_service.fleet.models import Device


def place_of(device: Device) -> Place:
    """The class of a device, and its instruction sets."""
    return Place(device.device_class, isa_of(device.hardware))


def unmeasured(*, device: Device, application: Application) -> frozenset[str]:
    """Digests of the variants that this device must not be given yet."""
    if application.explore_unmeasured:
        return frozenset()
    closed = Variant.objects.filter(application=application, explore_unmeasured=False, retired_at=None)
    digests = frozenset(closed.exclude(artifact=application.baseline_digest).values_list("artifact_id", flat=True))
    return digests - measured_at_place(application=application, place=place_of(device)) if digests else digests


def allow(*, variant: Variant, is_allowed: bool, actor: str, now: datetime) -> bool:
    """Let devices try a variant that nobody of their class measured, or no more; whether that was news."""
    with transaction.atomic():
        other = Variant.objects.filter(pk=variant.pk, explore_unmeasured=not is_allowed)
        if not other.update(explore_unmeasured=is_allowed):
            return False
        verb = "explore_variant" if is_allowed else "measure_variant_first"
        subject = f"variant:{variant.application_id}/{variant.name}"
        audit.record(actor=actor, verb=verb, subject=subject, now=now, detail={"digest": variant.artifact_id})
    variant.explore_unmeasured = is_allowed
    return True
