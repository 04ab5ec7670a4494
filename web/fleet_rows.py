"""Reads what the Fleet page shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from django.core.paginator import Page, Paginator
from django.db.models import Count, Q, QuerySet
from django.http import QueryDict

from qoe_service.decisions.models import JoinedEvent
from qoe_service.fleet.models import OVERDUE_GRACE, Device
from qoe_service.rollouts.models import Assignment
from web.placements import UPDATE_STATES, Placement, assignments, drifting, placements, shown_labels

DEVICES_PER_PAGE = 50
FILTERS_FROM = 8
_SLO_LEASES = 200
DRIFT, OVERDUE = "drift", "overdue"


@dataclass(frozen=True, slots=True)
class Filters:
    """What the operator narrowed the table to."""

    text: str = ""
    device_class: str = ""
    state: str = ""

    @classmethod
    def read(cls, query: QueryDict) -> Filters:
        """The filters of a query string; unknown states show an empty table, not an error."""
        return cls(query.get("q", "").strip()[:64], query.get("class", "")[:64], query.get("state", "")[:16])

    @property
    def is_active(self) -> bool:
        """Whether anything is narrowed."""
        return bool(self.text or self.device_class or self.state)


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """A device with its applications."""

    device: Device
    is_overdue: bool
    placements: Sequence[Placement]

    @property
    def labels(self) -> list[tuple[str, str]]:
        """Labels for people."""
        return shown_labels(self.device)


@dataclass(frozen=True, slots=True)
class Totals:
    """The tiles: numbers over the whole fleet, whatever the filters."""

    devices: int
    overdue: int
    revoked: int
    assignments: int
    drifting: int
    slo_violation_share: float | None
    slo_leases: int


@dataclass(frozen=True, slots=True)
class FleetTable:
    """The table and what can be chosen above it."""

    page: Page[Device]
    rows: Sequence[DeviceRow]
    classes: Sequence[str]
    filters: Filters
    states: Sequence[str] = (DRIFT, OVERDUE, *UPDATE_STATES)

    @property
    def has_filters(self) -> bool:
        """Whether there is enough to make filters worth their place."""
        return self.filters.is_active or self.page.paginator.count > FILTERS_FROM


def totals(*, now: datetime) -> Totals:
    """The numbers of the tiles, in three queries."""
    late = Q(revoked_at=None, next_check_in_due_at__lt=now - OVERDUE_GRACE)
    devices = Device.objects.aggregate(
        all=Count("id", filter=Q(revoked_at=None)),
        overdue=Count("id", filter=late),
        revoked=Count("id", filter=Q(revoked_at__isnull=False)),
    )
    assigned = Assignment.objects.filter(device__revoked_at=None).aggregate(
        all=Count("id"), drifting=Count("id", filter=drifting())
    )
    violations, leases = _slo_violations()
    return Totals(
        devices=devices["all"],
        overdue=devices["overdue"],
        revoked=devices["revoked"],
        assignments=assigned["all"],
        drifting=assigned["drifting"],
        slo_violation_share=violations,
        slo_leases=leases,
    )


def _slo_violations() -> tuple[float | None, int]:
    """Share of the last leases that failed or whose p95 missed the SLO, over all applications."""
    latest = JoinedEvent.objects.order_by("-id").values_list(
        "measurement__failed", "measurement__p95_ms", "application__slo_p95_ms"
    )
    missed = [
        bool(failed) or p95_ms > slo_p95_ms
        for failed, p95_ms, slo_p95_ms in latest[:_SLO_LEASES]
        if failed or p95_ms is not None
    ]
    return (sum(missed) / len(missed) if missed else None), len(missed)


def fleet_table(*, filters: Filters, page_number: str | None, now: datetime) -> FleetTable:
    """One page of devices with what they run."""
    page = Paginator(_devices(filters, now), DEVICES_PER_PAGE).get_page(page_number)
    devices = list(page.object_list)
    by_device = _by_device(placements(list(assignments().filter(device_id__in=[each.id for each in devices]))))
    rows = [DeviceRow(each, each.is_overdue(now), by_device.get(each.id, [])) for each in devices]
    classes = list(Device.objects.order_by("device_class").values_list("device_class", flat=True).distinct())
    return FleetTable(page=page, rows=rows, classes=classes, filters=filters)


def _by_device(found: Sequence[Placement]) -> Mapping[str, list[Placement]]:
    grouped: dict[str, list[Placement]] = {}
    for each in found:
        grouped.setdefault(each.assignment.device_id, []).append(each)
    return grouped


def _devices(filters: Filters, now: datetime) -> QuerySet[Device]:
    devices = Device.objects.filter(revoked_at=None)
    if filters.text:
        devices = devices.filter(Q(name__icontains=filters.text) | Q(id__startswith=filters.text))
    if filters.device_class:
        devices = devices.filter(device_class=filters.device_class)
    if filters.state == OVERDUE:
        return devices.filter(next_check_in_due_at__lt=now - OVERDUE_GRACE)
    if filters.state:
        wanted = drifting() if filters.state == DRIFT else Q(reported_state=filters.state)
        devices = devices.filter(id__in=Assignment.objects.filter(wanted).values("device_id"))
    return devices
