"""Policies that need no Vowpal Wabbit: references to beat, and what decides when no learnt policy can be
loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selector.interactions import Candidate, Context, Interaction
from selector.stored import LEAST_SHARE, Stored, mostly, uniform
from selector.validation import check_candidates, check_context, check_interaction, name, number

__all__ = [
    "LEAST_SHARE",
    "BaselinePolicy",
    "FixedPerClassPolicy",
    "FixedPolicy",
    "PredictionPolicy",
    "RandomPolicy",
]

Floats = NDArray[np.float64]


class RandomPolicy(Stored):
    """Every candidate alike."""

    kind = "random"

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> Floats:
        """Uniform, shape (len(candidates),)."""
        check_context(context)
        check_candidates(candidates)
        return uniform(len(candidates))

    def learn(self, interaction: Interaction) -> None:
        """Checks only; there is nothing to learn."""
        check_interaction(interaction)


class FixedPolicy(RandomPolicy):
    """One action wherever it is a candidate, else the first of ``fallbacks`` that is, else uniform.

    Given the action that turned out best, it is the best fixed action in hindsight.
    """

    kind = "fixed"

    def __init__(self, action: str, fallbacks: Sequence[str] = ()) -> None:
        self._wanted = tuple(name("action", each) for each in (action, *fallbacks))

    def state(self) -> dict[str, Any]:
        """Keys of the action and its fallbacks."""
        return {"action": self._wanted[0], "fallbacks": list(self._wanted[1:])}

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> Floats:
        """Nearly all on the action; strictly positive elsewhere."""
        check_context(context)
        check_candidates(candidates)
        return _first_of(self._wanted, candidates)


class FixedPerClassPolicy(RandomPolicy):
    """One action for each device class: the first of its list that is a candidate; ``otherwise`` for the rest.

    Given the actions that turned out best, it is the best fixed action per class in hindsight.
    """

    kind = "fixed_per_class"

    def __init__(self, actions: Mapping[str, Sequence[str]], otherwise: Sequence[str] = ()) -> None:
        self._actions = {
            name("device_class", group): tuple(name("action", each) for each in wanted)
            for group, wanted in actions.items()
        }
        self._otherwise = tuple(name("otherwise", each) for each in otherwise)

    def state(self) -> dict[str, Any]:
        """Keys of the actions by class, in order of preference."""
        return {
            "actions": {group: list(wanted) for group, wanted in self._actions.items()},
            "otherwise": list(self._otherwise),
        }

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> Floats:
        """Nearly all on the class's action; uniform where none of its actions is a candidate."""
        check_context(context)
        check_candidates(candidates)
        return _first_of((*self._actions.get(context.device_class, ()), *self._otherwise), candidates)


class PredictionPolicy(RandomPolicy):
    """The best predicted QoE, nearly always: what the analytic model alone would do."""

    kind = "prediction"

    def __init__(self, epsilon: float = LEAST_SHARE) -> None:
        self._epsilon = number("epsilon", epsilon, LEAST_SHARE, 1)

    def state(self) -> dict[str, Any]:
        """The share left to chance."""
        return {"epsilon": self._epsilon}

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> Floats:
        """Epsilon-greedy on the predicted QoE; ties go to the first."""
        check_context(context)
        check_candidates(candidates)
        best = int(np.argmax([candidate.prediction.qoe for candidate in candidates]))
        return mostly(best, len(candidates), self._epsilon)


class BaselinePolicy(PredictionPolicy):
    """The context's safe baseline wherever it is a candidate, else the best prediction. For when no learnt policy
    can be trusted."""

    kind = "baseline"

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> Floats:
        """Nearly all on the baseline; strictly positive elsewhere."""
        keys = [candidate.action.key for candidate in candidates]
        shares = super().probabilities(context, candidates)
        return mostly(keys.index(context.baseline), len(keys), self._epsilon) if context.baseline in keys else shares


def _first_of(wanted: Sequence[str], candidates: Sequence[Candidate]) -> Floats:
    keys = [candidate.action.key for candidate in candidates]
    for key in wanted:
        if key in keys:
            return mostly(keys.index(key), len(keys), LEAST_SHARE)
    return uniform(len(keys))
