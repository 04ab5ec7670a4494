"""Values for the selector's tests: valid by default, every part can be replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from selector.calibration import Calibration
from selector.interactions import (
    Action,
    Candidate,
    Configuration,
    Context,
    Interaction,
    Measurement,
    Prediction,
    Profile,
    Ranking,
    Variant,
)
from selector.policy import Policy
from selector.ranking import Exploration, rank
from selector.reward import QoeFormula


def variant(number: int = 0, **changes: Any) -> Variant:
    made = Variant(f"{number:02x}" * 32, f"variant-{number}", 4_000_000 // (number + 1), 0.95 - 0.01 * number)
    return replace(made, **changes)


def action(number: int = 0, batch: int = 1, concurrency: int = 1, threads: int = 1, **changes: Any) -> Action:
    return Action(variant(number, **changes), Configuration(batch, concurrency, threads))


def grid(
    variants: int = 3, batches: Sequence[int] = (1, 4), concurrencies: Sequence[int] = (1, 2)
) -> tuple[Action, ...]:
    return tuple(action(v, b, c) for v in range(variants) for b in batches for c in concurrencies)


def context(**changes: Any) -> Context:
    made = Context("device-1", "pi4", "digits", 10.0, 60.0, cores=4, memory_free_bytes=10**9)
    return replace(made, **changes)


def prediction(qoe: float = 0.7, **changes: Any) -> Prediction:
    made = Prediction(10.0, 20.0, 0.2, 5.0, 0.05, qoe, 8.0, slo_hit_share=0.9)
    return replace(made, **changes)


def candidate(number: int = 0, qoe: float = 0.7, probability: float = 0.5, **changes: Any) -> Candidate:
    made = Candidate(action(number), prediction(qoe), shortlisted=True, probability=probability)
    return replace(made, **changes)


def candidates(*qoe: float) -> tuple[Candidate, ...]:
    return tuple(candidate(number, each, 1 / len(qoe)) for number, each in enumerate(qoe))


def interaction(**changes: Any) -> Interaction:
    made = Interaction("decision-1", context(), candidates(0.7, 0.6), 0, Measurement(requests=100), 0.5)
    return replace(made, **changes)


def profiles(variants: int = 3, source: str = "device", factor: float = 1.0) -> tuple[Profile, ...]:
    return tuple(
        Profile(variant(number).digest, 1, factor * 8.0 / (number + 1), factor * 2.0, source=source)
        for number in range(variants)
    )


def ranked(decision_id: str = "decision-1", policy: Policy | None = None, **changes: Any) -> Ranking:
    arguments: dict[str, Any] = {
        "context": context(),
        "actions": grid(),
        "profiles": profiles(),
        "calibration": Calibration(),
        "formula": QoeFormula(slo_p95_ms=60.0),
        "policy_version": 3,
        "best_fixed": None,
        "exploration": Exploration(),
        "bans": {},
    }
    return rank(decision_id=decision_id, policy=policy, **{**arguments, **changes})


def closed(
    ranking: Ranking, situation: Context, measurement: Measurement, reward: float, decision_id: str
) -> Interaction:
    return Interaction(decision_id, situation, ranking.candidates, ranking.chosen, measurement, reward)
