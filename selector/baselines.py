"""Policies that need no Vowpal Wabbit: references to beat, and what decides when no learnt policy can be
loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from selector.errors import CorruptPolicy, InvalidInput
from selector.interactions import Candidate, Context, Interaction
from selector.validation import check_candidates, check_context, check_interaction, name, number

Floats = NDArray[np.float64]
LEAST_SHARE = 1e-3


class _Stored:
    """Bytes of a policy whose state is JSON: kind, state and a digest over both."""

    kind: ClassVar[str] = ""

    def state(self) -> dict[str, Any]:
        """JSON-able; whatever ``from_state`` needs."""
        return {}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """The policy in this state."""
        return cls(**state)

    def to_bytes(self) -> bytes:
        """The state as canonical JSON under its SHA-256."""
        body = json.dumps({"kind": self.kind, "state": self.state()}, sort_keys=True).encode()
        return hashlib.sha256(body).hexdigest().encode() + b"\n" + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises CorruptPolicy for anything but the bytes that ``to_bytes`` of this kind wrote."""
        digest, _, body = data.partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != digest:
            raise CorruptPolicy(f"{cls.kind} policy does not match its digest")
        try:
            stored = json.loads(body)
            if stored["kind"] != cls.kind:
                raise CorruptPolicy(f"is a {stored['kind']} policy, not {cls.kind}")
            return cls.from_state(stored["state"])
        except (ValueError, KeyError, TypeError, AttributeError, InvalidInput) as error:
            raise CorruptPolicy(f"{cls.kind} policy cannot be read: {error!r}") from error


def _uniform(count: int) -> Floats:
    return np.full(count, 1.0 / count)


def _mostly(best: int, count: int, epsilon: float) -> Floats:
    shares = epsilon * _uniform(count)
    shares[best] += 1.0 - epsilon
    return shares


class RandomPolicy(_Stored):
    """Every candidate alike."""

    kind = "random"

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> Floats:
        """Uniform, shape (len(candidates),)."""
        check_context(context)
        check_candidates(candidates)
        return _uniform(len(candidates))

    def learn(self, interaction: Interaction) -> None:
        """Checks only; there is nothing to learn."""
        check_interaction(interaction)


class FixedPolicy(RandomPolicy):
    """One action wherever it is a candidate, else uniform."""

    kind = "fixed"

    def __init__(self, action: str) -> None:
        self._action = name("action", action)

    def state(self) -> dict[str, Any]:
        """The action's key."""
        return {"action": self._action}

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> Floats:
        """Nearly all on the action; strictly positive elsewhere."""
        check_context(context)
        check_candidates(candidates)
        keys = [candidate.action.key for candidate in candidates]
        if self._action not in keys:
            return _uniform(len(keys))
        return _mostly(keys.index(self._action), len(keys), LEAST_SHARE)


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
        return _mostly(best, len(candidates), self._epsilon)


class BaselinePolicy(PredictionPolicy):
    """The context's safe baseline wherever it is a candidate, else the best prediction. For when no learnt policy
    can be trusted."""

    kind = "baseline"

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> Floats:
        """Nearly all on the baseline; strictly positive elsewhere."""
        keys = [candidate.action.key for candidate in candidates]
        shares = super().probabilities(context, candidates)
        return _mostly(keys.index(context.baseline), len(keys), self._epsilon) if context.baseline in keys else shares


class EpsilonGreedyPolicy(RandomPolicy):
    """Running mean reward per (device class, action); actions never tried there count as ``optimism``."""

    kind = "epsilon_greedy"

    def __init__(self, epsilon: float = 0.1, optimism: float = 0.5) -> None:
        self._epsilon = number("epsilon", epsilon, LEAST_SHARE, 1)
        self._optimism = number("optimism", optimism, 0, 1)
        self._means: dict[str, dict[str, tuple[int, float]]] = {}

    def state(self) -> dict[str, Any]:
        """Settings, and count and mean by class and action."""
        means = {group: {key: list(mean) for key, mean in each.items()} for group, each in self._means.items()}
        return {"epsilon": self._epsilon, "optimism": self._optimism, "means": means}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """Checks every mean."""
        policy = cls(state["epsilon"], state["optimism"])
        for group, means in state["means"].items():
            policy._means[group] = {
                key: (int(number("count", count, 1, 1e15)), number("mean", mean, 0, 1))
                for key, (count, mean) in means.items()
            }
        return policy

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> Floats:
        """Epsilon-greedy on the means of the device's class; ties go to the best prediction."""
        check_context(context)
        check_candidates(candidates)
        means = self._means.get(context.device_class, {})
        scores = [
            (means.get(candidate.action.key, (0, self._optimism))[1], candidate.prediction.qoe)
            for candidate in candidates
        ]
        return _mostly(scores.index(max(scores)), len(candidates), self._epsilon)

    def learn(self, interaction: Interaction) -> None:
        """Moves the mean of the chosen action in its class."""
        check_interaction(interaction)
        means = self._means.setdefault(interaction.context.device_class, {})
        key = interaction.candidates[interaction.chosen].action.key
        count, mean = means.get(key, (0, 0.0))
        means[key] = (count + 1, mean + (interaction.reward - mean) / (count + 1))
