"""The Vowpal Wabbit core on data that nobody here made: classification turned into a bandit."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.conversions import DataSet, best_fixed, data_set, margin, play
from selector.baselines import RandomPolicy
from selector.policy import Policy
from selector.vw import VowpalWabbitPolicy

# Rows and orders per data set: enough for the margin to be small, few enough to be quick.
SIZES = {"digits": (600, 1), "wine": (178, 3), "breast cancer": (300, 1), "iris": (150, 3)}


def streams(name: str) -> list[DataSet]:
    count, orders = SIZES[name]
    each = [data_set(name, seed) for seed in range(orders)]
    return [DataSet(name, data.rows[:count], data.labels[:count]) for data in each]


def last_halves(data: list[DataSet], policies: list[Policy]) -> tuple[float, int]:
    """Share of hits in the last halves, and how many decisions that were."""
    shares = [
        play(each, policy, seed).last_half for seed, (each, policy) in enumerate(zip(data, policies, strict=True))
    ]
    return float(np.mean(shares)), sum(len(each.labels) - len(each.labels) // 2 for each in data)


@pytest.mark.parametrize("name", SIZES)
def test_the_core_beats_the_best_fixed_class_by_more_than_luck(name: str) -> None:
    """Told only hit or miss. The margin is that of a one in a million chance; the best fixed class is no worse than
    choosing at random."""
    data = streams(name)
    share, count = last_halves(data, [VowpalWabbitPolicy() for _ in data])
    fixed = max(best_fixed(each) for each in data)
    assert fixed >= 1.0 / data[0].classes
    assert share > fixed + margin(fixed, count)


def test_choosing_at_random_stays_at_chance() -> None:
    data = streams("wine")
    share, count = last_halves(data, [RandomPolicy() for _ in data])
    assert abs(share - 1 / 3) < margin(1 / 3, count)
