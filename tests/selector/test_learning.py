"""Seeded simulations: calibration pays, and the learner finds what only ratings show."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from selector.baselines import PredictionPolicy
from selector.calibration import Calibration
from selector.interactions import Action, Context, Interaction, Measurement
from selector.policy import Policy
from selector.queueing import share_within, sojourn
from selector.ranking import Exploration
from selector.reward import QoeFormula
from selector.vw import VowpalWabbitPolicy
from tests.selector.builders import closed, context, grid, profiles, ranked

ACTIONS = grid(4, (1, 4), (1, 2))
LITTLE = Exploration(epsilon=0.02, holdout=0.02, shortlist_size=8)


@dataclass
class World:
    """Devices slower or faster than their profiles, throttled tails, users who may dislike what looks
    good."""

    seed: int
    formula: QoeFormula
    spread: float = 0.0
    disliked: str = ""
    devices: int = 6
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        sides = np.where(np.arange(self.devices) % 2, 1.0, -1.0)
        self.slow = np.exp(self.spread * (sides + self.rng.normal(0, 0.3, self.devices)))
        self.quirk = np.exp(self.rng.normal(0, self.spread / 4, (self.devices, 4)))

    def situation(self, index: int) -> Context:
        return context(device=f"device-{index}", arrival_rate_rps=(5.0, 40.0, 80.0)[index % 3], slo_p95_ms=40.0)

    def measure(self, index: int, action: Action) -> tuple[Measurement, float]:
        """A noisy measurement, and the exact expected reward."""
        situation, number = self.situation(index), int(action.variant.name[-1])
        factor = self.slow[index] * self.quirk[index, number]
        a_ms, b_ms = factor * 8.0 / (number + 1), factor * 2.0
        bounds = action.configuration
        queue = sojourn(a_ms, b_ms, bounds.max_batch, bounds.max_concurrency, situation.arrival_rate_rps)
        noise = math.exp(self.rng.normal(0, 0.05))
        share = float(share_within(40.0, queue.p50_ms, queue.p95_ms))
        measurement = Measurement(
            requests=300,
            p50_ms=float(queue.p50_ms) * noise,
            p95_ms=float(queue.p95_ms) * noise,
            slo_hit_share=self.rng.binomial(300, share) / 300,
            cpu_ms_per_request=float(a_ms + b_ms / queue.batch),
            service_ms=float(queue.service_ms) * noise,
            batch_mean=float(queue.batch),
            rating=self.rating(action),
        )
        return measurement, self.formula.reward(measurement, action.variant.accuracy)

    def rating(self, action: Action) -> float | None:
        return None if not self.disliked else 0.1 if action.variant.name == self.disliked else 0.9


def mean_reward(world: World, policy: Policy, rounds: int, is_calibrated: bool) -> float:
    """Mean reward of the second half."""
    calibration, rewards = Calibration(), []
    for turn in range(rounds):
        for index in range(world.devices):
            situation = world.situation(index)
            decision_id = f"{world.seed}/{turn}/{index}"
            ranking = ranked(
                decision_id,
                policy,
                context=situation,
                actions=ACTIONS,
                profiles=profiles(4),
                calibration=calibration,
                formula=world.formula,
                exploration=LITTLE,
            )
            measurement, reward = world.measure(index, ranking.action)
            entry: Interaction = closed(ranking, situation, measurement, reward, decision_id)
            policy.learn(entry)
            if is_calibrated:
                calibration.update(entry)
            rewards.append(reward)
    return float(np.mean(rewards[len(rewards) // 2 :]))


def gains(run: Callable[[int], float], seeds: int) -> tuple[float, float]:
    """Mean gain over seeds and its standard error."""
    each = [run(seed) for seed in range(seeds)]
    return float(np.mean(each)), float(np.std(each, ddof=1) / math.sqrt(seeds))


def test_calibration_pays_on_devices_that_differ_from_their_profiles() -> None:
    formula = QoeFormula(weight_latency=2, weight_accuracy=4, weight_energy=0, accuracy_floor=0.8, slo_p95_ms=40.0)

    def gain(seed: int) -> float:
        runs = [
            mean_reward(World(seed, formula, spread=0.8), PredictionPolicy(), 16, is_calibrated)
            for is_calibrated in (True, False)
        ]
        return runs[0] - runs[1]

    mean, error = gains(gain, 4)
    assert mean > 2 * error
    assert mean > 0.01


def test_the_learner_finds_a_preference_that_only_ratings_show() -> None:
    """The variant that predicts best is disliked. Knowing it is worth half the rating's weight times 0.8."""
    formula = QoeFormula(weight_latency=1, weight_accuracy=1, weight_energy=0, weight_rating=2, slo_p95_ms=40.0)
    favourite = ranked(
        "x", context=World(0, formula).situation(0), actions=ACTIONS, profiles=profiles(4), formula=formula
    )
    best = max(favourite.candidates, key=lambda each: each.prediction.qoe).action.variant.name

    def gain(seed: int) -> float:
        def world() -> World:
            return World(seed, formula, disliked=best)

        learnt = mean_reward(world(), VowpalWabbitPolicy(), 30, is_calibrated=True)
        return learnt - mean_reward(world(), PredictionPolicy(), 30, is_calibrated=True)

    mean, error = gains(gain, 3)
    assert mean > 2 * error
    assert mean > 0.5 * (2 / 4) * 0.8


def test_learning_costs_nothing_where_the_prediction_is_already_right() -> None:
    formula = QoeFormula(weight_latency=2, weight_accuracy=2, weight_energy=1, slo_p95_ms=40.0)
    learnt = mean_reward(World(1, formula), VowpalWabbitPolicy(), 30, is_calibrated=True)
    followed = mean_reward(World(1, formula), PredictionPolicy(), 30, is_calibrated=True)
    assert learnt > followed - 0.01
