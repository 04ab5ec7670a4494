"""Reads what the Decision page shows: why this one, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from qoe_service.decisions.evaluation import explain
from qoe_service.decisions.models import Decision, Feedback, JoinedEvent, PolicyVersion
from qoe_service.rollouts.models import AttemptOutcome
from selector.interactions import Candidate
from web.context_lines import context_lines
from web.formatting import configuration, decimal

KINDS = {
    "exploit": ("Policy", "drawn from the learnt policy's distribution over its shortlist"),
    "uniform": ("Exploration", "drawn uniformly over all feasible actions, so that the policy keeps learning"),
    "holdout_uniform": ("Holdout, uniform", "kept out of the policy's hands as the uniform reference"),
    "holdout_best_fixed": ("Holdout, best fixed", "kept out of the policy's hands as the best-fixed reference"),
}
_TABLE_ROWS = 12


@dataclass(frozen=True, slots=True)
class CandidateRow:
    """One candidate; the bar is drawn against the likeliest."""

    candidate: Candidate
    is_chosen: bool
    bar: float

    @property
    def key(self) -> str:
        """The action's stable identity."""
        return self.candidate.action.key

    @property
    def name(self) -> str:
        """The action in words."""
        return f"{self.candidate.action.variant.name}, {configuration(self.configuration)}"

    @property
    def configuration(self) -> Mapping[str, Any]:
        """The configuration as a record."""
        return asdict(self.candidate.action.configuration)


@dataclass(frozen=True, slots=True)
class Moment:
    """One moment in the decision's life."""

    title: str
    at: datetime | None
    note: str
    is_bad: bool = False


@dataclass(frozen=True, slots=True)
class Comparison:
    """One quantity as predicted and as measured."""

    name: str
    unit: str
    predicted: float | None
    measured: float | None


@dataclass(frozen=True, slots=True)
class DecisionDetail:
    """All parts of the page."""

    decision: Decision
    candidates: Sequence[CandidateRow]
    joined: JoinedEvent | None
    feedback: Sequence[Feedback]
    moments: Sequence[Moment]
    previous_id: str | None
    next_id: str | None

    @property
    def chosen(self) -> CandidateRow | None:
        """The candidate that was drawn."""
        return next((each for each in self.candidates if each.is_chosen), None)

    @property
    def leading(self) -> Sequence[CandidateRow]:
        """The candidates that stand in the table at once: the likeliest, and always the chosen one."""
        return [each for place, each in enumerate(self.candidates) if place < _TABLE_ROWS or each.is_chosen]

    @property
    def others(self) -> Sequence[CandidateRow]:
        """The rest, behind a fold."""
        return [each for each in self.candidates[_TABLE_ROWS:] if not each.is_chosen]

    @property
    def kind(self) -> tuple[str, str]:
        """The kind in words, and what it means."""
        return KINDS.get(self.decision.kind, (self.decision.kind.replace("_", " "), ""))

    @property
    def shortlisted(self) -> int:
        """How many the policy ranked."""
        return sum(each.candidate.shortlisted for each in self.candidates)

    @property
    def feasible(self) -> int:
        """How many no hard mask forbids."""
        return sum(each.candidate.is_feasible for each in self.candidates)

    @property
    def is_final(self) -> bool:
        """Whether it ended without a reward."""
        return self.decision.state in {Decision.State.NEVER_ACTIVE, Decision.State.DROPPED}

    @property
    def comparisons(self) -> Sequence[Comparison]:
        """Predictions of the chosen action beside what the lease measured."""
        if self.chosen is None:
            return []
        predicted = self.chosen.candidate.prediction
        measured: Mapping[str, Any] = self.joined.measurement if self.joined else {}
        hit = measured.get("slo_hit_share")
        return [
            Comparison("p50 latency", "ms", predicted.p50_ms, measured.get("p50_ms")),
            Comparison("p95 latency", "ms", predicted.p95_ms, measured.get("p95_ms")),
            Comparison("Service time", "ms", predicted.service_ms, measured.get("service_ms")),
            Comparison("CPU per request", "ms", predicted.cpu_ms_per_request, measured.get("cpu_ms_per_request")),
            Comparison(
                "SLO violations", "share", predicted.slo_violation_probability, None if hit is None else 1 - hit
            ),
            Comparison("QoE", "qoe", predicted.qoe, self.joined.reward if self.joined else None),
        ]

    @property
    def standing(self) -> str:
        """In one sentence, how the chosen action stood among the feasible ones."""
        chosen = self.chosen
        if chosen is None:
            return ""
        feasible = sorted(each.candidate.prediction.qoe for each in self.candidates if each.candidate.is_feasible)
        better = sum(qoe > chosen.candidate.prediction.qoe for qoe in feasible)
        place = "the highest" if not better else f"number {better + 1}"
        best = "" if not better else f"; the highest is {decimal(feasible[-1])}"
        predicted = decimal(chosen.candidate.prediction.qoe)
        return f"Its predicted QoE of {predicted} is {place} of {len(feasible)} feasible actions{best}."

    @property
    def context_lines(self) -> Sequence[tuple[str, str]]:
        """What was known when deciding, one line each; what was empty is left out."""
        return context_lines(self.decision.context, {each.key: each.name for each in self.candidates})


def decision_detail(*, decision: Decision) -> DecisionDetail:
    """The page of one decision, in a fixed number of queries."""
    explained = explain(decision=decision)
    top = max((each.candidate.probability for each in explained), default=0) or 1
    joined = JoinedEvent.objects.filter(decision=decision).first()
    outcomes = AttemptOutcome.objects.filter(device=decision.device_id, decision_id=decision.id).order_by("at")
    siblings = Decision.objects.filter(device=decision.device_id, application=decision.application_id)
    before = siblings.filter(decided_at__lt=decision.decided_at).order_by("-decided_at").values_list("id", flat=True)
    after = siblings.filter(decided_at__gt=decision.decided_at).order_by("decided_at").values_list("id", flat=True)
    return DecisionDetail(
        decision=decision,
        candidates=[
            CandidateRow(each.candidate, each.is_chosen, each.candidate.probability / top) for each in explained
        ],
        joined=joined,
        feedback=list(Feedback.objects.filter(decision=decision).order_by("-received_at")[:50]),
        moments=_moments(decision, list(outcomes), joined),
        previous_id=before.first(),
        next_id=after.first(),
    )


def _moments(decision: Decision, outcomes: Sequence[AttemptOutcome], joined: JoinedEvent | None) -> list[Moment]:
    moments = [Moment("Decided", decision.decided_at, f"because of {decision.reason.replace('_', ' ')}")]
    moments += [_outcome_moment(each) for each in outcomes]
    if decision.active_at:
        moments.append(Moment("Active on the device", decision.active_at, "the lease clock started"))
    if decision.closed_at:
        moments.append(Moment("Lease closed", decision.closed_at, "the device reported its measurements"))
    if joined:
        moments.append(Moment("Became a reward", joined.joined_at, f"event {joined.number} of the log"))
        moments += _learnt(decision, joined)
    return sorted(moments, key=lambda each: each.at or decision.decided_at)


def _outcome_moment(outcome: AttemptOutcome) -> Moment:
    good = outcome.outcome in {"committed", "already_running"}
    note = outcome.reason or (f"swapped in {outcome.swap_ms:.0f} ms" if outcome.swap_ms else "")
    return Moment(outcome.outcome.replace("_", " ").capitalize(), outcome.at, note, is_bad=not good)


def _learnt(decision: Decision, joined: JoinedEvent) -> list[Moment]:
    later = PolicyVersion.objects.filter(application=decision.application_id, trained_through__gte=joined.number)
    policy = later.order_by("number").values("number", "created_at").first()
    return [Moment("Learnt", policy["created_at"], f"first in policy version {policy['number']}")] if policy else []
