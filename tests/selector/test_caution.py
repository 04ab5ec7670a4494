"""What the exploration budget counts on: what is left of an action if the device is slower than expected."""

from __future__ import annotations

import numpy as np

from selector.actions import action_table
from selector.budget import Standing, uncovered
from selector.calibration import Calibration
from selector.feasibility import EXPLORATION_BUDGET
from selector.interactions import Context, Measurement
from selector.latency import LatencyModel
from selector.ranking import Exploration
from selector.vw import VowpalWabbitPolicy
from tests.selector.builders import closed, context, grid, profiles, ranked

ACTIONS = grid()
GUARDED = Exploration(epsilon=0.3, holdout=0.0, budget=0.05)


def masked(calibration: Calibration, where: Context) -> set[str]:
    """Variants of which the budget covers no action."""
    ranking = ranked(policy=VowpalWabbitPolicy(), context=where, calibration=calibration, exploration=GUARDED)
    covered = {each.action.variant.name for each in ranking.candidates if EXPLORATION_BUDGET not in each.soft_masks}
    return {action.variant.name for action in ACTIONS} - covered


def test_what_a_slower_device_could_not_serve_waits_until_the_device_is_known() -> None:
    small = ACTIONS[-4]
    where = context(baseline=small.key, slo_p95_ms=16.0, arrival_rate_rps=1.0)
    calibration, policy = Calibration(), VowpalWabbitPolicy()
    assert masked(calibration, where) == {ACTIONS[0].variant.name}
    for number in range(20):
        ranking = ranked(f"d-{number}", policy, context=where, calibration=calibration, exploration=GUARDED)
        expected = ranking.candidates[ranking.chosen].prediction
        as_expected = Measurement(
            requests=500, p50_ms=expected.p50_ms, p95_ms=expected.p95_ms, service_ms=expected.service_ms, batch_mean=1.0
        )
        calibration.update(closed(ranking, where, as_expected, expected.qoe, f"d-{number}"))
    assert masked(calibration, where) == set()


def test_a_risk_must_be_earned_first() -> None:
    cautious = np.array([0.8, 0.4])
    for decisions, is_held_back in ((0, True), (5, True), (20, False)):
        device = Standing(decisions, reward=0.8 * decisions, baseline=0.8 * decisions)
        assert uncovered(cautious, 0.8, 0, 0.05, (Standing(), device)).tolist() == [False, is_held_back]


def test_overload_is_a_cliff_for_the_cautious() -> None:
    table = action_table(ACTIONS)
    for rate, least_lost, most_lost in ((1.0, 0.0, 0.01), (50.0, 0.8, 1.0)):
        where = context(arrival_rate_rps=rate)
        predicted = LatencyModel(profiles()).predict(where, table)
        assert least_lost <= predicted.slo_hit_share[0] - predicted.cautious_hit_share[0] <= most_lost
        assert (predicted.cautious_hit_share <= predicted.slo_hit_share).all()
