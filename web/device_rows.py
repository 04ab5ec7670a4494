"""Reads what the Device page shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.db.models import Q

from qoe_service.catalogue.models import Profile
from qoe_service.decisions.models import Ban, Decision
from qoe_service.fleet.models import Device
from qoe_service.rollouts.models import AttemptOutcome
from web.placements import Placement, assignments, placements, shown_labels, variant_names

STEPS = ("downloading", "verifying", "staged", "warming", "soaking", "committed")
_DECISIONS, _OUTCOMES = 15, 15
_DECISION_FIELDS = (
    *("id", "application_id", "state", "reason", "variant_digest", "configuration", "propensity", "kind"),
    *("policy_number", "decided_at", "active_at", "closed_at", "joined__reward"),
)


@dataclass(frozen=True, slots=True)
class Named:
    """A row and the name of the variant that it speaks of."""

    row: Any
    variant: str


@dataclass(frozen=True, slots=True)
class Step:
    """One state of the update machine, as seen from the reported one."""

    name: str
    standing: str


@dataclass(frozen=True, slots=True)
class DeviceDetail:
    """All parts of the page."""

    device: Device
    is_overdue: bool
    placements: Sequence[tuple[Placement, Sequence[Step]]]
    decisions: Sequence[Named]
    outcomes: Sequence[Named]
    bans: Sequence[Named]
    profiles: Sequence[Profile]

    @property
    def labels(self) -> list[tuple[str, str]]:
        """Labels for people."""
        return shown_labels(self.device)

    @property
    def telemetry(self) -> Mapping[str, Any]:
        """The latest telemetry, as reported."""
        return dict(self.device.telemetry)


def device_detail(*, device: Device, now: datetime) -> DeviceDetail:
    """The page of one device, in a fixed number of queries."""
    found = placements(list(assignments().filter(device=device)))
    decisions = list(Decision.objects.filter(device=device).values(*_DECISION_FIELDS)[:_DECISIONS])
    outcomes = list(AttemptOutcome.objects.filter(device=device)[:_OUTCOMES])
    bans = _bans(device, now, [each.assignment.application_id for each in found])
    names = variant_names(
        [
            *(each["application_id"] for each in decisions),
            *(each.application_id for each in outcomes),
            *(each.application_id for each in bans),
        ]
    )
    digests = dict(
        Decision.objects.filter(id__in={each.decision_id for each in outcomes}).values_list("id", "variant_digest")
    )
    return DeviceDetail(
        device=device,
        is_overdue=device.is_overdue(now),
        placements=[(each, steps(each.assignment.reported_state)) for each in found],
        decisions=[Named(each, _name(names, each["application_id"], each["variant_digest"])) for each in decisions],
        outcomes=[
            Named(each, _name(names, each.application_id, digests.get(each.decision_id, ""))) for each in outcomes
        ],
        bans=[Named(each, _name(names, each.application_id, each.variant_digest)) for each in bans],
        profiles=list(
            Profile.objects.filter(device=device).select_related("variant").order_by("variant__name", "threads")
        ),
    )


def _name(names: Mapping[tuple[str, str], str], application: str, digest: str) -> str:
    return names.get((application, digest), digest[:12])


def _bans(device: Device, now: datetime, applications: Sequence[str]) -> list[Ban]:
    holding = Q(expires_at=None) | Q(expires_at__gt=now)
    here = Q(device=device) | Q(device=None, application_id__in=applications)
    return list(Ban.objects.filter(here & holding).order_by("-created_at"))


def steps(state: str) -> list[Step]:
    """The way of an update, with what is done, under way and to come. Idle and rolled back stand outside of it."""
    if state not in STEPS:
        return []
    reached = STEPS.index(state)
    standing = {True: "done", False: "to come"}
    return [
        Step(
            name,
            "done" if name == "committed" == state else "under way" if index == reached else standing[index < reached],
        )
        for index, name in enumerate(STEPS)
    ]
