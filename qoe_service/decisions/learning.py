"""Learns joined events into policy versions: one learner at a time, in log order, from recorded predictions only.

Whoever learns holds a lease with a fencing number; a version is written only while the number still holds. What was
learnt can be rebuilt from the log, byte for byte.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import F, Q

from qoe_service.catalogue.models import Application
from qoe_service.decisions import policies
from qoe_service.decisions.models import CalibrationRow, JoinedEvent, Learner, PolicyVersion
from qoe_service.decisions.record import evidence_of, interaction_of
from selector.errors import CorruptPolicy, InvalidInput
from selector.latency import Calibration
from selector.verdict import best_fixed_action
from selector.vw import FEATURE_SCHEMA, VowpalWabbitPolicy

logger = logging.getLogger(__name__)
LEASE = timedelta(seconds=15)
EVENTS_AT_ONCE = 500
# The best fixed action is looked for among the newest events, and again after so many more.
RECENT_EVENTS = 300
BEST_FIXED_EVERY = 10


@dataclass(slots=True)
class _Learnt:
    """A policy and a calibration after the events up to ``through``, and what changed since they were stored."""

    policy: VowpalWabbitPolicy
    calibration: Calibration
    through: int = 0
    changed: set[str] = field(default_factory=set)

    def learn(self, events: Iterable[JoinedEvent]) -> None:
        """Take the next events of the log. One that no learner may see is passed over, the same way every time."""
        for event in events:
            try:
                interaction = interaction_of(event)
                self.policy.learn(interaction)
                self.changed |= self.calibration.update(interaction)
            except InvalidInput as error:
                logger.error("event not learnt decision_id=%s reason=%s", event.decision_id, error)
            self.through = event.number


@dataclass(frozen=True, slots=True)
class Replay:
    """What the log says the newest policy version must be, and where the stored one differs from it."""

    state: bytes
    sha256: str
    calibration: dict[str, dict[str, Any]]
    through: int
    mismatches: tuple[str, ...]


# The newest learnt state of each application, by the sha256 of the version that it was stored as.
_kept: dict[str, tuple[str, _Learnt]] = {}
_learning = threading.Lock()


def learn(*, application: Application, owner: str, now: datetime) -> PolicyVersion | None:
    """Learn what joined since the last version; the new version, or None if there is none to make."""
    if not _is_due(application, now) or not _learning.acquire(blocking=False):
        return None
    try:
        claimed = claim(application=application, owner=owner, now=now)
        if claimed is None:
            return None
        try:
            return learn_claimed(claimed, now)
        finally:
            _release(claimed, now)
    finally:
        _learning.release()


def forget() -> None:
    """Drop what this process remembers, as a restart would."""
    _kept.clear()


def claim(*, application: Application, owner: str, now: datetime) -> Learner | None:
    """The learner row, leased to this owner; None while another's lease lives. A change of owner raises the fence."""
    Learner.objects.get_or_create(application=application)
    row = Learner.objects.filter(application=application)
    until = now + LEASE
    if not row.filter(owner=owner, lease_expires_at__gt=now).update(lease_expires_at=until):
        free = row.filter(Q(lease_expires_at=None) | Q(lease_expires_at__lte=now))
        if not free.update(owner=owner, lease_expires_at=until, fencing_number=F("fencing_number") + 1):
            return None
    return row.select_related("application").filter(owner=owner).first()


def _release(claimed: Learner, now: datetime) -> None:
    """Let the next one learn at once: workers take turns."""
    mine = Learner.objects.filter(pk=claimed.pk, owner=claimed.owner, fencing_number=claimed.fencing_number)
    mine.update(lease_expires_at=now)


def _is_due(application: Application, now: datetime) -> bool:
    """Whether a version may be made, looked at without any lock: most calls end here."""
    learner = Learner.objects.filter(application=application).first()
    if learner is None or learner.last_event_number <= learner.learnt_through:
        return False
    newest = _newest(application)
    if newest is None:
        return learner.last_event_number >= settings.FIRST_POLICY_AFTER
    # After an outage versions need not keep their distance: each takes all events that it can.
    if learner.last_event_number - learner.learnt_through >= EVENTS_AT_ONCE:
        return True
    return now - newest.created_at >= timedelta(seconds=settings.LEARN_INTERVAL_S)


def _newest(application: Application) -> PolicyVersion | None:
    return PolicyVersion.objects.filter(application=application).defer("state").order_by("-number").first()


def learn_claimed(claimed: Learner, now: datetime) -> PolicyVersion | None:
    """Learn for whoever holds the lease; nothing is written if somebody else has it by the end."""
    application = claimed.application
    newest = _newest(application)
    events = list(_events(application, after=claimed.learnt_through)[:EVENTS_AT_ONCE])
    if not events:
        return None
    learnt = _recalled(claimed, newest, now)
    learnt.learn(events)
    version = _publish(claimed=claimed, previous=newest, learnt=learnt, now=now)
    if version is not None:
        learnt.changed.clear()
        _kept[application.pk] = (version.sha256, learnt)
    return version


def _events(application: Application, *, after: int, through: int | None = None) -> Any:
    rows = JoinedEvent.objects.filter(application=application, number__gt=after).select_related("decision")
    return (rows if through is None else rows.filter(number__lte=through)).order_by("number")


def _recalled(claimed: Learner, newest: PolicyVersion | None, now: datetime) -> _Learnt:
    """The state of the newest version: from this process's memory, from its bytes, or replayed from the log."""
    application = claimed.application
    digest, learnt = _kept.pop(application.pk, ("", None))
    if newest is None:
        return _Learnt(VowpalWabbitPolicy(), Calibration())
    if learnt is not None and (digest, learnt.through) == (newest.sha256, newest.trained_through):
        return learnt
    try:
        rows = CalibrationRow.objects.filter(application=application).values_list("scope", "state")
        return _Learnt(policies.load(newest), Calibration.from_rows(dict(rows)), newest.trained_through)
    except (CorruptPolicy, InvalidInput) as error:
        logger.error("policy replayed application=%s number=%d reason=%s", application.pk, newest.number, error)
        learnt = _replayed(_renewing(claimed, _log(application, newest.trained_through), now))
        learnt.changed = set(learnt.calibration.rows())
        return learnt


def _publish(
    *, claimed: Learner, previous: PolicyVersion | None, learnt: _Learnt, now: datetime
) -> PolicyVersion | None:
    """Write version, calibration and position in one transaction; None if somebody else has the fence by now."""
    state = learnt.policy.to_bytes()
    application = claimed.application
    best_fixed = _best_fixed(application, previous, learnt.through)
    with transaction.atomic():
        mine = Learner.objects.filter(
            pk=claimed.pk,
            owner=claimed.owner,
            fencing_number=claimed.fencing_number,
            learnt_through=claimed.learnt_through,
        )
        if not mine.update(learnt_through=learnt.through):
            logger.warning("late learner refused application=%s owner=%s", application.pk, claimed.owner)
            return None
        _store_calibration(application, learnt)
        version = PolicyVersion.objects.create(
            application=application,
            number=previous.number + 1 if previous else 1,
            state=state,
            sha256=hashlib.sha256(state).hexdigest(),
            arguments=learnt.policy.settings.arguments,
            feature_schema=str(FEATURE_SCHEMA),
            probes=learnt.policy.probe_vectors(),
            trained_through=learnt.through,
            best_fixed=best_fixed,
            fencing_number=claimed.fencing_number,
            created_at=now,
        )
        _prune(version)
    return version


def _prune(newest: PolicyVersion) -> None:
    """Drop the bytes of old versions; replaying the log rebuilds them."""
    last = newest.number - settings.POLICY_STATES_KEPT
    old = PolicyVersion.objects.filter(application=newest.application, number__lte=last, state__isnull=False)
    old.update(state=None)


def _best_fixed(application: Application, previous: PolicyVersion | None, through: int) -> str:
    """What is played in half of the holdout. It changes slowly, so it is not looked for at every version."""
    if previous is not None and previous.trained_through // BEST_FIXED_EVERY == through // BEST_FIXED_EVERY:
        return previous.best_fixed
    events = _events(application, after=through - RECENT_EVENTS, through=through)
    return best_fixed_action(evidence_of(events)) or ""


def _store_calibration(application: Application, learnt: _Learnt) -> None:
    rows = learnt.calibration.rows(sorted(learnt.changed))
    CalibrationRow.objects.bulk_create(
        [
            CalibrationRow(application=application, scope=scope, revision=row["revision"], state=row)
            for scope, row in rows.items()
        ],
        update_conflicts=True,
        unique_fields=("application", "scope"),
        update_fields=("revision", "state"),
    )


def replay(*, application: Application) -> Replay | None:
    """Rebuild the newest version from nothing but the log, and compare; None before the first version."""
    newest, stored = _newest_with_calibration(application)
    if newest is None:
        return None
    learnt = _replayed(_log(application, newest.trained_through))
    state = learnt.policy.to_bytes()
    digest, rows = hashlib.sha256(state).hexdigest(), learnt.calibration.rows()
    mismatches = [f"calibration {scope}" for scope in sorted(rows | stored) if rows.get(scope) != stored.get(scope)]
    if digest != newest.sha256:
        mismatches.insert(0, f"policy v{newest.number}")
    return Replay(state, digest, rows, newest.trained_through, tuple(mismatches))


def _newest_with_calibration(application: Application) -> tuple[PolicyVersion | None, dict[str, Any]]:
    """The newest version and the rows that were written with it, though the learner may be writing the next ones."""
    while True:
        newest = _newest(application)
        stored = dict(CalibrationRow.objects.filter(application=application).values_list("scope", "state"))
        if _newest(application) == newest:
            return newest, stored


def _log(application: Application, through: int) -> Iterator[JoinedEvent]:
    found: Iterator[JoinedEvent] = _events(application, after=0, through=through).iterator(chunk_size=EVENTS_AT_ONCE)
    return found


def _renewing(claimed: Learner, events: Iterable[JoinedEvent], now: datetime) -> Iterator[JoinedEvent]:
    """The events, and the lease with them: a long log takes longer than one lease."""
    started_s = time.monotonic()
    mine = Learner.objects.filter(pk=claimed.pk, owner=claimed.owner, fencing_number=claimed.fencing_number)
    for count, event in enumerate(events):
        if count % EVENTS_AT_ONCE == 0:
            mine.update(lease_expires_at=now + timedelta(seconds=time.monotonic() - started_s) + LEASE)
        yield event


def _replayed(events: Iterable[JoinedEvent]) -> _Learnt:
    learnt = _Learnt(VowpalWabbitPolicy(), Calibration())
    learnt.learn(events)
    return learnt
