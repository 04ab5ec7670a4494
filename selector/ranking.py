"""One decision: predict, mask, shortlist, ask the policy, mix, sample once. The logged probability is the
exact marginal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selector.actions import ActionTable, action_table
from selector.budget import Standing, uncovered
from selector.calibration import Calibration
from selector.candidates import Candidates
from selector.errors import InvalidInput, NoFeasibleAction
from selector.feasibility import (
    EXPLORATION_BUDGET,
    SLO_VIOLATION_LIKELY,
    hard_masks,
    on_device,
    slo_violation_is_likely,
)
from selector.interactions import Action, Context, Profile, Ranking
from selector.latency import OUTER_WEIGHT, LatencyModel, Predicted
from selector.policy import Policy, checked, sample, seed_of, uniform_of
from selector.reward import QoeFormula
from selector.validation import check_context, name, number

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Indices = NDArray[np.intp]

EXPLOIT, UNIFORM, HOLDOUT_UNIFORM, HOLDOUT_BEST_FIXED = (
    "exploit",
    "uniform",
    "holdout_uniform",
    "holdout_best_fixed",
)


# Of its uniform share, what an action keeps that the budget does not cover: a little, so that it stays evaluable.
UNCOVERED_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Exploration:
    """How much is left to chance: ``epsilon`` uniform over all feasible actions, ``holdout`` for proof of
    value.

    ``shortlist_size`` is what the policy sees; actions whose probability of missing the SLO is above
    ``slo_violation_limit`` stay off the shortlist while others are left. ``budget`` is the share of the baseline's mean
    QoE that may be lost to finding something better, per device and fleet (``budget.py``); 1 sets no bound.
    ``horizon`` is for how many decisions what is found out will serve; 0 chooses by expectation alone.
    ``risk_aversion`` is the QoE that one is ready to pay for not missing the SLO, beyond what the formula charges.
    """

    epsilon: float = 0.02
    holdout: float = 0.05
    shortlist_size: int = 8
    slo_violation_limit: float = 0.5
    budget: float = 1.0
    horizon: float = 10.0
    risk_aversion: float = 0.1

    def __post_init__(self) -> None:
        """Raise InvalidInput naming the field that makes no sense. Some uniform exploration must remain."""
        number("epsilon", self.epsilon, 0, 1)
        number("holdout", self.holdout, 0, 1)
        number("slo_violation_limit", self.slo_violation_limit, 0, 1)
        number("budget", self.budget, 0, 1)
        number("horizon", self.horizon, 0, 1e6)
        number("risk_aversion", self.risk_aversion, 0, 1)
        if isinstance(self.shortlist_size, bool) or not isinstance(self.shortlist_size, int):
            raise InvalidInput("shortlist_size", "must be an integer")
        number("shortlist_size", self.shortlist_size, 1, 1000)
        if not 0 < self.epsilon + self.holdout <= 1:
            raise InvalidInput("epsilon", "and holdout together must be above 0 and at most 1")


def rank(
    *,
    decision_id: str,
    context: Context,
    actions: Sequence[Action],
    profiles: Sequence[Profile],
    calibration: Calibration,
    formula: QoeFormula,
    policy: Policy | None,
    policy_version: int,
    best_fixed: str | None,
    exploration: Exploration,
    bans: Mapping[str, str],
) -> Ranking:
    """Choose an action. Pure: the same arguments give the same ranking; the decision id is the only
    randomness.

    ``best_fixed`` is the key of the best fixed action so far, ``bans`` maps action keys or digests to
    reasons. Without a policy the draw is uniform over the feasible actions. Pass ``actions`` as one kept
    tuple to have it read only once. The shortlist is deterministic, so a marginal probability is a plain sum
    over the parts of the mixture.

    Raises NoFeasibleAction with all reasons, InvalidInput, or PolicyFailure if the policy gives no
    distribution.
    """
    name("decision_id", decision_id)
    check_context(context)
    if not isinstance(bans, Mapping):
        raise InvalidInput("bans", "must map action keys or digests to reasons")
    if not isinstance(best_fixed, str | None):
        raise InvalidInput("best_fixed", "must be an action key or None")
    table = action_table(actions)
    scored = _score(
        context,
        table,
        LatencyModel(profiles, calibration),
        formula=formula,
        exploration=exploration,
        bans=bans,
        standings=calibration.standings(context),
    )
    preferred = np.zeros(len(table.actions))
    shortlist: list[int] = []
    if policy is not None:
        shortlist = scored.shortlist(context, exploration.shortlist_size)
        listed = scored.candidates.at(shortlist)
        preferred[shortlist] = checked(policy.probabilities(context, listed), len(listed))
    fixed = table.position.get(best_fixed) if best_fixed is not None else None
    drawable: Floats = np.where(scored.uncovered, UNCOVERED_SHARE, 1.0) * scored.feasible
    parts = mixture(preferred, drawable, fixed, exploration, policy is not None)
    marginal: Floats = sum(parts.values(), start=np.zeros(len(preferred)))
    marginal /= marginal.sum()
    seed = seed_of(decision_id)
    chosen = sample(marginal, seed)
    return Ranking(
        candidates=scored.candidates.sampled_with(marginal, frozenset(shortlist)),
        chosen=chosen,
        seed=seed,
        kind=_kind(parts, chosen, seed),
        policy_version=policy_version,
        calibration_revisions=calibration.revisions(context),
    )


def expected_qoe(table: ActionTable, predicted: Predicted, formula: QoeFormula, is_present: Mask) -> Floats:
    """Predicted QoE of shape (3, actions): as expected; at the cautious speed; and, the download aside, at the hopeful
    one. What is not present has to be downloaded."""
    download = np.where(is_present, 0.0, table.size_bytes)
    cpu_ms = predicted.cpu_ms_per_request
    return formula.predicted(
        table.accuracy,
        np.array((predicted.slo_hit_share, predicted.cautious_hit_share, predicted.hopeful_hit_share)),
        np.array((cpu_ms, cpu_ms, predicted.hopeful_cpu_ms)),
        np.array((download, download, np.zeros_like(download))),
    )


def mixture(
    preferred: Floats, drawable: Floats, best_fixed: int | None, exploration: Exploration, has_policy: bool
) -> dict[str, Floats]:
    """The parts of the mixture by kind, each of shape (actions,); together they sum to 1.

    ``drawable`` (actions,) weighs the actions in the uniform parts: 0 what is not feasible, 1 usually.

    >>> some = Exploration(epsilon=0.1, holdout=0.2)
    >>> parts = mixture(np.array([1.0, 0.0]), np.array([1.0, 1.0]), 1, some, True)
    >>> [round(float(p), 3) for p in sum(parts.values())]
    [0.8, 0.2]
    """
    uniform = drawable / drawable.sum()
    if not has_policy:
        return {UNIFORM: uniform}
    epsilon, holdout = exploration.epsilon, exploration.holdout
    fixed = np.zeros(len(drawable))
    if best_fixed is not None and drawable[best_fixed] >= 1:
        fixed[best_fixed] = holdout / 2
        holdout /= 2
    return {
        EXPLOIT: (1 - epsilon - exploration.holdout) * preferred,
        UNIFORM: epsilon * uniform,
        HOLDOUT_UNIFORM: holdout * uniform,
        HOLDOUT_BEST_FIXED: fixed,
    }


def _kind(parts: dict[str, Floats], chosen: int, seed: int) -> str:
    """Which part drew the action: drawn given the action, by a second number of the seed, so the marginal
    is exact."""
    shares = {kind: float(part[chosen]) for kind, part in parts.items() if part[chosen] > 0}
    left = uniform_of(seed, "kind") * sum(shares.values())
    for kind, share in shares.items():
        left -= share
        if left < 0:
            return kind
    return kind


@dataclass(frozen=True, slots=True)
class _Scored:
    """All actions of one decision with predictions and masks; masks of shape (actions,)."""

    table: ActionTable
    candidates: Candidates
    feasible: Mask
    soft: Mask
    uncovered: Mask
    promising: Mask

    def shortlist(self, context: Context, size: int) -> list[int]:
        """Indices of the best by predicted QoE, ascending; incumbent and baseline always; soft-masked if
        all are."""
        eligible = self.feasible & ~self.uncovered
        if (eligible & ~self.soft).any():
            eligible &= ~self.soft | self.promising
        position = self.table.position
        wanted = [position[key] for key in (context.incumbent, context.baseline) if key is not None and key in position]
        forced = [each for each in dict.fromkeys(wanted) if self.feasible[each] and not self.uncovered[each]]
        order = np.argsort(np.where(eligible, -self.candidates.value, np.inf), kind="stable")[: int(eligible.sum())]
        return sorted(forced + self._variants_first(order, frozenset(forced), size - len(forced)))

    def _variants_first(self, order: Indices, taken: frozenset[int], count: int) -> list[int]:
        """So many that are not taken: the best action of each variant, then the others. Tastes are about variants,
        configurations are predicted."""
        met: set[int] = set()
        firsts: list[int] = []
        rest: list[int] = []
        for index, variant in zip(order.tolist(), self.table.variant[order].tolist(), strict=True):
            if len(firsts) >= count:
                break
            if index not in taken:
                (rest if variant in met else firsts).append(index)
            met.add(variant)
        return (firsts + rest)[:count]


def _score(
    context: Context,
    table: ActionTable,
    model: LatencyModel,
    *,
    formula: QoeFormula,
    exploration: Exploration,
    bans: Mapping[str, str],
    standings: tuple[Standing, Standing],
) -> _Scored:
    if not table.actions:
        raise NoFeasibleAction({})
    predicted = model.predict(context, table)
    hard = hard_masks(context, table, predicted.memory_bytes, bans)
    if len(hard) == len(table.actions):
        raise NoFeasibleAction({key: hard[index] for index, key in enumerate(table.keys)})
    feasible = np.ones(len(table.actions), dtype=np.bool_)
    if hard:
        feasible[list(hard)] = False
    soft = slo_violation_is_likely(predicted.slo_violation_probability, exploration.slo_violation_limit)
    is_present = on_device(context, table)[table.variant]
    qoe, cautious, hopeful = expected_qoe(table, predicted, formula, is_present)
    baseline = table.position.get(context.baseline) if context.baseline is not None else None
    if baseline is not None and not feasible[baseline]:
        baseline = None
    short = np.zeros(len(table.actions), dtype=np.bool_)
    if baseline is not None and exploration.budget < 1:
        short = uncovered(cautious, float(qoe[baseline]), baseline, exploration.budget, standings)
    reasons = dict.fromkeys(soft.nonzero()[0].tolist(), (SLO_VIOLATION_LIKELY,))
    for index in short.nonzero()[0].tolist():
        reasons[index] = (*reasons.get(index, ()), EXPLORATION_BUDGET)
    free = feasible & ~soft
    best = float(qoe[free if free.any() else feasible].max())
    # What ran here lately is known, or its report is on the way: finding it out again would tell nothing new.
    found_out = exploration.horizon * ~is_present * worth_finding_out(hopeful, qoe, best)
    bonus = found_out - exploration.risk_aversion * predicted.slo_violation_probability
    candidates = Candidates(table, predicted, qoe, bonus, hard=hard, soft=reasons)
    return _Scored(table, candidates, feasible, soft, short, qoe + found_out > best)


def worth_finding_out(hopeful: Floats, qoe: Floats, best: float) -> Floats:
    """Expected gain per decision over the ``best`` known QoE from knowing an action's speed, shape (actions,).

    Expected improvement (Mockus, 1978) by three-point quadrature over the uncertain service time, of which only the
    fast point, worth ``hopeful``, can gain. An action that is sure, or hopeless, is worth nothing.
    """
    gain: Floats = OUTER_WEIGHT * np.maximum(hopeful - np.maximum(best, qoe), 0.0)
    return gain
