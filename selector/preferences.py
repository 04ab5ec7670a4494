"""The prediction corrected by what users turned out to value, without Vowpal Wabbit: an ablation, and a policy that
explains itself.

The declared weights of the QoE formula are the prior; what is learnt is how far the users of one device weigh its
terms differently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from selector.interactions import Candidate, Context, Interaction
from selector.reward import QoeFormula
from selector.stored import LEAST_SHARE, Stored, mostly
from selector.validation import check_candidates, check_context, check_interaction, number

Floats = NDArray[np.float64]

TERMS = ("latency", "accuracy", "energy")
# Standard deviation of a weight's correction before anything is known: of the application's users, of those of its
# devices of one class, of those of one device.
PRIOR_SD = (0.10, 0.10, 0.20)
OUTLIER_Z = 3.0


class PreferencePolicy(Stored):
    """Best predicted QoE plus a learnt correction that is linear in the QoE terms.

    The correction is the sum of three linear functions of (1, latency term, accuracy term, energy term): of the
    application, of the device class in it, of the device in it. Recursive least squares moves them all at once, each by
    its uncertainty, so that a device is shrunk towards its class and the class towards the application (West &
    Harrison, *Bayesian Forecasting and Dynamic Models*, ch. 16). ``formulas`` are the declared ones by application:
    with them the reward is explained by the terms that were measured, without by those that were predicted.
    ``noise_sd`` is the standard deviation of one reward, ``drift_sd`` how far a weight of a device wanders from one of
    its decisions to the next.
    """

    kind = "preferences"

    def __init__(
        self,
        formulas: Mapping[str, QoeFormula] | None = None,
        noise_sd: float = 0.06,
        drift_sd: float = 0.002,
        epsilon: float = LEAST_SHARE,
    ) -> None:
        self._formulas = dict(formulas or {})
        self._noise_sd = number("noise_sd", noise_sd, 1e-4, 10)
        self._drift_sd = number("drift_sd", drift_sd, 0, 1)
        self._epsilon = number("epsilon", epsilon, LEAST_SHARE, 1)
        self._known: dict[str, tuple[Floats, Floats]] = {}

    def state(self) -> dict[str, Any]:
        """Formulas, settings, and mean and covariance of every correction."""
        return {
            "formulas": {application: formula.as_record() for application, formula in self._formulas.items()},
            "noise_sd": self._noise_sd,
            "drift_sd": self._drift_sd,
            "epsilon": self._epsilon,
            "known": {scope: [mean.tolist(), spread.tolist()] for scope, (mean, spread) in self._known.items()},
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """Raises ValueError for what is no mean and covariance."""
        formulas = {application: QoeFormula.from_record(record) for application, record in state["formulas"].items()}
        policy = cls(formulas, state["noise_sd"], state["drift_sd"], state["epsilon"])
        width = 1 + len(TERMS)
        for scope, (mean, spread) in state["known"].items():
            arrays = np.array(mean, dtype=np.float64), np.array(spread, dtype=np.float64)
            if arrays[0].shape != (width,) or arrays[1].shape != (width, width):
                raise ValueError(f"{scope} has another number of terms")
            if not all(np.isfinite(array).all() for array in arrays):
                raise ValueError(f"{scope} is not finite")
            policy._known[scope] = arrays
        return policy

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> Floats:
        """Nearly all on the best corrected prediction; ties go to the first."""
        check_context(context)
        check_candidates(candidates)
        formula = self._formulas.get(context.application, _UNDECLARED)
        qoe = np.array([candidate.prediction.qoe for candidate in candidates])
        terms = _predicted_terms(formula, candidates)
        return mostly(int(np.argmax(qoe + terms @ self.correction(context))), len(candidates), self._epsilon)

    def correction(self, context: Context) -> Floats:
        """What is added to the declared worth of (1, latency, accuracy, energy) for this device, shape (4,)."""
        parts = [self._of(level, scope)[0] for level, scope in enumerate(_scopes(context))]
        return np.asarray(np.sum(parts, axis=0), dtype=np.float64)

    def learn(self, interaction: Interaction) -> None:
        """One step of recursive least squares on the part of the reward that the declared weights do not explain.

        A failed lease says nothing about preferences. Raises InvalidInput, unchanged.
        """
        check_interaction(interaction)
        if interaction.measurement.failed:
            return
        row, residual = self._evidence(interaction)
        scopes = _scopes(interaction.context)
        parts = [self._of(level, scope) for level, scope in enumerate(scopes)]
        parts[-1] = parts[-1][0], _widened(parts[-1][1], self._drift_sd)
        gains = [spread @ row for _, spread in parts]
        variance = self._noise_sd**2 + sum(float(row @ gain) for gain in gains)
        innovation = residual - sum(float(row @ mean) for mean, _ in parts)
        limit = OUTLIER_Z * math.sqrt(variance)
        softened = min(max(innovation, -limit), limit)
        for scope, (mean, spread), gain in zip(scopes, parts, gains, strict=True):
            self._known[scope] = mean + gain * (softened / variance), spread - np.outer(gain, gain) / variance

    def _evidence(self, interaction: Interaction) -> tuple[Floats, float]:
        """The terms of the chosen action, shape (4,), and reward less what the declared weights make of them."""
        chosen = interaction.candidates[interaction.chosen]
        formula = self._formulas.get(interaction.context.application)
        row = _predicted_terms(formula or _UNDECLARED, [chosen])[0]
        if formula is None:
            return row, interaction.reward - chosen.prediction.qoe
        measured = formula.terms(interaction.measurement, chosen.action.variant.accuracy)
        for place, term in enumerate(TERMS, start=1):
            row[place] = measured.get(term, row[place])
        return row, interaction.reward - _declared(formula, row, interaction.measurement.download_bytes)

    def _of(self, level: int, scope: str) -> tuple[Floats, Floats]:
        """Mean and covariance of one correction; not to be written to."""
        found = self._known.get(scope)
        width = 1 + len(TERMS)
        return found if found is not None else (np.zeros(width), np.eye(width) * PRIOR_SD[level] ** 2)


# Where no formula was declared, its defaults give the terms their scale; the prediction stands in for its weights.
_UNDECLARED = QoeFormula()


def _scopes(context: Context) -> tuple[str, str, str]:
    application = context.application
    return application, f"{application}\nclass:{context.device_class}", f"{application}\ndevice:{context.device}"


def _widened(spread: Floats, drift_sd: float) -> Floats:
    """The covariance after one step of drift, but no wider than before anything was known."""
    most = PRIOR_SD[-1] ** 2
    room = np.clip(most - np.diag(spread), 0.0, drift_sd**2)
    return np.asarray(spread + np.diag(room), dtype=np.float64)


def _predicted_terms(formula: QoeFormula, candidates: Sequence[Candidate]) -> Floats:
    """1 and the predicted terms of each candidate, shape (candidates, 4), each in [0, 1]."""
    columns = np.array(
        [
            (
                1.0,
                candidate.prediction.slo_hit_share,
                candidate.action.variant.accuracy,
                candidate.prediction.cpu_ms_per_request,
            )
            for candidate in candidates
        ],
        dtype=np.float64,
    )
    floor, reference = formula.accuracy_floor, formula.energy_reference_cpu_ms
    columns[:, 2] = np.clip((columns[:, 2] - floor) / (1.0 - floor), 0.0, 1.0)
    columns[:, 3] = reference / (reference + columns[:, 3])
    return columns


def _declared(formula: QoeFormula, row: Floats, download_bytes: float) -> float:
    """The declared formula over these terms, without a rating."""
    weights = np.array([getattr(formula, f"weight_{term}") for term in TERMS])
    charge = formula.switching_weight * download_bytes / (download_bytes + formula.switching_reference_bytes)
    return float(row[1:] @ weights / weights.sum()) - charge
