"""What an application is: read from an operator's record, validated, created or updated."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

from django.db import transaction
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from device_agents.wire import HealthGate, Name, ServingConfiguration
from qoe_service.catalogue.models import Application, Artifact, QoeFormula, Variant
from qoe_service.errors import InvalidInput, NotFound
from selector.errors import InvalidInput as InvalidFormula
from selector.reward import QoeFormula as Formula

Share = Annotated[float, Field(ge=0, le=1)]
# A device may soak this many times soak_s; a rollback after the lease would come after its reward was joined.
SOAK_FACTOR = 3
Positive = Annotated[float, Field(gt=0, le=1e7)]


class Record(BaseModel):
    """An unknown field is a typing error, not something to ignore."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Configuration(ServingConfiguration):
    """A serving configuration that may be chosen."""

    model_config = ConfigDict(extra="forbid")


class Gate(HealthGate):
    """When a swapped model is committed."""

    model_config = ConfigDict(extra="forbid")


class Baseline(Record):
    """The safe choice: a variant by name, which may be imported later, and a configuration."""

    variant: Name
    configuration: Configuration


class Silence(Record):
    """What a lease is worth that nobody reported; without a reward it is dropped."""

    after_s: Positive = 600
    reward: Share | None = None


class ApplicationRecord(Record):
    """An application as an operator writes it down."""

    name: Name
    title: Annotated[str, Field(min_length=1, max_length=100)]
    slo_p95_ms: Positive
    minimum_accuracy: Share = 0
    slo_violation_limit: Share = 0.5
    arrival_rate_rps: Positive = 1
    configurations: tuple[Configuration, ...] = Field(min_length=1, max_length=64)
    baseline: Baseline | None = None
    qoe: dict[str, Any] = Field(default_factory=dict)
    lease_s: Positive = 600
    feedback_wait_s: Annotated[float, Field(ge=0, le=86_400)] = 60
    silence: Silence = Silence()
    epsilon: Share = 0.05
    holdout: Share = 0.05
    exploration_budget: Share = 0.05
    explore_unmeasured: bool = False
    health_gate: Gate = Gate()

    def as_fields(self) -> dict[str, Any]:
        """The columns of Application that it fills."""
        same = {"title", "slo_p95_ms", "minimum_accuracy", "slo_violation_limit", "arrival_rate_rps"}
        same |= {
            "lease_s",
            "feedback_wait_s",
            "epsilon",
            "holdout",
            "exploration_budget",
            "explore_unmeasured",
            "health_gate",
            "configurations",
        }
        return {
            **self.model_dump(mode="json", include=same),
            "silence_after_s": self.silence.after_s,
            "silence_reward": self.silence.reward,
            "baseline_variant": self.baseline.variant if self.baseline else "",
            "baseline_configuration": self.baseline.configuration.model_dump() if self.baseline else {},
        }


def define(*, record: Mapping[str, Any], dataset: Artifact | None = None, now: datetime) -> Application:
    """Create an application, or bring it to this definition. Without ``dataset`` it keeps the one it has.

    A changed QoE definition becomes a new version of the formula. Raises InvalidInput naming the field.
    """
    wanted = _validated(record)
    definition = _formula(wanted)
    fields = wanted.as_fields() | ({"dataset": dataset} if dataset is not None else {})
    with transaction.atomic():
        application, _ = Application.objects.update_or_create(
            name=wanted.name, defaults=fields, create_defaults={**fields, "created_at": now}
        )
        _point_at_baseline(application)
        _add_formula(application, definition, now)
    return application


def get(name: str) -> Application:
    """The application of this name. Raises NotFound."""
    application = Application.objects.filter(pk=name).first()
    if application is None:
        raise NotFound(f"no application {name[:64]!r}", field="application")
    return application


def settle_baseline(*, variant: Variant) -> None:
    """A baseline is named before its variant is imported; now that it is, point at its bytes."""
    named = Application.objects.filter(pk=variant.application_id, baseline_variant=variant.name)
    named.update(baseline_digest=variant.artifact_id)


def _point_at_baseline(application: Application) -> None:
    variant = application.variants.filter(name=application.baseline_variant).first()
    application.baseline_digest = variant.artifact_id if variant else ""
    application.save(update_fields=["baseline_digest"])


def _validated(record: Mapping[str, Any]) -> ApplicationRecord:
    try:
        wanted = ApplicationRecord.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(first["msg"], field=".".join(str(part) for part in first["loc"])) from None
    if len(set(wanted.configurations)) < len(wanted.configurations):
        raise InvalidInput("lists the same configuration twice", field="configurations")
    if wanted.baseline and wanted.baseline.configuration not in wanted.configurations:
        raise InvalidInput("is not one of the configurations", field="baseline.configuration")
    if not 0 < wanted.epsilon + wanted.holdout <= 1:
        raise InvalidInput("epsilon and holdout together must be above 0 and at most 1", field="holdout")
    if wanted.lease_s <= SOAK_FACTOR * wanted.health_gate.soak_s:
        raise InvalidInput(f"must be above {SOAK_FACTOR} times health_gate.soak_s", field="lease_s")
    return wanted


def _formula(wanted: ApplicationRecord) -> dict[str, Any]:
    """The definition in full, so that a later change of defaults does not change history."""
    known = set(Formula().as_record()) - {"version"}
    unknown = sorted(set(wanted.qoe) - known)
    if unknown:
        raise InvalidInput(f"no such field; there are {', '.join(sorted(known))}", field=f"qoe.{unknown[0]}")
    try:
        definition = Formula.from_record({"slo_p95_ms": wanted.slo_p95_ms, **wanted.qoe}).as_record()
    except InvalidFormula as error:
        raise InvalidInput(error.detail, field=f"qoe.{error.field}") from None
    return {name: definition[name] for name in known}


def _add_formula(application: Application, definition: dict[str, Any], now: datetime) -> None:
    newest = QoeFormula.objects.select_for_update().filter(application=application).order_by("-version").first()
    if newest is not None and {**newest.definition, "version": None} == {**definition, "version": None}:
        return
    version = newest.version + 1 if newest else 1
    QoeFormula.objects.create(
        application=application, version=version, definition={**definition, "version": version}, created_at=now
    )
