"""The exploration budget: losses against the baseline stay within a share; pushing waits for its time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from selector.budget import Standing, uncovered
from selector.calibration import Calibration
from selector.errors import InvalidInput
from selector.feasibility import EXPLORATION_BUDGET, PUSH_DEFERRED
from selector.interactions import Context, Measurement, Ranking
from selector.policy import Policy
from selector.ranking import Exploration
from selector.vw import VowpalWabbitPolicy
from tests.selector.builders import candidate, closed, context, grid, interaction, ranked

ACTIONS = grid()
BASELINE = ACTIONS[0].key
GUARDED = Exploration(epsilon=0.3, holdout=0.0, budget=0.05)


def situation(**changes: Any) -> Context:
    return context(baseline=BASELINE, **changes)


def decide(
    calibration: Calibration, number: int, *, exploration: Exploration, policy: Policy, where: Context
) -> Ranking:
    return ranked(
        f"{where.device}/{number}", policy=policy, context=where, calibration=calibration, exploration=exploration
    )


def play(exploration: Exploration, good: str, count: int = 60) -> list[float]:
    """Rewards of one device on which only one action is any good, whatever the predictions say."""
    calibration, policy, rewards = Calibration(), VowpalWabbitPolicy(), []
    for number in range(count):
        ranking = decide(calibration, number, exploration=exploration, policy=policy, where=situation())
        reward = 0.8 if ranking.action.key == good else 0.2
        rewards.append(reward)
        entry = closed(ranking, situation(), Measurement(requests=50), reward, f"d-{number}")
        calibration.update(entry)
        policy.learn(entry)
    return rewards


def test_what_exploring_loses_stays_within_the_budget() -> None:
    guarded, free = play(GUARDED, BASELINE), play(replace(GUARDED, budget=1.0), BASELINE)
    assert np.mean(guarded[10:]) > 0.9 * 0.8
    assert np.mean(guarded[10:]) > np.mean(free[10:])


def overdrawn(exploration: Exploration = GUARDED) -> Ranking:
    calibration, policy = Calibration(), VowpalWabbitPolicy()
    for number in range(12):
        ranking = decide(
            calibration, number, exploration=replace(GUARDED, budget=1.0), policy=policy, where=situation()
        )
        calibration.update(closed(ranking, situation(), Measurement(requests=50), 0.05, f"d-{number}"))
    return decide(calibration, 99, exploration=exploration, policy=policy, where=situation())


def test_what_the_budget_does_not_cover_keeps_a_small_probability_and_says_why() -> None:
    ranking = overdrawn()
    held_back = [each for each in ranking.candidates if EXPLORATION_BUDGET in each.soft_masks]
    assert held_back
    assert all(0 < each.probability < GUARDED.epsilon / len(ACTIONS) for each in held_back)
    assert not any(each.shortlisted for each in held_back)
    assert sum(each.probability for each in ranking.candidates) == pytest.approx(1.0)


def test_the_baseline_is_always_covered() -> None:
    baseline = next(each for each in overdrawn().candidates if each.action.key == BASELINE)
    assert baseline.shortlisted
    assert not baseline.soft_masks


def test_a_budget_of_one_sets_no_bound() -> None:
    ranking = overdrawn(replace(GUARDED, budget=1.0))
    assert not any(EXPLORATION_BUDGET in each.soft_masks for each in ranking.candidates)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), float("inf")])
def test_a_budget_that_makes_no_sense_is_refused(share: float) -> None:
    with pytest.raises(InvalidInput, match="budget"):
        Exploration(budget=share)


def test_the_standing_survives_as_json_rows() -> None:
    calibration, policy = Calibration(), VowpalWabbitPolicy()
    ranking = decide(calibration, 1, exploration=GUARDED, policy=policy, where=situation())
    calibration.update(closed(ranking, situation(), Measurement(requests=50), 0.4, "d-1"))
    again = Calibration.from_rows(calibration.rows())
    assert again.standings(situation()) == calibration.standings(situation())
    assert again.standings(situation())[1].decisions == 1
    with pytest.raises(InvalidInput, match=r"device:device-1\.standing"):
        Calibration.from_rows({"device:device-1": {"revision": 1, "standing": [1.0, float("nan")]}})


@pytest.mark.parametrize(
    "features",
    [{"network": "metered"}, {"battery": 0.1}, {"battery": 0}, {"battery": 0.1, "charging": 0.0}],
)
def test_nothing_is_pushed_over_a_metered_network_or_on_a_low_battery(features: dict[str, float | str]) -> None:
    where = situation(features=features, incumbent=BASELINE)
    ranking = ranked(context=where, policy=VowpalWabbitPolicy())
    for each in ranking.candidates:
        needs_download = each.action.variant != ACTIONS[0].variant
        assert (PUSH_DEFERRED in each.hard_masks) == needs_download
        assert (each.probability == 0) == needs_download


@pytest.mark.parametrize(
    "features", [{"network": "wifi"}, {"battery": 0.1, "charging": 1.0}, {"battery": 0.8}, {"battery": "unknown"}]
)
def test_otherwise_pushing_goes_on(features: dict[str, float | str]) -> None:
    ranking = ranked(context=situation(features=features, incumbent=BASELINE))
    assert not any(PUSH_DEFERRED in each.hard_masks for each in ranking.candidates)


def test_a_device_that_has_nothing_is_served_even_over_a_metered_network() -> None:
    ranking = ranked(context=situation(features={"network": "metered"}))
    assert not any(each.hard_masks for each in ranking.candidates)


def standings_of_a_fleet(rewards: Sequence[float]) -> tuple[Calibration, Context]:
    """Fifty devices in turn earn this where the baseline was worth 0.8."""
    calibration, where = Calibration(), situation()
    some = (replace(candidate(0, 0.8), action=ACTIONS[0]), replace(candidate(1, 0.8), action=ACTIONS[1]))
    for number, reward in enumerate(rewards):
        where = situation(device=f"device-{number % 50}")
        calibration.update(interaction(context=where, candidates=some, chosen=1, reward=reward))
    return calibration, where


def test_the_fleet_remembers_as_much_of_each_device_as_the_device_itself() -> None:
    """Four in five decisions were bad, though none of the last two hundred."""
    calibration, where = standings_of_a_fleet([0.3] * 800 + [0.95] * 200)
    fleet, device = calibration.standings(where)
    assert fleet.reward / fleet.decisions == pytest.approx(0.43, abs=0.02)
    assert fleet.decisions == pytest.approx(50 * device.decisions, rel=0.02)
    assert fleet.credit(0.05) < 0
    mask = uncovered(np.array([0.8, 0.7]), 0.8, 0, 0.05, (fleet, Standing(50, 45.0, 40.0)))
    assert mask.tolist() == [False, True]


def test_the_devices_of_rows_from_before_they_were_counted_are_counted_as_they_come() -> None:
    calibration, where = standings_of_a_fleet([0.8] * 100)
    old = {scope: {key: row[key] for key in row if key != "devices"} for scope, row in calibration.rows().items()}
    again = Calibration.from_rows(old)
    assert again.standings(where) == calibration.standings(where)
    some = interaction(context=where, candidates=(replace(candidate(0, 0.8), action=ACTIONS[0]),))
    for _ in range(3):
        again.update(some)
    assert again.rows()["fleet"]["devices"] == 1
    assert Calibration.from_rows(again.rows()).rows() == again.rows()
    without_fleet = Calibration.from_rows({scope: row for scope, row in again.rows().items() if scope != "fleet"})
    without_fleet.update(some)
    assert without_fleet.standings(where)[0].decisions == 1
