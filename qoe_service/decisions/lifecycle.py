"""The life of a decision as one table, and the moves between its states. Moves are conditional updates: racing is safe.

The diagram is in docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime, timedelta

from django.db.models import Q, QuerySet

from qoe_service.decisions.models import Decision
from qoe_service.fleet.models import Device

State = Decision.State

# From each state, the states that may follow; a state without followers is final.
TRANSITIONS: dict[State, frozenset[State]] = {
    State.PENDING: frozenset({State.ACTIVE, State.CLOSED, State.JOINED, State.NEVER_ACTIVE}),
    State.ACTIVE: frozenset({State.CLOSED, State.JOINED, State.DROPPED}),
    State.CLOSED: frozenset({State.JOINED, State.DROPPED}),
    State.JOINED: frozenset(),
    State.NEVER_ACTIVE: frozenset(),
    State.DROPPED: frozenset(),
}
OPEN = frozenset(state for state, followers in TRANSITIONS.items() if followers)
FINAL = frozenset(State) - OPEN


def sources_of(target: State) -> frozenset[State]:
    """The states from which ``target`` may be entered."""
    return frozenset(state for state, followers in TRANSITIONS.items() if target in followers)


def move(decision_ids: Collection[str], target: State, **changes: object) -> int:
    """Take those of the decisions that may go there to ``target``; how many went."""
    allowed = Decision.objects.filter(pk__in=decision_ids, state__in=sources_of(target))
    return allowed.update(state=target, **changes)


def activate(*, decision_id: str, device: Device, now: datetime) -> bool:
    """The device says that it serves the decision: pending becomes active. Whether this call changed that."""
    pending = Decision.objects.filter(pk=decision_id, device=device, state=State.PENDING)
    if not pending.update(state=State.ACTIVE, active_at=now):
        return False
    supersede(Decision.objects.filter(pk=decision_id))
    return True


def close(*, decision: Decision, active_s: float, now: datetime) -> bool:
    """The device says that the lease is over. Whether this call changed that."""
    started = decision.active_at or now - timedelta(seconds=active_s)
    if not move([decision.pk], State.CLOSED, closed_at=now, active_at=started):
        return False
    if decision.state == State.PENDING:
        supersede(Decision.objects.filter(pk=decision.pk))
    return True


def supersede(newer: QuerySet[Decision]) -> int:
    """Older decisions for the same device and application that are still pending will never become active."""
    older = _older_than(newer.values_list("device_id", "application_id", "decided_at"))
    return Decision.objects.filter(older, state=State.PENDING).update(state=State.NEVER_ACTIVE)


def _older_than(rows: Iterable[tuple[str, str, datetime]]) -> Q:
    older = Q(pk__in=())
    for device, application, decided_at in rows:
        older |= Q(device=device, application=application, decided_at__lt=decided_at)
    return older
