"""How a worker becomes, stays and stops being the one runner of a row of Work. What the work is, is not known here.

The database is the queue of record: a row whose runner shows no life is claimed by another, a bounded number of times,
and what a former runner still writes is ignored, because its fencing number (``attempts``) is not the row's any more.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, TypeVar

from django.db import transaction
from django.db.models import F, Q, QuerySet

from qoe_service.catalogue.models import Work

STALE_AFTER = timedelta(seconds=15)
MAX_ATTEMPTS = 3
W = TypeVar("W", bound=Work)


def claimable(now: datetime) -> Q:
    """Rows that somebody may start, or take over."""
    return Q(state=Work.State.QUEUED) | (_is_stale(now) & Q(attempts__lt=MAX_ATTEMPTS))


def running(rows: QuerySet[W], now: datetime) -> int:
    """How many of these rows have a live runner."""
    return rows.filter(state=Work.State.RUNNING, heartbeat_at__gte=now - STALE_AFTER).count()


def give_up(rows: QuerySet[W], now: datetime) -> None:
    """End the rows whose runners died too often."""
    rows.filter(_is_stale(now), attempts__gte=MAX_ATTEMPTS).update(
        state=Work.State.FAILED, finished_at=now, error=f"its runner died {MAX_ATTEMPTS} times; see the worker's log"
    )


def claim(rows: QuerySet[W], now: datetime, *, at_once: int) -> W | None:
    """Become the runner of the one row in ``rows``; None when it is not to be had, or ``at_once`` others run."""
    with transaction.atomic():
        if running(rows.model._default_manager.all(), now) >= at_once:
            return None
        claimed = rows.filter(claimable(now)).update(
            state=Work.State.RUNNING, attempts=F("attempts") + 1, heartbeat_at=now, progress=0
        )
        return rows.get() if claimed else None


def beat(row: Work, *, progress: float, now: datetime) -> bool:
    """Report life and progress. False: the row was cancelled or taken over, so stop."""
    return bool(_mine(row).update(heartbeat_at=now, progress=progress))


def finish(row: Work, *, state: str, now: datetime, error: str = "", **fields: Any) -> bool:
    """End a row, unless it is no longer ours."""
    progress = 1.0 if state == Work.State.DONE else F("progress")
    return bool(_mine(row).update(state=state, error=error, progress=progress, finished_at=now, **fields))


def cancel(rows: QuerySet[W], now: datetime, *, error: str = "") -> int:
    """Stop those that wait or run; their runners notice within a second. How many that were."""
    return rows.filter(state__in=Work.OPEN_STATES).update(state=Work.State.CANCELLED, finished_at=now, error=error)


def _mine(row: W) -> QuerySet[W]:
    same: QuerySet[W] = type(row)._default_manager.filter(pk=row.pk)
    return same.filter(state=Work.State.RUNNING, attempts=row.attempts)


def _is_stale(now: datetime) -> Q:
    return Q(state=Work.State.RUNNING, heartbeat_at__lt=now - STALE_AFTER)
