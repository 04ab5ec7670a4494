"""Effects of fleet, classes and devices: what is learnt step by step is what all leases together tell."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from selector.actions import action_table
from selector.effects import CONDITIONS, QUANTITIES, SERVICE, TAIL, effect_table, names_of, prior_variance
from selector.errors import InvalidInput
from selector.hierarchy import MOST_EFFECTS, Level, learn, shares, sums
from tests.selector.builders import grid

Floats = NDArray[np.float64]
ACTIONS = grid()
TABLE = effect_table(action_table(ACTIONS), ("device",) * len(ACTIONS))
# The first letter is the class.
DEVICES = ("a1", "a2", "a3", "b1", "b2")


@dataclass
class Fleet:
    """Levels of all scopes, what they were told, and the posterior of it all at once."""

    levels: dict[str, Level] = field(default_factory=lambda: {"fleet": Level(0)})
    told: list[tuple[str, str, dict[str, float], float, float]] = field(default_factory=list)

    def chain(self, device: str) -> list[Level]:
        group = self.levels.setdefault(device[0], Level(1))
        return [self.levels["fleet"], group, self.levels.setdefault(device, Level(2))]

    def tell(self, device: str, quantity: str, weights: dict[str, float], came: float, noise: float) -> None:
        levels = self.chain(device)
        for depth, level in enumerate(levels):
            level.hear_of(weights, len(self.told), levels[:depth])
        place = QUANTITIES.index(quantity)
        learn(place, shares(levels, place, weights), came, noise)
        self.told.append((device, quantity, weights, came, noise))

    def row(self, device: str, weights: dict[str, float], quantity: str, place: dict[tuple[str, str], int]) -> Floats:
        """Weights of all effects of all scopes; a new one gets a place."""
        design = np.zeros(1000)
        for scope in ("fleet", device[0], device):
            for name, weight in weights.items():
                design[place.setdefault((scope, name), len(place))] = weight
        return design

    def posterior(self, device: str, quantity: str, asked: list[dict[str, float]]) -> tuple[Floats, Floats]:
        place: dict[tuple[str, str], int] = {}
        told = [each for each in self.told if each[1] == quantity]
        design = np.array([self.row(who, weights, quantity, place) for who, _, weights, _, _ in told])
        questions = np.array([self.row(device, weights, quantity, place) for weights in asked])
        depth = {"fleet": 0, "a": 1, "b": 1}
        prior = np.array([prior_variance(quantity, name)[depth.get(scope, 2)] for scope, name in place])
        design, questions = design[:, : len(place)], questions[:, : len(place)]
        came, noise = np.array([each[3] for each in told]), np.array([each[4] for each in told])
        covariance = np.linalg.inv(np.diag(1 / prior) + design.T @ (design / noise[:, None]))
        return (
            questions @ covariance @ design.T @ (came / noise),
            np.einsum("ij,jk,ik->i", questions, covariance, questions),
        )


def weights_of(index: int, heat: float, load: float) -> dict[str, float]:
    return dict.fromkeys(names_of("device", ACTIONS[index]), 1.0) | dict(zip(CONDITIONS, (heat, load), strict=True))


@pytest.fixture(scope="module")
def taught() -> Fleet:
    """120 leases of five devices; one action, one device and one class come late."""
    rng, fleet = np.random.default_rng(5), Fleet()
    for number in range(120):
        device = DEVICES[int(rng.integers(3 if number < 60 else 5))]
        weights = weights_of(int(rng.integers(len(ACTIONS) - 1)), *rng.uniform(-1, 1, 2).round(6))
        quantity = QUANTITIES[int(rng.integers(2))]
        fleet.tell(device, quantity, weights, float(rng.normal(0.4, 0.5)), float(rng.uniform(0.01, 0.2)))
    return fleet


@pytest.mark.parametrize("quantity", [SERVICE, TAIL])
@pytest.mark.parametrize("device", ["a1", "b2", "a-new"])
def test_all_actions_are_known_as_well_as_all_leases_of_the_fleet_together_tell(
    taught: Fleet, device: str, quantity: str
) -> None:
    asked = [weights_of(index, 0.7, -0.4) for index in range(len(ACTIONS))]
    mean, variance = sums(taught.chain(device), TABLE, (0.7, -0.4))  # the new device's level is empty
    expected = taught.posterior(device, quantity, asked)
    place = QUANTITIES.index(quantity)
    assert mean[place] == pytest.approx(expected[0], abs=1e-4)
    assert variance[place] == pytest.approx(expected[1], rel=1e-3, abs=1e-5)


def test_what_a_quantity_was_not_told_it_does_not_know(taught: Fleet) -> None:
    mean, variance = sums(taught.chain("a1"), TABLE, (0.0, 0.0))
    nothing_known = sums([Level(0), Level(1), Level(2)], TABLE, (0.0, 0.0))
    assert mean[2] == pytest.approx(0.0)
    assert variance[2] == pytest.approx(nothing_known[1][2])


def test_a_level_goes_on_from_its_row_as_if_it_had_never_been_written(taught: Fleet) -> None:
    again = {
        scope: Level.from_row(scope, level.depth, json.loads(json.dumps(level.as_row())))
        for scope, level in taught.levels.items()
    }
    fleet = Fleet(again, list(taught.told))
    assert (
        sums(fleet.chain("a2"), TABLE, (0.5, 0.1))[0].tolist()
        == sums(taught.chain("a2"), TABLE, (0.5, 0.1))[0].tolist()
    )
    assert {scope: level.as_row() for scope, level in again.items()} == {
        scope: level.as_row() for scope, level in taught.levels.items()
    }


def taught_variants(levels: list[Level], count: int) -> None:
    """Each variant in turn takes e^0.5 of what was expected, on one device."""
    for number in range(count):
        weights = {"overall:own": 1.0, f"variant:own:{number:012x}": 1.0}
        for depth, level in enumerate(levels):
            level.hear_of(weights, number, levels[:depth])
        learn(0, shares(levels, 0, weights), 0.5, 0.01)


def mean_of(levels: list[Level], weights: dict[str, float]) -> float:
    return sum(share.mean for share in shares(levels, 0, weights))


def test_a_full_scope_forgets_what_it_has_not_heard_of_for_longest_and_expects_the_same_of_the_others() -> None:
    levels = [Level(0), Level(1), Level(2)]
    most = MOST_EFFECTS[2]
    taught_variants(levels, most - 1)
    first, second, last = (f"variant:own:{number:012x}" for number in (0, 1, most - 2))
    asked = {"overall:own": 1.0, last: 1.0}
    before = mean_of(levels, asked)
    levels[2].hear_of(["overall:own", first], most, levels[:2])
    levels[2].hear_of(["overall:own", "variant:own:new"], most + 1, levels[:2])
    assert len(levels[2].place) == most
    assert first in levels[2].place
    assert second not in levels[2].place
    assert second in levels[1].place
    assert mean_of(levels, asked) == pytest.approx(before, abs=1e-5)
    own = np.abs(levels[2].loadings[0]).sum(axis=0)
    assert own[levels[2].place[last]] > 0
    assert own[levels[2].place["variant:own:new"]] == 0


def test_what_a_class_has_forgotten_still_counts_for_device_and_fleet() -> None:
    """As much as the device's effects depend on it, for one action as for all of a table."""
    levels = [Level(0), Level(1), Level(2)]
    weights = weights_of(0, 0.3, 0.2)
    for number in range(30):
        for depth, level in enumerate(levels):
            level.hear_of(weights, number, levels[:depth])
        learn(0, shares(levels, 0, weights), 1.0, 0.01)
    levels[1] = Level(1)
    assert mean_of(levels, weights) == pytest.approx(1.0, abs=0.15)
    assert sums(levels, TABLE, (0.3, 0.2))[0][0][0] == pytest.approx(mean_of(levels, weights), abs=1e-5)


def test_nobody_wanders_further_than_they_were_at_first() -> None:
    level, name = Level(2), "variant:own:000000000000"
    level.hear_of([name], 1, [])
    learn(0, shares([level], 0, {name: 1.0}), 0.3, 1e-4)
    known = shares([level], 0, {name: 1.0})[0].variance
    for _ in range(5000):
        level.wander(0, [name])
    wandered = shares([level], 0, {name: 1.0})[0].variance
    assert known < 0.1 * wandered
    assert wandered == pytest.approx(prior_variance(SERVICE, name)[2])


@pytest.mark.parametrize("count", [300, 3000])
def test_a_difference_is_learnt_anew_however_long_it_was_none(count: int) -> None:
    level, batches = Level(2), ("batch:1", "batch:4")
    for number in range(count):
        weights = {"overall:own": 1.0, batches[number % 2]: 1.0}
        level.hear_of(weights, number, [])
        level.wander(0, weights)
        learn(0, shares([level], 0, weights), 0.0, 0.02)
    for number in range(60):
        weights = {"overall:own": 1.0, batches[number % 2]: 1.0}
        level.wander(0, weights)
        learn(0, shares([level], 0, weights), 0.1 * (number % 2), 0.02)
    difference = sum(share.mean for share in shares([level], 0, {"batch:4": 1.0, "batch:1": -1.0}))
    assert 0.03 < difference < 0.1


DAMAGED = [
    ({"names": "overall:own"}, "names"),
    ({"names": ["overall:own", "overall:own"], "used": [1, 1]}, "used"),
    ({"names": ["speed:own"], "used": [1]}, "names"),
    ({"used": [1.5]}, "used"),
    ({"used": []}, "used"),
    ({"mean": "AAAA"}, "mean"),
    ({"mean": "not base64"}, "mean"),
    ({"mean": None}, "mean"),
    ({"covariance": "AACAvwAAgL8AAIC/"}, "covariance"),
    ({"covariance": "AADAfwAAwH8AAMB/"}, "covariance"),
    ({"loadings": "AACAfwAAgH8AAIB/"}, "loadings"),
    ({"loadings": None}, "loadings"),
]


@pytest.mark.parametrize(("change", "named"), DAMAGED)
def test_a_damaged_row_is_refused_naming_what_is_wrong(change: dict[str, object], named: str) -> None:
    level = Level(1)
    level.hear_of(["overall:own"], 1, [])
    assert Level.from_row("effects", 1, level.as_row()).as_row() == level.as_row()
    with pytest.raises(InvalidInput, match=named):
        Level.from_row("effects", 1, level.as_row() | change)
