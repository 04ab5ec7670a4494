"""How accurate variants are on given instruction sets: as the server measured where it has them, else as a device did.

What was measured on other instruction sets says nothing here: 8-bit sums saturate on some processors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from django.db.models import QuerySet

from qoe_service.catalogue.models import Application, IsaAccuracy, Variant
from qoe_service.fleet.models import Device


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A share with its 95 % interval. Without a device the server measured it."""

    value: float
    low: float
    high: float
    samples: int
    device: Device | None = None
    measured_at: datetime | None = None


Accuracies = Mapping[tuple[int, str], Accuracy]


def by_devices(application: Application, isa: str) -> dict[int, float]:
    """By variant: what devices with these instruction sets measured, on the samples that are in use now."""
    return dict(_current(application).filter(isa=isa).values_list("variant_id", "value"))


def of(application: Application) -> Accuracies:
    """All that is known, by variant and instruction sets; the server's own number, of more samples, goes first."""
    found = {
        (row.variant_id, row.isa): Accuracy(row.value, row.low, row.high, row.samples, row.device, row.measured_at)
        for row in _current(application).select_related("device")
    }
    return found | {(each.pk, each.accuracy_isa): known for each, known in _on_server(application)}


def of_variant(variant: Variant) -> Accuracy | None:
    """What the server measured; None before it did."""
    if variant.accuracy is None:
        return None
    low = variant.accuracy if variant.accuracy_low is None else variant.accuracy_low
    high = variant.accuracy if variant.accuracy_high is None else variant.accuracy_high
    return Accuracy(variant.accuracy, low, high, variant.accuracy_samples)


def _on_server(application: Application) -> list[tuple[Variant, Accuracy]]:
    variants = Variant.objects.filter(application=application).exclude(accuracy_isa="")
    return [(each, known) for each in variants if (known := of_variant(each)) is not None]


def _current(application: Application) -> QuerySet[IsaAccuracy]:
    return IsaAccuracy.objects.filter(variant__application=application, samples_digest=application.samples_id or "")
