"""Takes in feedback about decisions, from devices and apps: who may report, what counts once, what is late or lost.

What feedback becomes is in joining.py; its two doors are named here too, because callers think of them as feedback.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from django.conf import settings
from django.db import transaction
from django.db.models import Count

from device_agents import wire
from qoe_service.decisions import lifecycle
from qoe_service.decisions.folding import APP, DEVICE
from qoe_service.decisions.joining import close_due, report_failure
from qoe_service.decisions.models import Decision, Feedback, Orphan
from qoe_service.errors import InvalidInput, NotPermitted, ServiceError, TooManyRequests
from qoe_service.fleet.models import ApplicationKey, Device

__all__ = ["ApplicationAuthor", "Author", "DeviceAuthor", "accept", "accept_one", "close_due", "report_failure"]

logger = logging.getLogger(__name__)
QUOTA_RETRY_AFTER_S = 60
ORPHANS_KEPT = 10_000


@dataclass(frozen=True, slots=True)
class DeviceAuthor:
    """A device reports about its own decisions."""

    device: Device
    source = DEVICE

    @property
    def label(self) -> str:
        """Who it is, for the operator."""
        return f"device:{self.device.pk}"

    def owns(self, decision: Decision) -> bool:
        """Whether the decision was made for this device."""
        return decision.device_id == self.device.pk


@dataclass(frozen=True, slots=True)
class ApplicationAuthor:
    """An app reports about decisions of the application that its key is for."""

    key: ApplicationKey
    source = APP

    @property
    def label(self) -> str:
        """Who it is, for the operator."""
        return f"app:{self.key.application}:{self.key.pk}"

    def owns(self, decision: Decision) -> bool:
        """Whether the decision belongs to the key's application."""
        return decision.application_id == self.key.application


Author = DeviceAuthor | ApplicationAuthor
_Status = wire.FeedbackStatus
_Taken = tuple[wire.FeedbackResult, ServiceError | None]


@dataclass(slots=True)
class _Known:
    """What the database knows about the decisions of one batch, and what this batch adds."""

    decisions: dict[str, Decision]
    seen: set[tuple[str, str]]
    # By decision and lease_closed: ratings that pass through the device never use up the room for its own report.
    counts: Counter[tuple[str, bool]]


def accept(*, items: Sequence[wire.Feedback], author: Author, now: datetime) -> list[wire.FeedbackResult]:
    """Store what is new about the author's own decisions; one result per item, in order. Sending again does nothing."""
    taken = _take(items, author, now)
    _log(taken, author)
    return [result for result, _ in taken]


def accept_one(*, item: wire.Feedback, author: Author, now: datetime) -> wire.FeedbackResult:
    """The same for one item; what is rejected raises, and whoever answers the error logs it."""
    taken = _take([item], author, now)
    [(result, error)] = taken
    if error is not None:
        raise error
    _log(taken, author)
    return result


def _take(items: Sequence[wire.Feedback], author: Author, now: datetime) -> list[_Taken]:
    with transaction.atomic():
        known = _look_up(items, author)
        judged = [(item, *_judge(item, author, known)) for item in items]
        _store(judged, author, known, now)
    return [
        (wire.FeedbackResult(id=item.id, status=status, detail=error.detail if error else ""), error)
        for item, status, error in judged
    ]


def _look_up(items: Sequence[wire.Feedback], author: Author) -> _Known:
    """Three queries, whatever the number of items. The locks keep the join from closing a decision in between."""
    ids = {item.decision_id for item in items}
    locked = Decision.objects.select_for_update().filter(pk__in=ids).order_by("pk")
    decisions = {each.pk: each for each in locked.only("device_id", "application_id", "state", "active_at")}
    rows = Feedback.objects.filter(decision__in=decisions, source=author.source).order_by()
    # Rows from before senders were kept have none.
    mine = rows.filter(sender__in=("", author.label), feedback_id__in={item.id for item in items})
    seen = set(mine.values_list("decision_id", "feedback_id"))
    counts = rows.values_list("decision_id", "lease_closed").annotate(Count("pk"))
    return _Known(decisions, seen, Counter({(pk, closed): count for pk, closed, count in counts}))


def _judge(item: wire.Feedback, author: Author, known: _Known) -> tuple[wire.FeedbackStatus, ServiceError | None]:
    decision = known.decisions.get(item.decision_id)
    if decision is None:
        return _Status.ORPHAN, None
    if not author.owns(decision):
        return _Status.REJECTED, NotPermitted("the decision belongs to somebody else", field="decision_id")
    if (item.decision_id, item.id) in known.seen:
        return _Status.DUPLICATE, None
    error = _fault(item, author)
    kind = (decision.pk, item.lease_closed)
    if error is None and known.counts[kind] >= settings.FEEDBACK_PER_DECISION:
        error = TooManyRequests(
            f"a decision takes {settings.FEEDBACK_PER_DECISION} reports",
            field="decision_id",
            retry_after_s=QUOTA_RETRY_AFTER_S,
        )
    if error is not None:
        return _Status.REJECTED, error
    known.seen.add((item.decision_id, item.id))
    known.counts[kind] += 1
    return (_Status.LATE if decision.state in lifecycle.FINAL else _Status.ACCEPTED), None


def _fault(item: wire.Feedback, author: Author) -> ServiceError | None:
    """What the shapes of the wire cannot say."""
    if item.lease_closed and author.source != DEVICE:
        return NotPermitted("only the device closes a lease", field="lease_closed")
    if item.components is None and item.rating is None and not item.lease_closed:
        return InvalidInput("must have components, a rating or lease_closed", field="components")
    return None


_Judged = tuple[wire.Feedback, wire.FeedbackStatus, ServiceError | None]


def _store(judged: Sequence[_Judged], author: Author, known: _Known, now: datetime) -> None:
    stored = {_Status.ACCEPTED, _Status.LATE}
    Feedback.objects.bulk_create(
        [_row(item, author, status, now) for item, status, _ in judged if status in stored], ignore_conflicts=True
    )
    _store_orphans([_orphan(item, author, now) for item, status, _ in judged if status is _Status.ORPHAN])
    for item, status, _ in judged:
        if item.lease_closed and status is _Status.ACCEPTED:
            lifecycle.close(decision=known.decisions[item.decision_id], active_s=item.active_s, now=now)


def _store_orphans(orphans: Sequence[Orphan]) -> None:
    """Keep the newest: whoever sends orphans without end must not fill the database."""
    if not orphans:
        return
    Orphan.objects.bulk_create(orphans, ignore_conflicts=True)
    last = Orphan.objects.order_by("-pk").values_list("pk", flat=True)[ORPHANS_KEPT:].first()
    if last is not None:
        Orphan.objects.filter(pk__lte=last).delete()


def _row(item: wire.Feedback, author: Author, status: wire.FeedbackStatus, now: datetime) -> Feedback:
    components = None if item.components is None else item.components.model_dump(mode="json", exclude_defaults=True)
    return Feedback(
        feedback_id=item.id,
        decision_id=item.decision_id,
        source=author.source,
        sender=author.label,
        components=components,
        rating=item.rating,
        lease_closed=item.lease_closed,
        overridden=item.overridden and item.lease_closed,
        active_s=item.active_s,
        controller_version=item.controller_version,
        is_late=status is _Status.LATE,
        observed_at=item.observed_at,
        received_at=now,
    )


def _orphan(item: wire.Feedback, author: Author, now: datetime) -> Orphan:
    return Orphan(feedback_id=item.id, decision_id=item.decision_id, source=author.label, received_at=now)


def _log(taken: Sequence[_Taken], author: Author) -> None:
    """One line per batch, and only when an operator may have to act."""
    counts = Counter(result.status for result, _ in taken)
    if counts[_Status.REJECTED] or counts[_Status.ORPHAN]:
        details = sorted({error.detail for _, error in taken if error is not None})
        logger.warning(
            "feedback refused author=%s rejected=%d orphans=%d details=%s",
            author.label,
            counts[_Status.REJECTED],
            counts[_Status.ORPHAN],
            "; ".join(details),
        )
