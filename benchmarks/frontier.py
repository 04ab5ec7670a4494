"""A learner that is told which effects of *taste* the simulated worlds have and about how large, not their values.

No product could know this. It replaces Vowpal Wabbit in ours, so it shows what better learning from ratings could add
on top of the same calibrated prediction. It bounds nothing else: of timing, which decides in `queueing` and `table`, it
knows what our calibration knows; its standard deviations are alike in every world; and it is no upper bound in the
strict sense, since it goes by mean plus half a standard deviation and plans nothing. Kalman's filter over all effects.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from selector.interactions import Candidate, Context, Interaction
from selector.reward import QoeFormula

Floats = NDArray[np.float64]
MOST_EFFECTS = 12_000
NOISE_SD, OPTIMISM, LEAST_SHARE = 0.04, 0.5, 1e-4
Effect = tuple[tuple[str, ...], float, float]


class InformedPolicy:
    """Predicted QoE plus effects of group, class and device on each variant, and of device and time of day on what
    latency, accuracy and energy are worth."""

    def __init__(self, formulas: dict[str, QoeFormula]) -> None:
        self._formulas = formulas
        self._position: dict[tuple[str, ...], int] = {}
        self._mean, self._covariance = np.zeros(256), np.zeros((256, 256))

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> Floats:
        """Nearly all on the largest upper bound, shape (len(candidates),)."""
        scores = []
        for candidate in candidates:
            indices, row = self._design(context, candidate)
            variance = float(row @ self._covariance[np.ix_(indices, indices)] @ row)
            mean = candidate.prediction.qoe + float(row @ self._mean[indices])
            scores.append(mean + OPTIMISM * np.sqrt(max(variance, 0.0)))
        shares = np.full(len(scores), LEAST_SHARE / len(scores))
        shares[int(np.argmax(scores))] += 1.0 - LEAST_SHARE
        return np.asarray(shares / shares.sum())

    def learn(self, interaction: Interaction) -> None:
        """One step of the filter on reward less prediction."""
        candidate = interaction.candidates[interaction.chosen]
        indices, row = self._design(interaction.context, candidate)
        known = len(self._position)
        direction = self._covariance[:known, indices] @ row
        scale = float(direction[indices] @ row) + NOISE_SD**2
        surprise = interaction.reward - candidate.prediction.qoe - float(row @ self._mean[indices])
        self._mean[:known] += direction * (surprise / scale)
        self._covariance[:known, :known] -= np.outer(direction, direction) / scale

    def to_bytes(self) -> bytes:
        """For the protocol's sake; never loaded from elsewhere."""
        return pickle.dumps((self._formulas, self._position, self._mean, self._covariance))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """What ``to_bytes`` of this process wrote."""
        policy = cls({})
        policy._formulas, policy._position, policy._mean, policy._covariance = pickle.loads(data)
        return policy

    def _design(self, context: Context, candidate: Candidate) -> tuple[list[int], Floats]:
        effects = self._effects(context, candidate)
        return [self._place(name, sd) for name, sd, _ in effects], np.array([value for *_, value in effects])

    def _effects(self, context: Context, candidate: Candidate) -> tuple[Effect, ...]:
        """Names, prior standard deviations in QoE, and values."""
        formula, prediction = self._formulas[context.application], candidate.prediction
        floor = formula.accuracy_floor
        accuracy = max(candidate.action.variant.accuracy - floor, 0.0) / (1.0 - floor)
        energy = formula.energy_reference_cpu_ms / (formula.energy_reference_cpu_ms + prediction.cpu_ms_per_request)
        total = formula.weight_latency + formula.weight_accuracy + formula.weight_energy + formula.weight_rating
        share = formula.weight_rating / total
        variant, group = candidate.action.variant.name, str(context.features["group"])
        daypart = str(context.features["daypart"])
        return (
            (("group", group, variant), 0.12 * share, 1.0),
            (("class", context.device_class, variant), 0.15 * share, 1.0),
            (("device", context.device, variant), 0.06 * share, 1.0),
            (("accurate", context.device), 0.15 * share, accuracy - energy),
            (("fast", context.device), 0.2 * share, prediction.slo_hit_share - accuracy),
            (("daypart", daypart, group), 0.3 * share, accuracy - energy),
        )

    def _place(self, name: tuple[str, ...], sd: float) -> int:
        found = self._position.get(name)
        if found is not None:
            return found
        place = self._position[name] = len(self._position)
        if place >= len(self._mean):
            if place >= MOST_EFFECTS:
                raise MemoryError(f"more than {MOST_EFFECTS} effects: the frontier is for small fleets")
            self._grow()
        self._covariance[place, place] = sd**2
        return place

    def _grow(self) -> None:
        size = len(self._mean)
        mean, covariance = np.zeros(2 * size), np.zeros((2 * size, 2 * size))
        mean[:size], covariance[:size, :size] = self._mean, self._covariance
        self._mean, self._covariance = mean, covariance
