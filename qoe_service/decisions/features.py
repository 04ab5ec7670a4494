"""Turns rows into the selector's values: context, actions and QoE formula. Nothing is chosen here."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from device_agents.wire import Hardware, Telemetry
from qoe_service.catalogue import accuracies
from qoe_service.catalogue.models import Application, QoeFormula, Variant
from qoe_service.decisions.models import Decision
from qoe_service.fleet.models import Device
from selector import interactions, reward

# Labels that say something about the user or the place. Others (serial numbers, limits, owners) are for people.
FEATURE_LABELS = ("persona", "preference", "site")
_actions: dict[tuple[str, str], tuple[tuple[Any, ...], tuple[interactions.Action, ...]]] = {}


def context_of(
    *,
    device: Device,
    application: Application,
    arrival_rate_rps: float | None,
    cached_digests: Collection[str],
    incumbent: Decision | None,
    unmeasured_digests: Collection[str] = (),
) -> interactions.Context:
    """What is known when deciding: the device as it last reported itself, the application and its traffic there."""
    hardware = Hardware.model_validate(device.hardware)
    telemetry = Telemetry.model_validate(device.telemetry)
    return interactions.Context(
        device=device.pk,
        device_class=device.device_class,
        application=application.pk,
        arrival_rate_rps=application.arrival_rate_rps if arrival_rate_rps is None else arrival_rate_rps,
        slo_p95_ms=application.slo_p95_ms,
        minimum_accuracy=application.minimum_accuracy,
        cores=_usable_cores(hardware),
        memory_free_bytes=telemetry.memory_free_bytes,
        cpu_load_share=telemetry.cpu_load_share,
        incumbent=incumbent.action_key if incumbent else None,
        baseline=baseline_of(application),
        cached_digests=frozenset(cached_digests),
        features=_features(device, hardware, telemetry),
        unmeasured_digests=frozenset(unmeasured_digests),
    )


def _usable_cores(hardware: Hardware) -> int:
    """Cores, or as many as the operating system grants time for, rounded up."""
    granted = hardware.cores if hardware.cpu_quota_cores is None else math.ceil(hardware.cpu_quota_cores)
    return max(1, min(hardware.cores, granted))


def _features(device: Device, hardware: Hardware, telemetry: Telemetry) -> dict[str, float | str]:
    """What a policy may read beyond the fields of the context; what the device does not tell is left out."""
    features: dict[str, float | str] = {
        "architecture": hardware.architecture,
        "isa": "+".join(sorted(hardware.isa)),
        "network": telemetry.network,
        "throttled": float(telemetry.throttled),
    }
    if hardware.cpu_quota_cores is not None:
        features["cpu_quota"] = hardware.cpu_quota_cores
    if hardware.cpu_quota_period_ms is not None:
        features["cpu_quota_period"] = hardware.cpu_quota_period_ms / 1000
    if telemetry.temperature_c is not None:
        features["temperature"] = telemetry.temperature_c / 100
    if telemetry.battery_share is not None:
        features["battery"] = telemetry.battery_share
    if telemetry.charging is not None:
        features["charging"] = float(telemetry.charging)
    labels = {f"label_{name}": str(device.labels[name]) for name in FEATURE_LABELS if name in device.labels}
    return {name: value for name, value in (features | labels).items() if value != ""}


def actions_of(application: Application, isa: str) -> tuple[interactions.Action, ...]:
    """Selectable variants times the application's configurations, with the accuracy measured on these instruction sets;
    where there is none yet, the server's is a first guess.

    The same tuple comes back while nothing changes: the selector keeps what it derived from it.
    """
    rows = Variant.objects.filter(application=application, accuracy__isnull=False, retired_at=None)
    found = accuracies.by_devices(application, isa)
    variants = tuple(_variant(row, isa, found) for row in rows.select_related("artifact").order_by("name"))
    configurations = tuple(dict.fromkeys(configuration_of(record) for record in application.configurations))
    known = _actions.get((application.pk, isa))
    if known is None or known[0] != (variants, configurations):
        actions = tuple(interactions.Action(variant, each) for variant in variants for each in configurations)
        known = _actions[application.pk, isa] = ((variants, configurations), actions)
    return known[1]


def _variant(row: Variant, isa: str, found: Mapping[int, float]) -> interactions.Variant:
    server = row.accuracy or 0.0
    return interactions.Variant(
        digest=row.artifact_id,
        name=row.name,
        size_bytes=row.artifact.size_bytes,
        accuracy=server if row.accuracy_isa == isa else found.get(row.pk, server),
        precision=row.precision,
        memory_bytes=row.memory_bytes,
        operators=frozenset(row.operators),
    )


def configuration_of(record: dict[str, Any]) -> interactions.Configuration:
    """A serving configuration from its record; missing bounds take their defaults."""
    known = interactions.Configuration.__dataclass_fields__
    return interactions.Configuration(**{name: record[name] for name in known if name in record})


def baseline_of(application: Application) -> str | None:
    """Key of the safe baseline action, if the application names one."""
    if not application.baseline_digest:
        return None
    return f"{application.baseline_digest[:12]}/{configuration_of(application.baseline_configuration).key}"


def formula_of(application: Application) -> tuple[int, reward.QoeFormula]:
    """The newest QoE formula and its version; before the first, the selector's defaults at the application's SLO."""
    row = QoeFormula.objects.filter(application=application).order_by("-version").first()
    if row is None:
        return 0, reward.QoeFormula(version=0, slo_p95_ms=application.slo_p95_ms)
    defaults = {"slo_p95_ms": application.slo_p95_ms, "version": row.version}
    return row.version, reward.QoeFormula.from_record(defaults | row.definition)
