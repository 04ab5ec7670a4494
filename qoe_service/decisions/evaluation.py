"""What the log says: the verdict on the bandit, QoE over time, and why a decision was made. Reads, changes nothing."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from qoe_service.catalogue.models import Application
from qoe_service.decisions.models import Decision, Feedback, JoinedEvent
from qoe_service.decisions.record import evidence_of
from selector import verdict as selector_verdict
from selector.errors import InvalidInput
from selector.estimators import Estimate
from selector.interactions import Candidate, Interaction
from selector.records import candidates_from_record

# The verdict is about the newest decisions of a long log: what it costs is bounded, and what it says is about now.
EVENTS_JUDGED = 20_000
# A long log is not judged anew for each of its events: so small a share of it may wait so long.
MINOR_SHARE = 0.005
MINOR_FOR = timedelta(seconds=10)
REFERENCES = ("uniform", "best_fixed")
ESTIMATES = ("qoe", "uniform", "best_fixed", "lift_over_uniform", "lift_over_best_fixed")
_EVIDENCE = ("application", "number", "measurement", "reward", "decision__device", "decision__application")
_RECORDS = ("decision__context", "decision__candidates", "decision__chosen")


@dataclass(frozen=True, slots=True)
class ApplicationVerdict:
    """The selector's verdict over the newest EVENTS_JUDGED joined decisions of an application, and how much feedback
    the application ever had."""

    application: str
    at: datetime
    verdict: selector_verdict.Verdict
    feedback: int

    def estimate(self, name: str) -> Estimate | None:
        """One of ESTIMATES; None where there is not enough evidence for an interval."""
        found: Estimate | None = getattr(self.verdict, name)
        return found if found is not None and math.isfinite(found.high - found.low) else None

    def as_json(self) -> dict[str, Any]:
        """What ``manage.py verdict --json`` prints."""
        estimates: dict[str, Any] = {}
        for name in ESTIMATES:
            found = self.estimate(name)
            estimates[name] = found and {"mean": found.mean, "low": found.low, "high": found.high}
        return estimates | {
            "slo_violation_share": self.verdict.slo_violation_share,
            "decisions": self.verdict.decisions,
            "feedback": self.feedback,
        }


@dataclass(frozen=True, slots=True)
class QoePoint:
    """Mean reward of the decisions that were joined in one stretch of time, which begins at ``at``."""

    at: datetime
    mean: float
    count: int


@dataclass(frozen=True, slots=True)
class QoeOverTime:
    """A curve with its references; a reference is None without evidence."""

    points: tuple[QoePoint, ...]
    uniform: float | None
    best_fixed: float | None


@dataclass(slots=True)
class _Log:
    """The newest evidence of one application that this process has read, and the verdict as of ``judged_number``."""

    number: int = 0
    decision_id: str = ""
    evidence: list[Interaction] = field(default_factory=list)
    verdict: selector_verdict.Verdict | None = None
    judged_number: int = 0
    judged_at: datetime | None = None

    def is_fresh(self, now: datetime) -> bool:
        """Whether the last verdict may stand: nothing new, or so little and so recently that it cannot have moved."""
        if self.verdict is None or self.judged_at is None:
            return False
        new = self.number - self.judged_number
        return new == 0 or (new <= MINOR_SHARE * len(self.evidence) and now - self.judged_at < MINOR_FOR)


_logs: dict[str, _Log] = {}
_reading = threading.Lock()


def verdict(*, application: Application, now: datetime) -> ApplicationVerdict:
    """Mean QoE now, against the best fixed action and against uniform choice. Reads only what this process has not."""
    with _reading:
        log = _read(application)
        if log.verdict is None or not log.is_fresh(now):
            log.verdict = selector_verdict.verdict(log.evidence)
            log.judged_number, log.judged_at = log.number, now
        found = log.verdict
    feedback = Feedback.objects.filter(decision__application=application).count()
    return ApplicationVerdict(application.pk, now, found, feedback)


def _read(application: Application) -> _Log:
    log = _logs.setdefault(application.pk, _Log())
    events = JoinedEvent.objects.filter(application=application)
    # A database that was restored or emptied has another log under the same numbers.
    if log.number and not events.filter(number=log.number, decision=log.decision_id).exists():
        log = _logs[application.pk] = _Log()
    last = events.filter(number__gt=log.number).order_by("-number").values_list("number", "decision").first()
    if last is not None:
        new = events.filter(number__gt=max(log.number, last[0] - EVENTS_JUDGED), number__lte=last[0])
        rows = new.select_related("decision").only(*_EVIDENCE, *_RECORDS).order_by("number")
        log.evidence += evidence_of(rows.iterator(chunk_size=200))
        del log.evidence[:-EVENTS_JUDGED]
        log.number, log.decision_id = last
    return log


def qoe_over_time(
    *, application: Application, now: datetime, window: timedelta | None = None, buckets: int = 60
) -> QoeOverTime:
    """Mean reward in equal stretches of the window, which begins with the log unless given; empty ones are left out."""
    rows = JoinedEvent.objects.filter(application=application)
    if window is not None:
        rows = rows.filter(joined_at__gte=now - window)
    first = rows.order_by("number").values_list("joined_at", flat=True).first()
    found = verdict(application=application, now=now)
    references = {name: estimate.mean if (estimate := found.estimate(name)) else None for name in REFERENCES}
    if first is None:
        return QoeOverTime((), **references)
    start = now - window if window is not None else first
    width = max((now - start) / buckets, timedelta(seconds=1))
    sums, counts = [0.0] * buckets, [0] * buckets
    for joined_at, reward in rows.order_by("number").values_list("joined_at", "reward").iterator():
        bucket = min(max(int((joined_at - start) / width), 0), buckets - 1)
        sums[bucket] += reward
        counts[bucket] += 1
    known = [index for index in range(buckets) if counts[index]]
    points = (QoePoint(start + index * width, sums[index] / counts[index], counts[index]) for index in known)
    return QoeOverTime(tuple(points), **references)


@dataclass(frozen=True, slots=True)
class Explanation:
    """One candidate of a decision, for people: the likeliest first, then by predicted QoE."""

    candidate: Candidate
    is_chosen: bool


def explain(*, decision: Decision) -> list[Explanation]:
    """Why this one: every candidate with probability, prediction and mask reasons; empty for an unreadable record."""
    try:
        candidates = candidates_from_record(decision.candidates)
    except InvalidInput:
        return []
    rows = [Explanation(candidate, index == decision.chosen) for index, candidate in enumerate(candidates)]
    return sorted(rows, key=lambda row: (-row.candidate.probability, -row.candidate.prediction.qoe))
