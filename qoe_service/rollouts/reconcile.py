"""Brings desired and reported state together: finds where a decision is due, has it made once, and tells the device.

When a decision is due stands in ``due`` and nowhere else. What is chosen is up to ``decisions.ranking``.
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta

from django.conf import settings
from django.db import transaction
from django.db.models import Case, CharField, Exists, F, OuterRef, Q, QuerySet, Value, When

from qoe_service.catalogue.models import Application, Variant
from qoe_service.decisions import ranking
from qoe_service.decisions.models import Decision
from qoe_service.errors import ServiceError
from qoe_service.fleet.models import Device
from qoe_service.rollouts import changes
from qoe_service.rollouts.health import FAILURES
from qoe_service.rollouts.models import Assignment, AttemptOutcome

logger = logging.getLogger(__name__)
State = Decision.State
OVER = (State.CLOSED, State.JOINED, State.DROPPED)
LONGEST_WAIT_S = 60.0


class _LostRaceError(Exception):
    """Another process decided first; what this one did is rolled back."""


def due() -> QuerySet[Assignment]:
    """Assignments that need a decision, each with the ``reason``. Devices that were revoked need none."""
    failed = AttemptOutcome.objects.filter(
        device=OuterRef("device"), decision_id=OuterRef("decision_id"), outcome__in=FAILURES
    )
    timeout = timedelta(seconds=settings.ACTIVATION_TIMEOUT_S)
    reason = Case(
        When(decision=None, then=Value("enrolment")),
        When(Exists(failed), then=Value("rollback")),
        When(decision__state__in=OVER, then=Value("lease_over")),
        When(
            reported_decision_id=F("decision_id"),
            reported_active_s__gte=F("application__lease_s"),
            then=Value("lease_over"),
        ),
        When(decision__state=State.NEVER_ACTIVE, then=Value("not_activated")),
        # Only a device that was there all that time failed to activate; one that is away just has not heard of it.
        When(
            decision__state=State.PENDING,
            desired_at__lte=F("device__last_seen_at") - timeout,
            then=Value("not_activated"),
        ),
        default=Value(""),
        output_field=CharField(),
    )
    assignments = Assignment.objects.filter(device__revoked_at=None).annotate(reason=reason).exclude(reason="")
    return assignments.filter(Exists(_selectable(OuterRef("application"))))


def ready(*, now: datetime) -> QuerySet[Assignment]:
    """Those of them that are worth a try now, longest waiting first: not those where nothing could be chosen lately."""
    waited = Q(undecided_until=None) | Q(undecided_until__lte=now)
    return due().filter(waited).order_by(F("desired_at").asc(nulls_first=True), "pk")


def assign_applications(*, device: Device | None = None) -> None:
    """Give every device (or this one) every application that has a variant to choose, unless its label narrows it."""
    devices = Device.objects.filter(revoked_at=None)
    if device is not None:
        devices = devices.filter(pk=device.pk)
    for application in Application.objects.filter(Exists(_selectable(OuterRef("pk")))):
        missing = devices.exclude(assignments__application=application)
        Assignment.objects.bulk_create(
            [Assignment(device=each, application=application) for each in missing if _runs(each, application)],
            ignore_conflicts=True,
        )


def reconcile(*, device_id: str, trace_id: str, now: datetime) -> list[Decision]:
    """Make the decisions that are due for this device; running it twice at once makes each of them once."""
    device = Device.objects.filter(pk=device_id, revoked_at=None).first()
    if device is None:
        return []
    assign_applications(device=device)
    waiting = ready(now=now).filter(device=device).values_list("pk", flat=True)
    made = [_decide_once(pk, trace_id, now) for pk in waiting]
    return [decision for decision in made if decision is not None]


def _decide_once(assignment_id: int, trace_id: str, now: datetime) -> Decision | None:
    try:
        with transaction.atomic():
            # A scan that overlaps this one passes the row over instead of ranking for nothing.
            rows = ready(now=now).select_for_update(of=("self",), skip_locked=True)
            assignment = rows.select_related("device", "application", "decision").filter(pk=assignment_id).first()
            return None if assignment is None else _decide(assignment, trace_id, now)
    except _LostRaceError:
        return None
    except ServiceError as error:
        _put_off(assignment_id, error.detail[:500], now)
        return None


def _put_off(assignment_id: int, why: str, now: datetime) -> None:
    """Try again later, and each time later still; say so once."""
    row = Assignment.objects.get(pk=assignment_id)
    if row.undecided_why != why:
        logger.warning("no decision assignment=%d error=%s", assignment_id, why)
    wait_s = min(max(2 * row.undecided_wait_s, settings.RESCAN_S), LONGEST_WAIT_S)
    Assignment.objects.filter(pk=assignment_id, decision=row.decision_id).update(
        undecided_until=now + timedelta(seconds=wait_s), undecided_wait_s=wait_s, undecided_why=why
    )


def _decide(assignment: Assignment, trace_id: str, now: datetime) -> Decision | None:
    reason: str = assignment.reason  # type: ignore[attr-defined]  # annotated by due()
    decision = ranking.decide(
        device=assignment.device,
        application=assignment.application,
        reason=reason,
        arrival_rate_rps=_arrival_rate_rps(assignment),
        cached_digests=frozenset(assignment.cached_digests),
        incumbent_decision=_incumbent(assignment),
        trace_id=trace_id,
        now=now,
    )
    if decision.pk == assignment.decision_id:
        return None  # nothing else is allowed: the device keeps what it runs
    # The row count says whether this process was first; the loser's decision goes with its transaction.
    mine = Assignment.objects.filter(pk=assignment.pk, decision_id=assignment.decision_id)
    decided = {"undecided_until": None, "undecided_wait_s": 0, "undecided_why": ""}
    if not mine.update(decision=decision, desired_at=now, **decided):
        raise _LostRaceError
    changes.announce(device_id=assignment.device_id, now=now)
    logger.info(
        "decided device=%s application=%s decision=%s reason=%s action=%s",
        assignment.device_id,
        assignment.application_id,
        decision.pk,
        reason,
        decision.action_key,
    )
    return decision


def _arrival_rate_rps(assignment: Assignment) -> float:
    reported = assignment.reported_rps
    return assignment.application.arrival_rate_rps if reported is None else reported


def _incumbent(assignment: Assignment) -> Decision | None:
    """The decision whose model the device says it runs: after a rollback that is not the one it was told to follow."""
    running = assignment.reported_decision_id
    if assignment.decision is not None and assignment.decision.pk == running:
        return assignment.decision
    return Decision.objects.filter(pk=running, device=assignment.device_id).first() if running else None


def _selectable(application: OuterRef) -> QuerySet[Variant]:
    return Variant.objects.filter(application=application, accuracy__isnull=False, retired_at=None)


def _runs(device: Device, application: Application) -> bool:
    label = device.labels.get("applications", "")
    return not label or application.name in {name.strip() for name in label.split(",")}
