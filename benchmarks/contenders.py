"""Everyone who plays in `python -m benchmarks.selection`: ours, its ablations, references in hindsight and peers.

Peers stand at the best settings that were found on the tuning worlds of `selector/worlds/constants.py`
(`peer_settings.py`), never on the reported ones; the hosted default stands as it was. Who learns over features is told
what ours is told (which device it is, the baseline, what runs, what came of the leases of the device and its group),
unless it was better without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers import (
    FLAT_SQUARECB,
    HOSTED_DEFAULT,
    BoostedResidualPolicy,
    FlatVowpalWabbitPolicy,
    NeuralResidualPolicy,
)
from selector.baselines import FixedPerClassPolicy, FixedPolicy, PredictionPolicy, RandomPolicy
from selector.linear import LinTsPolicy, LinUcbPolicy
from selector.preferences import PreferencePolicy
from selector.ranking import Exploration
from selector.reward import QoeFormula
from selector.simulation import EVERYTHING, Contender, World, available
from selector.tabular import ThompsonPolicy, Ucb1Policy
from selector.tastes import TastePolicy
from selector.vw import VowpalWabbitPolicy, VwSettings

Floats = NDArray[np.float64]

OURS, WITHOUT_VW = "ours", "ours without Vowpal Wabbit"
CALIBRATED, PREFERENCES = "calibrated argmax", "calibrated argmax + preferences"
RANDOM, BEST_FIXED, BEST_PER_CLASS, ANALYTIC = "random", "best fixed", "best fixed per class", "analytic argmax"
HOSTED, HOSTED_SHORTLIST = "hosted default", "hosted default, masks + shortlist"

# A policy that explores by itself needs little more; some must remain, or its propensities would be zero.
LITTLE = 0.002
# The horizon, the aversion to risk and the budget are ours alone.
ALL = Exploration(epsilon=LITTLE, holdout=0.0, shortlist_size=EVERYTHING, horizon=0.0, risk_aversion=0.0)
SHORTLIST = replace(ALL, shortlist_size=16)
NO_SLO_MASK = replace(ALL, slo_violation_limit=1.0)
BUDGET = 0.05


def contenders(world: World) -> tuple[Contender, ...]:
    """All contenders in this world: hindsight references know its truth, preferences its declared formulas."""
    return (ours(), *ablations(world), *references(world), *peers())


def ours() -> Contender:
    """Calibrated prediction, shortlist, Vowpal Wabbit on the residual."""
    return Contender(
        OURS,
        lambda seed: VowpalWabbitPolicy(VwSettings(seed=seed)),
        role="ours",
        calibrates=True,
        uses_prediction=True,
        exploration=Exploration(epsilon=LITTLE, holdout=0.0, budget=BUDGET),
    )


def ablations(world: World) -> tuple[Contender, ...]:
    """Ours without Vowpal Wabbit, all else equal; and the calibrated prediction alone, and corrected by learnt
    preferences, which have neither horizon nor aversion to risk nor budget."""
    formulas = declared_formulas(world)
    return (
        replace(ours(), name=WITHOUT_VW, role="ablation", make_policy=lambda _: TastePolicy()),
        Contender(
            CALIBRATED,
            lambda _: PredictionPolicy(),
            role="ablation",
            calibrates=True,
            uses_prediction=True,
            exploration=SHORTLIST,
        ),
        Contender(
            PREFERENCES,
            lambda _: PreferencePolicy(formulas),
            role="ablation",
            calibrates=True,
            uses_prediction=True,
            exploration=ALL,
        ),
    )


def references(world: World) -> tuple[Contender, ...]:
    """What does not learn: chance, the best fixed choices in hindsight, the prediction as it comes."""
    fixed, by_class = hindsight(world)
    return (
        Contender(RANDOM, lambda _: RandomPolicy(), role="reference", masks=False, exploration=ALL),
        Contender(
            BEST_FIXED,
            lambda _: FixedPolicy(fixed[0], fixed[1:]),
            role="reference",
            masks=False,
            exploration=NO_SLO_MASK,
        ),
        Contender(
            BEST_PER_CLASS,
            lambda _: FixedPerClassPolicy(by_class, fixed),
            role="reference",
            masks=False,
            exploration=NO_SLO_MASK,
        ),
        Contender(
            ANALYTIC, lambda _: PredictionPolicy(), role="reference", uses_prediction=True, exploration=SHORTLIST
        ),
    )


def peers() -> tuple[Contender, ...]:
    """Everything that learns without our online calibration."""
    return (*without_prediction(), *with_prediction(), *hosted())


def without_prediction() -> tuple[Contender, ...]:
    """Learners that know nothing of our prediction: neither as a feature nor through the SLO mask made of it."""
    return (
        Contender("UCB1 per device", lambda _: Ucb1Policy(width=0.1), exploration=NO_SLO_MASK),
        Contender("Thompson per device", lambda _: ThompsonPolicy(noise_sd=0.1, prior=0.5), exploration=NO_SLO_MASK),
        Contender("LinUCB", lambda _: LinUcbPolicy(alpha=0.1, ridge=0.05), exploration=NO_SLO_MASK),
        Contender("LinTS", lambda _: LinTsPolicy(alpha=0.1, ridge=0.2, with_history=True), exploration=NO_SLO_MASK),
        Contender(
            "VW squarecb, flat",
            lambda seed: FlatVowpalWabbitPolicy(
                f"{FLAT_SQUARECB.format(gamma=100_000, rate=0.5)} --random_seed {seed}",
                learns_all_lines=False,
                with_device=True,
                with_standing=True,
            ),
            exploration=NO_SLO_MASK,
        ),
    )


def with_prediction() -> tuple[Contender, ...]:
    """Learners that use our uncalibrated prediction, as a feature or as what a residual is learnt of; and as a mask."""
    return (
        Contender(
            "LinUCB + prediction",
            lambda _: LinUcbPolicy(alpha=0.03, with_prediction=True, with_history=True),
            uses_prediction=True,
            exploration=ALL,
        ),
        Contender(
            "LinTS + prediction",
            lambda _: LinTsPolicy(alpha=0.02, with_prediction=True, with_history=True),
            uses_prediction=True,
            exploration=ALL,
        ),
        Contender(
            "neural network on residual",
            lambda seed: NeuralResidualPolicy(epsilon=0.001, seed=seed),
            uses_prediction=True,
            exploration=ALL,
        ),
        Contender(
            "boosted trees on residual",
            lambda seed: BoostedResidualPolicy(epsilon=0.001, seed=seed, with_history=True),
            uses_prediction=True,
            exploration=ALL,
        ),
    )


def hosted() -> tuple[Contender, ...]:
    """Vowpal Wabbit as the hosted service ran it: plain, and given our masks and the shortlist of the prediction.

    The second counts as a peer without our prediction, since it does not read it: the harder reading of the target.
    """
    return (
        Contender(
            HOSTED,
            lambda seed: FlatVowpalWabbitPolicy(f"{HOSTED_DEFAULT} --random_seed {seed}"),
            role="hosted",
            masks=False,
            exploration=NO_SLO_MASK,
        ),
        Contender(
            HOSTED_SHORTLIST,
            lambda seed: FlatVowpalWabbitPolicy(f"{HOSTED_DEFAULT} --random_seed {seed}"),
            role="hosted",
            exploration=SHORTLIST,
        ),
    )


def hindsight(world: World) -> tuple[list[str], dict[str, list[str]]]:
    """Keys of the actions from the best to the worst, by true QoE summed over the run: of all devices, of each class.

    An action earns nothing while it is not there.
    """
    total = np.zeros((world.device_count, len(world.actions)))
    for step in range(world.steps):
        total += np.where(available(world, step), world.expected_qoe(step), 0.0)
    classes = [world.device_class(device) for device in range(world.device_count)]
    by_class = {
        each: _ordered(world, total[[other == each for other in classes]].sum(axis=0)) for each in sorted(set(classes))
    }
    return _ordered(world, total.sum(axis=0)), by_class


def declared_formulas(world: World) -> dict[str, QoeFormula]:
    """What the operator declared, by application."""
    return {world.context(device, 0).application: world.formula(device) for device in range(world.device_count)}


def named(name: str, all_of_them: Sequence[Contender]) -> Contender:
    """The contender of this name; raises KeyError listing those there are."""
    for each in all_of_them:
        if each.name == name:
            return each
    raise KeyError(f"{name} is none of {', '.join(each.name for each in all_of_them)}")


def _ordered(world: World, total: Floats) -> list[str]:
    return [world.actions[index].key for index in np.argsort(-total, kind="stable").tolist()]
