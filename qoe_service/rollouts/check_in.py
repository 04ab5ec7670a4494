"""Takes a device's report apart and hands each piece to the room that keeps it. It decides nothing."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable
from datetime import datetime

from django.db import transaction
from django.db.models import Q
from kombu.exceptions import OperationalError

from device_agents.wire import ApplicationReport, CheckIn, CheckInReply, UpdateState
from qoe_service.catalogue import profiles, profiling
from qoe_service.decisions import ranking
from qoe_service.decisions.models import Decision, Learner
from qoe_service.errors import NotPermitted
from qoe_service.fleet import keys, reports
from qoe_service.fleet.models import Device
from qoe_service.observability import current_trace_id
from qoe_service.rollouts import changes, desired, health, reconcile, tasks
from qoe_service.rollouts.models import Assignment

logger = logging.getLogger(__name__)
SERVING = frozenset({UpdateState.SOAKING, UpdateState.COMMITTED})


def check_in(*, device: Device, report: CheckIn, rng: random.Random, now: datetime) -> CheckInReply:
    """Record what the device says; if that makes a decision due, wake a worker once it is committed."""
    interval_s = desired.check_in_interval_s(rng)
    with transaction.atomic():
        _lock(device, report)
        decisions = _own_decisions(device, report)
        if device.last_seen_at is None:  # what could not be decided before anything was known of the device may be now
            Assignment.objects.filter(device=device).update(undecided_until=None)
        reports.record_check_in(device=device, check_in=report, interval_s=interval_s, now=now)
        profiles.record_reports(device=device, reports=report.profiles, now=now)
        reconcile.assign_applications(device=device)
        health.record_outcomes(device=device, reports=report.outcomes, decisions=decisions, now=now)
        _record_applications(device, report.applications, decisions, now)
        if profiling.attend(device=device, report=report.profiling, applications=_applications_of(device), now=now):
            changes.announce(device_id=device.pk, now=now)
            Assignment.objects.filter(device=device).update(undecided_until=None)  # what it measured opens the gate
    if reconcile.ready(now=now).filter(device=device).exists():
        _wake(device.pk)
    return CheckInReply(
        check_in_interval_s=interval_s,
        desired_version=desired.version_of(device_id=device.pk),
        server_time=now,
        keys=keys.newer_keys(known_version=report.keys_version, now=now),
    )


def _lock(device: Device, report: CheckIn) -> None:
    """Take every lock that this check-in may need in the order that all take them: learners by name, decisions by id.

    Joins lock a learner and then decisions, batches of feedback lock decisions: in another order they would deadlock.
    """
    failed = {each.decision_id for each in report.outcomes if each.outcome in health.FAILURES}
    if failed:
        rows = Decision.objects.filter(pk__in=failed, device=device).order_by("application_id")
        names = list(dict.fromkeys(rows.values_list("application_id", flat=True)))
        Learner.objects.bulk_create([Learner(application_id=name) for name in names], ignore_conflicts=True)
        list(Learner.objects.select_for_update().filter(pk__in=names).order_by("pk"))
    named = {each.decision_id for each in report.outcomes} | {each.decision_id or "" for each in report.applications}
    # A decision that becomes active ends the pending ones before it.
    mine = Decision.objects.filter(Q(pk__in=named) | Q(state=Decision.State.PENDING), device=device)
    list(mine.select_for_update().order_by("pk").values_list("pk"))


def _own_decisions(device: Device, report: CheckIn) -> dict[str, Decision]:
    """The decisions that the report names. Unknown ones are left out: the service may have lost what a device kept."""
    named = {f"outcomes.{n}.decision_id": each.decision_id for n, each in enumerate(report.outcomes)}
    named |= {f"applications.{n}.decision_id": each.decision_id or "" for n, each in enumerate(report.applications)}
    known = {
        each.pk: each for each in Decision.objects.select_related("application").filter(pk__in=set(named.values()))
    }
    for field, decision_id in named.items():
        if decision_id in known and known[decision_id].device_id != device.pk:
            raise NotPermitted("the decision belongs to another device", field=field)
    return known


def _applications_of(device: Device) -> list[str]:
    return list(Assignment.objects.filter(device=device).values_list("application_id", flat=True))


def _record_applications(
    device: Device, applications: Iterable[ApplicationReport], decisions: dict[str, Decision], now: datetime
) -> None:
    assignments = {each.application_id: each for each in Assignment.objects.filter(device=device)}
    for report in applications:
        assignment = assignments.get(report.application)
        if assignment is not None:
            _record_application(assignment, report, now)
            if report.decision_id in decisions and report.state in SERVING:
                ranking.activate(decision_id=report.decision_id, device=device, now=now)


def _record_application(assignment: Assignment, report: ApplicationReport, now: datetime) -> None:
    assignment.reported_state = report.state
    assignment.reported_digest = report.running_digest or ""
    assignment.reported_decision_id = report.decision_id or ""
    assignment.reported_active_s = report.lease_active_s
    assignment.cached_digests = list(report.cached_digests)
    assignment.reported_at = now
    if report.state in SERVING:  # before it serves, a device sees no requests, whatever the apps would send
        assignment.reported_rps = report.arrival_rate_rps
    assignment.save(
        update_fields=[
            "reported_state",
            "reported_digest",
            "reported_decision_id",
            "reported_active_s",
            "reported_rps",
            "cached_digests",
            "reported_at",
        ]
    )


def _wake(device_id: str) -> None:
    try:
        tasks.reconcile_device.apply_async(args=(device_id, current_trace_id()), retry=False)
    except (OperationalError, OSError) as error:
        logger.warning("worker not woken: the next scan finds it device=%s error=%s", device_id, error)
