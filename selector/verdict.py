"""Was the bandit worth it? Mean QoE against uniform choice and against the best fixed action, from the log
alone.

Both references are valued on the very decisions that were logged, doubly robust with the logged prediction as
the model, so the lift is paired. The best fixed action is chosen on one half of the devices and valued on the
other, then swapped: valuing it where it was chosen would flatter it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selector.errors import InvalidInput
from selector.estimators import Estimate, dr_terms, effective_sample_size, fixed_n_within, importance_weights
from selector.interactions import Candidate, Interaction
from selector.policy import SUM_TOLERANCE
from selector.validation import check_interaction, number

Floats = NDArray[np.float64]

# Below it the interval, which grows by itself as the sample shrinks, is no longer near 95 %.
LEAST_EFFECTIVE = 8.0
LEAST_DEVICES = 2
NEARLY_ALL = 0.95
LEAST_PROBABILITY = 1e-12


@dataclass(frozen=True, slots=True)
class Verdict:
    """``uniform`` and ``best_fixed`` are what the references would have earned; ``lift_...`` is logged minus
    reference.

    None means not enough evidence, and ``reasons`` says why by field name. Intervals are 95 % and about these very
    devices (errors vary within a device). ``best_fixed_action`` is the key of the best on all devices, for people; the
    estimate is cross-fitted.
    """

    decisions: int
    devices: int
    qoe: Estimate | None
    uniform: Estimate | None
    best_fixed: Estimate | None
    lift_over_uniform: Estimate | None
    lift_over_best_fixed: Estimate | None
    slo_violation_share: float | None
    best_fixed_action: str | None
    reasons: dict[str, str]

    @property
    def reason(self) -> str:
        """Why something is missing, in one line; empty if nothing is.

        >>> verdict([]).reason
        'no closed decisions'
        """
        return "; ".join(dict.fromkeys(self.reasons.values()))


@dataclass(frozen=True, slots=True)
class _Log:
    """The log as arrays over n decisions and the k actions seen. ``qoe`` and ``probability`` (n, k) are NaN where an
    action was not feasible; ``spread_uniform`` is the expected squared weight of uniform choice."""

    rewards: Floats
    propensities: Floats
    chosen: NDArray[np.intp]
    model: Floats
    model_uniform: Floats
    feasible: Floats
    spread_uniform: Floats
    qoe: Floats
    probability: Floats
    devices: list[str]
    keys: list[str]


@dataclass(frozen=True, slots=True)
class _Target:
    """What would have been done instead: probability of the logged action, the model's value, expected squared
    weight."""

    targets: Floats
    model: Floats
    spread: Floats

    def columns(self) -> tuple[Floats, Floats, Floats]:
        return self.targets, self.model, self.spread


def verdict(interactions: Sequence[Interaction]) -> Verdict:
    """The verdict over closed decisions of one application, in log order. Raises InvalidInput for a bad
    one."""
    if not interactions:
        nothing = {"qoe": "no closed decisions"}
        return Verdict(0, 0, None, None, None, None, None, None, None, nothing)
    log = _read(interactions)
    reasons: dict[str, str] = {}
    uniform = _against(log, _Target(1.0 / log.feasible, log.model_uniform, log.spread_uniform), "uniform", reasons)
    fixed, lift_fixed, best = _against_best_fixed(log, reasons)
    return Verdict(
        decisions=len(interactions),
        devices=len(set(log.devices)),
        qoe=fixed_n_within(log.rewards, log.devices),
        uniform=uniform[0],
        best_fixed=fixed,
        lift_over_uniform=uniform[1],
        lift_over_best_fixed=lift_fixed,
        slo_violation_share=_slo_violation_share(interactions),
        best_fixed_action=best,
        reasons=reasons,
    )


def best_fixed_action(interactions: Sequence[Interaction]) -> str | None:
    """Key of the action that would have done best if it had always been taken; None without evidence.

    What ranking plays in half of its holdout.
    """
    if not interactions:
        return None
    log = _read(interactions)
    index = _best_fixed(log, np.ones(len(log.rewards), dtype=np.bool_))
    return None if index is None else log.keys[index]


def _read(interactions: Sequence[Interaction]) -> _Log:
    position: dict[str, int] = {}
    rows: list[tuple[NDArray[np.intp], Floats, Floats]] = []
    chosen = np.empty(len(interactions), dtype=np.intp)
    for row, interaction in enumerate(interactions):
        check_interaction(interaction)
        open_ones = [each for each in interaction.candidates if each.is_feasible]
        keys = [each.action.key for each in open_ones]
        columns = [position.setdefault(key, len(position)) for key in keys]
        qoe_of_row, shares_of_row = _checked(open_ones, keys)
        rows.append((np.array(columns, dtype=np.intp), qoe_of_row, shares_of_row))
        key = interaction.candidates[interaction.chosen].action.key
        chosen[row] = position.setdefault(key, len(position))
    qoe = np.full((len(interactions), len(position)), np.nan)
    probability = qoe.copy()
    for row, (columns_of_row, values, shares) in enumerate(rows):
        qoe[row, columns_of_row] = values
        probability[row, columns_of_row] = np.maximum(shares, LEAST_PROBABILITY)
    feasible = np.array([max(values.size, 1) for _, values, _ in rows], dtype=np.float64)
    model = np.array([each.candidates[each.chosen].prediction.qoe for each in interactions])
    return _Log(
        rewards=np.array([each.reward for each in interactions]),
        propensities=np.array([each.propensity for each in interactions]),
        chosen=chosen,
        model=model,
        model_uniform=np.array([values.mean() if values.size else 0.0 for _, values, _ in rows]),
        feasible=feasible,
        spread_uniform=np.nansum(1.0 / probability, axis=1) / feasible**2,
        qoe=qoe,
        probability=probability,
        devices=[each.context.device for each in interactions],
        keys=list(position),
    )


def _checked(candidates: Sequence[Candidate], keys: Sequence[str]) -> tuple[Floats, Floats]:
    """Predicted QoE and probability of the feasible candidates of one decision; raises InvalidInput for what no
    decision can have logged."""
    if len(set(keys)) != len(keys):
        raise InvalidInput("candidates", "must not name one action twice")
    for position, each in enumerate(candidates):
        number(f"candidates[{position}].prediction.qoe", each.prediction.qoe, -1e6, 1e6)
        number(f"candidates[{position}].probability", each.probability, 0, 1)
    shares = np.array([each.probability for each in candidates], dtype=np.float64)
    if shares.sum() > 1 + SUM_TOLERANCE:
        raise InvalidInput("candidates", f"must have probabilities that sum to 1, they sum to {shares.sum():g}")
    return np.array([each.prediction.qoe for each in candidates], dtype=np.float64), shares


def _against(
    log: _Log, target: _Target, field: str, reasons: dict[str, str]
) -> tuple[Estimate | None, Estimate | None]:
    """Value of a target and the lift over it, or (None, None) and the reason.

    The weights that happened to be drawn look fine where the target's actions are hardly ever drawn, so the effective
    sample also counts the weights that were to be expected.
    """
    targets, model_target = target.targets, target.model
    expected = len(targets) ** 2 / float(target.spread.sum())
    effective = min(effective_sample_size(importance_weights(log.propensities, targets)), expected)
    lacking = _lacking(log, effective)
    if lacking:
        reasons[field] = reasons[f"lift_over_{field}"] = lacking
        return None, None
    terms = dr_terms(log.rewards, log.propensities, targets, model=log.model, model_target=model_target)
    return fixed_n_within(terms, log.devices, effective), fixed_n_within(log.rewards - terms, log.devices, effective)


def _lacking(log: _Log, effective: float) -> str:
    devices = len(set(log.devices))
    if devices < LEAST_DEVICES:
        return f"needs at least {LEAST_DEVICES} devices, has {devices}"
    if effective < LEAST_EFFECTIVE:
        return f"needs an effective sample of {LEAST_EFFECTIVE:g} decisions, has {effective:.1f}"
    return ""


def _against_best_fixed(log: _Log, reasons: dict[str, str]) -> tuple[Estimate | None, Estimate | None, str | None]:
    """Cross-fitted: every decision is compared with the action chosen on the other half of the devices."""
    half = _halves(log.devices)
    mixed = _Target(*(np.zeros(len(log.rewards)) for _ in range(3)))
    for valued in (half, ~half):
        best = _best_fixed(log, ~valued)
        if best is None:
            reasons["best_fixed"] = reasons["lift_over_best_fixed"] = (
                "no action was tried often enough on half the devices"
            )
            return None, None, None
        for column, values in zip(mixed.columns(), _fixed_target(log, best).columns(), strict=True):
            column[valued] = values[valued]
    value, lift = _against(log, mixed, "best_fixed", reasons)
    overall = _best_fixed(log, np.ones(len(log.rewards), dtype=np.bool_))
    return value, lift, None if overall is None else log.keys[overall]


def _fixed_target(log: _Log, action: int) -> _Target:
    """``action`` wherever it is feasible, uniform elsewhere."""
    can = ~np.isnan(log.qoe[:, action])
    targets = np.where(can, log.chosen == action, 1.0 / log.feasible).astype(np.float64)
    spread = np.where(can, 1.0 / log.probability[:, action], log.spread_uniform)
    return _Target(targets, np.where(can, log.qoe[:, action], log.model_uniform), spread)


def _best_fixed(log: _Log, rows: NDArray[np.bool_]) -> int | None:
    """The action feasible in nearly all of these decisions with the best doubly robust value less one
    error."""
    if not rows.any():
        return None
    qoe, chosen = log.qoe[rows], log.chosen[rows]
    weights = 1.0 / log.propensities[rows]
    count = len(qoe)
    best, best_value = None, -np.inf
    for action in np.flatnonzero(np.mean(~np.isnan(qoe), axis=0) >= NEARLY_ALL).tolist():
        hit = chosen == action
        if not hit.any() or count**2 / np.nansum(1.0 / log.probability[rows, action]) < LEAST_EFFECTIVE / 4:
            continue
        terms = np.where(np.isnan(qoe[:, action]), log.model_uniform[rows], qoe[:, action])
        terms[hit] += weights[hit] * (log.rewards[rows][hit] - log.model[rows][hit])
        value = float(terms.mean() - terms.std() / np.sqrt(count))
        if value > best_value:
            best, best_value = action, value
    return best


def _halves(devices: list[str]) -> NDArray[np.bool_]:
    """Splits devices, not decisions, by the order of a hash: the same split whatever the order of the log."""
    names = sorted(set(devices), key=lambda each: hashlib.sha256(each.encode()).digest())
    first = frozenset(names[: len(names) // 2])
    return np.array([each in first for each in devices], dtype=np.bool_)


def _slo_violation_share(interactions: Sequence[Interaction]) -> float | None:
    """Share of measured leases whose p95 missed the SLO; a failed lease missed it."""
    missed = [
        each.measurement.failed or (each.measurement.p95_ms or 0.0) > each.context.slo_p95_ms
        for each in interactions
        if each.measurement.failed or each.measurement.p95_ms is not None
    ]
    return sum(missed) / len(missed) if missed else None
