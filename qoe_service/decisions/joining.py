"""Joins a closed lease with its feedback into one reward, and writes it to the log that the learner reads.

All joins of an application happen under the lock of its Learner row, so the numbers of the log have no gaps.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.db import transaction
from django.db.models import Q, QuerySet

from qoe_service.catalogue.models import Application, Variant
from qoe_service.decisions import lifecycle
from qoe_service.decisions.features import formula_of
from qoe_service.decisions.folding import DEVICE, fold, is_empty
from qoe_service.decisions.models import Decision, Feedback, JoinedEvent, Learner
from qoe_service.fleet.models import Device
from selector.interactions import Measurement
from selector.records import as_record
from selector.reward import QoeFormula

logger = logging.getLogger(__name__)
JOINED_AT_ONCE = 200
# Sender and id of the mark that a failure leaves when its decision has a reward already.
LATE_FAILURE = "late-failure"
State = Decision.State


@dataclass(frozen=True, slots=True)
class _Rules:
    """How leases of one application are judged right now."""

    application: Application
    version: int
    formula: QoeFormula


@dataclass(frozen=True, slots=True)
class _Lease:
    """One decision whose lease is over, and what is known about it."""

    decision: Decision
    feedback: Sequence[Feedback]
    variant: Variant | None
    failed: bool


@dataclass(frozen=True, slots=True)
class _Reward:
    measurement: Measurement
    value: float


def close_due(*, now: datetime) -> list[str]:
    """Join or drop every lease whose waiting time is over; the names of the applications whose logs grew.

    An application that cannot be joined keeps its leases, and does not keep others from theirs.
    """
    grown = []
    for application in Application.objects.all():
        try:
            if _close_application(application, now):
                grown.append(application.pk)
        except Exception:
            logger.exception("joining failed application=%s", application.pk)
    return grown


def report_failure(*, decision_id: str, device: Device, reason: str, now: datetime) -> bool:
    """A rollback or crash is an outcome with its own reward, joined at once. Whether this call joined it.

    After the join it cannot change what was learnt; it is logged and kept as late feedback.
    """
    mine = Decision.objects.filter(pk=decision_id, device=device)
    application = Application.objects.filter(decisions__in=mine).first()
    if application is None:
        return False
    with transaction.atomic():
        learner = _locked_learner(application)
        due = list(mine.select_for_update().filter(state__in=lifecycle.sources_of(State.JOINED)))
        if not due:
            _keep_late_failure(mine, reason, now)
            return False
        _join(application, learner, due, now, failed=True)
    logger.warning("decision failed decision_id=%s device=%s reason=%s", decision_id, device.pk, reason)
    return True


def _keep_late_failure(mine: QuerySet[Decision], reason: str, now: datetime) -> None:
    """Once, unless the failure is what was joined; a decision that was replaced unserved has nothing to fail."""
    for decision in mine.filter(state__in=(State.JOINED, State.DROPPED)).select_related("joined"):
        joined = getattr(decision, "joined", None)
        if joined is not None and joined.measurement.get("failed"):
            continue
        _, is_new = Feedback.objects.get_or_create(
            decision=decision,
            source=DEVICE,
            sender=LATE_FAILURE,
            feedback_id=LATE_FAILURE,
            defaults={"is_late": True, "received_at": now},
        )
        if is_new:
            logger.warning(
                "decision failed too late to be learnt decision_id=%s device=%s state=%s reason=%s",
                decision.pk,
                decision.device_id,
                decision.state,
                reason,
            )


def _close_application(application: Application, now: datetime) -> bool:
    grew = False
    while Decision.objects.filter(_due(application, now)).exists():
        with transaction.atomic():
            learner = _locked_learner(application)
            due = Decision.objects.select_for_update().filter(_due(application, now)).order_by("pk")[:JOINED_AT_ONCE]
            grew = _join(application, learner, list(due), now) or grew
    return grew


def _due(application: Application, now: datetime) -> Q:
    """Closed and waited for, or active and long past the end of the lease."""
    closed_before = now - timedelta(seconds=application.feedback_wait_s)
    active_before = now - timedelta(seconds=application.lease_s + application.silence_after_s)
    closed = Q(state=State.CLOSED, closed_at__lte=closed_before)
    silent = Q(state=State.ACTIVE, active_at__lte=active_before)
    return Q(application=application) & (closed | silent)


def _locked_learner(application: Application) -> Learner:
    Learner.objects.get_or_create(application=application)
    return Learner.objects.select_for_update().get(application=application)


def _join(
    application: Application, learner: Learner, due: Sequence[Decision], now: datetime, *, failed: bool = False
) -> bool:
    """Write the rewards of these locked decisions in the order in which their leases ended; whether there were any."""
    rules = _Rules(application, *formula_of(application))
    feedback = _feedback_of(due)
    variants = _variants_of(application, due)
    events, dropped = [], []
    for decision in sorted(due, key=lambda each: (each.closed_at or now, each.pk)):
        lease = _Lease(decision, feedback[decision.pk], variants.get(decision.variant_digest), failed)
        reward = _reward(lease, rules)
        if reward is None:
            dropped.append(decision.pk)
            continue
        learner.last_event_number += 1
        events.append(_event(decision, learner.last_event_number, reward, rules, now))
    JoinedEvent.objects.bulk_create(events)
    learner.save(update_fields=["last_event_number"])
    lifecycle.move([event.decision_id for event in events], State.JOINED)
    lifecycle.move(dropped, State.DROPPED)
    return bool(events)


def _event(decision: Decision, number: int, reward: _Reward, rules: _Rules, now: datetime) -> JoinedEvent:
    return JoinedEvent(
        application_id=decision.application_id,
        decision=decision,
        number=number,
        measurement=as_record(reward.measurement),
        reward=reward.value,
        formula_version=rules.version,
        joined_at=now,
    )


def _reward(lease: _Lease, rules: _Rules) -> _Reward | None:
    """The measurement and its worth; None for what must not be learnt from."""
    if any(row.overridden for row in lease.feedback if not row.is_late):
        return None
    measurement = fold(lease.feedback, download_bytes=_download_bytes(lease), failed=lease.failed)
    accuracy = lease.variant.accuracy if lease.variant else None
    if not is_empty(measurement) and rules.formula.can_score(measurement, accuracy):
        return _Reward(measurement, rules.formula.reward(measurement, accuracy))
    # A closed lease that saw nobody says nothing; a device that fell silent follows the application's rule.
    if lease.decision.state == State.ACTIVE and rules.application.silence_reward is not None:
        return _Reward(measurement, rules.application.silence_reward)
    return None


def _download_bytes(lease: _Lease) -> int:
    """What switching cost: the variant's size, unless the device had it when the decision was made."""
    context = lease.decision.context
    running = (context.get("incumbent") or "").split("/")[0]
    there = lease.decision.variant_digest in context.get("cached_digests", ())
    there = there or lease.decision.variant_digest[:12] == running
    return 0 if there or lease.variant is None else lease.variant.artifact.size_bytes


def _feedback_of(due: Iterable[Decision]) -> dict[str, list[Feedback]]:
    rows: dict[str, list[Feedback]] = defaultdict(list)
    for row in Feedback.objects.filter(decision__in=[each.pk for each in due]).order_by("pk"):
        rows[row.decision_id].append(row)
    return rows


def _variants_of(application: Application, due: Iterable[Decision]) -> dict[str, Variant]:
    digests = {each.variant_digest for each in due}
    rows = Variant.objects.filter(application=application, artifact__in=digests).select_related("artifact")
    return {row.artifact_id: row for row in rows}
