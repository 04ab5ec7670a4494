"""Reads what runs where: for each application on each device the desired and the running variant, and how it does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from django.db.models import F, Q, QuerySet

from qoe_service.catalogue.models import Variant
from qoe_service.decisions.models import Decision, JoinedEvent
from qoe_service.fleet.models import Device
from qoe_service.rollouts.models import Assignment

SPARKLINE_LEASES = 24
_NOW_LEASES = 5
UPDATE_STATES: tuple[str, ...] = tuple(value for value, _ in Assignment._meta.get_field("reported_state").choices or ())


@dataclass(frozen=True, slots=True)
class Serving:
    """A variant under a configuration; the configuration is unknown where only the digest was reported."""

    digest: str
    variant: str
    configuration: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Lease:
    """What one joined lease brought."""

    reward: float
    p95_ms: float | None
    slo_hit_share: float | None
    requests: int | None


@dataclass(frozen=True, slots=True)
class Placement:
    """One application on one device."""

    assignment: Assignment
    desired: Serving | None
    running: Serving | None
    leases: Sequence[Lease]

    @property
    def is_drifting(self) -> bool:
        """Whether the device says that it runs something other than desired."""
        wanted = self.assignment.decision
        if wanted is None:
            return False
        reported = self.assignment
        return reported.reported_digest != wanted.variant_digest or reported.reported_decision_id != wanted.id

    @property
    def is_reconfiguration(self) -> bool:
        """Whether only the configuration differs."""
        return bool(self.desired and self.running and self.desired.digest == self.running.digest)

    @property
    def rewards(self) -> list[float]:
        """QoE of the last leases, oldest first."""
        return [lease.reward for lease in self.leases]

    @property
    def qoe(self) -> float | None:
        """Mean QoE of the last few leases."""
        last = self.rewards[-_NOW_LEASES:]
        return sum(last) / len(last) if last else None

    @property
    def p95_ms(self) -> float | None:
        """The p95 of the last lease that measured one."""
        return next((lease.p95_ms for lease in reversed(self.leases) if lease.p95_ms is not None), None)

    @property
    def slo_p95_ms(self) -> float:
        """The SLO of the application."""
        return self.assignment.application.slo_p95_ms

    @property
    def misses_slo(self) -> bool:
        """Whether the last p95 was above the SLO."""
        return self.p95_ms is not None and self.p95_ms > self.slo_p95_ms

    @property
    def slo_use(self) -> float:
        """The last p95 as a share of the SLO."""
        return (self.p95_ms or 0) / self.slo_p95_ms

    @property
    def lease_share(self) -> float:
        """How much of its lease the running decision has used."""
        lease_s = self.assignment.application.lease_s
        return min(1.0, self.assignment.reported_active_s / lease_s) if lease_s else 0.0


def assignments() -> QuerySet[Assignment]:
    """Assignments with what a page needs, and without the long records of decisions."""
    heavy = ("decision__candidates", "decision__context", "decision__calibration_revisions")
    return Assignment.objects.select_related("application", "decision").defer(*heavy)


def drifting() -> Q:
    """The condition of ``Placement.is_drifting`` as a query over assignments."""
    same = Q(reported_digest=F("decision__variant_digest"), reported_decision_id=F("decision_id"))
    return Q(decision__isnull=False) & ~same


def placements(rows: Sequence[Assignment]) -> list[Placement]:
    """The placements of these assignments, in three queries however many there are."""
    names = variant_names(row.application_id for row in rows)
    leases = recent_leases(rows)
    configurations = _configurations(rows)
    return [
        Placement(
            assignment=row,
            desired=_desired(row, names),
            running=_running(row, names, configurations),
            leases=leases[row.device_id, row.application_id],
        )
        for row in rows
    ]


def variant_names(applications: Iterable[str]) -> dict[tuple[str, str], str]:
    """Names of variants by application and digest."""
    rows = Variant.objects.filter(application_id__in=set(applications))
    return {
        (application, digest): name
        for application, digest, name in rows.values_list("application_id", "artifact_id", "name")
    }


def recent_leases(rows: Sequence[Assignment]) -> dict[tuple[str, str], list[Lease]]:
    """The last leases of each assignment, oldest first."""
    found: dict[tuple[str, str], list[Lease]] = defaultdict(list)
    events = (
        JoinedEvent.objects.filter(
            decision__device_id__in={row.device_id for row in rows},
            application_id__in={row.application_id for row in rows},
        )
        .order_by("-id")
        .values_list(
            "decision__device_id",
            "application_id",
            "reward",
            "measurement__p95_ms",
            "measurement__slo_hit_share",
            "measurement__requests",
        )[: 2 * SPARKLINE_LEASES * len(rows)]
    )
    for device, application, *measured in events:
        leases = found[device, application]
        if len(leases) < SPARKLINE_LEASES:
            leases.insert(0, Lease(*measured))
    return found


def _configurations(rows: Sequence[Assignment]) -> dict[str, Mapping[str, Any]]:
    known = {row.decision_id for row in rows}
    others = {row.reported_decision_id for row in rows} - known - {""}
    if not others:
        return {}
    return dict(Decision.objects.filter(id__in=others).values_list("id", "configuration"))


def _desired(row: Assignment, names: Mapping[tuple[str, str], str]) -> Serving | None:
    if row.decision is None:
        return None
    digest = row.decision.variant_digest
    return Serving(digest, names.get((row.application_id, digest), digest[:12]), row.decision.configuration)


def _running(
    row: Assignment, names: Mapping[tuple[str, str], str], configurations: Mapping[str, Mapping[str, Any]]
) -> Serving | None:
    digest = row.reported_digest
    if not digest:
        return None
    if row.decision is not None and row.reported_decision_id == row.decision.id:
        configuration: Mapping[str, Any] | None = row.decision.configuration
    else:
        configuration = configurations.get(row.reported_decision_id)
    return Serving(digest, names.get((row.application_id, digest), digest[:12]), configuration)


def shown_labels(device: Device) -> list[tuple[str, str]]:
    """Labels in a stable order, as words; which applications a device has shows anyway."""
    labels = ((str(key).replace("-", " "), str(value)) for key, value in device.labels.items())
    return sorted(each for each in labels if each[0] != "applications")
