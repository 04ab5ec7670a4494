"""Off-policy values: numbers worked out by hand, coverage, and intervals that tighten with evidence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from selector import estimators
from selector.errors import InvalidInput

REWARDS, PROPENSITIES, TARGETS = [1.0, 0.5, 0.0, 0.8], [0.5, 0.25, 0.5, 0.8], [1.0, 0.0, 0.5, 0.4]
WEIGHTS = [2.0, 0.0, 1.0, 0.5]


def test_inverse_propensity_by_hand() -> None:
    assert estimators.ips_terms(REWARDS, PROPENSITIES, TARGETS).tolist() == pytest.approx([2.0, 0.0, 0.0, 0.4])


def test_self_normalised_by_hand() -> None:
    assert estimators.snips(REWARDS, PROPENSITIES, TARGETS) == pytest.approx(2.4 / 3.5)


def test_doubly_robust_by_hand() -> None:
    terms = estimators.dr_terms(REWARDS, PROPENSITIES, TARGETS, model=[0.9, 0.5, 0.1, 0.8], model_target=[0.7] * 4)
    assert terms.tolist() == pytest.approx([0.7 + 2 * 0.1, 0.7, 0.7 - 0.1, 0.7])


def test_effective_sample_size_by_hand() -> None:
    assert estimators.effective_sample_size(WEIGHTS) == pytest.approx(3.5**2 / 5.25)
    assert estimators.effective_sample_size([0.0, 0.0]) == 0.0


def test_a_clustered_error_by_hand() -> None:
    """Two devices with means 0 and 1 and two decisions each: error 0.5, one degree of freedom."""
    estimate = estimators.fixed_n([0.0, 0.0, 1.0, 1.0], ["a", "a", "b", "b"])
    assert estimate.mean == 0.5
    assert estimate.high - estimate.mean == pytest.approx(12.7062 * 0.5, rel=1e-4)


def test_one_device_gives_no_interval() -> None:
    estimate = estimators.fixed_n([0.0, 1.0], ["a", "a"])
    assert (estimate.low, estimate.high) == (-math.inf, math.inf)


def test_lift_by_hand() -> None:
    lift = estimators.paired_lift([0.9, 0.7], [0.5, 0.5], [0.5, 0.5], model=[0.8, 0.8], model_target=[0.6, 0.6])
    assert lift.mean == pytest.approx(((0.9 - 0.7) + (0.7 - 0.5)) / 2)
    assert lift.effective_sample_size == pytest.approx(2.0)


def logged(rng: np.random.Generator, count: int) -> dict[str, Any]:
    """Four actions of mean 0.2 to 0.8, logged by one policy and valued under another: true value 0.5."""
    logging, target, means = np.array([0.4, 0.3, 0.2, 0.1]), np.full(4, 0.25), np.array([0.2, 0.4, 0.6, 0.8])
    chosen = rng.choice(4, size=count, p=logging)
    return {
        "rewards": (rng.random(count) < means[chosen]).astype(float),
        "propensities": logging[chosen],
        "targets": target[chosen],
    }


def test_every_estimator_finds_the_value_of_another_policy() -> None:
    log = logged(np.random.default_rng(1), 40_000)
    wrong_model = np.full(40_000, 0.3)
    assert estimators.ips_terms(**log).mean() == pytest.approx(0.5, abs=0.03)
    assert estimators.snips(**log) == pytest.approx(0.5, abs=0.03)
    assert estimators.dr_terms(**log, model=wrong_model, model_target=wrong_model).mean() == pytest.approx(
        0.5, abs=0.03
    )


def test_fixed_n_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(300):
        offsets = rng.normal(0, 0.2, 15)
        terms = np.repeat(offsets, 10) + rng.normal(0, 0.3, 150)
        estimate = estimators.fixed_n(terms, np.repeat([f"d{n}" for n in range(15)], 10).tolist())
        hits += estimate.low <= 0.0 <= estimate.high
    assert 0.95 - 5 * math.sqrt(0.95 * 0.05 / 300) <= hits / 300 <= 1.0


def test_ignoring_the_devices_would_claim_too_much() -> None:
    rng = np.random.default_rng(3)
    terms = np.repeat(rng.normal(0, 1, 20), 50)
    clustered = estimators.fixed_n(terms, np.repeat([f"d{n}" for n in range(20)], 50).tolist())
    naive = estimators.fixed_n(terms)
    assert clustered.high - clustered.low > 5 * (naive.high - naive.low)


def test_a_confidence_sequence_survives_peeking() -> None:
    """Looked at 20 times in each of 150 logs; a fixed interval misses far more often."""
    rng = np.random.default_rng(4)
    missed = fixed_missed = 0
    for _ in range(150):
        terms = (rng.random(400) < 0.3).astype(float)
        looks = range(20, 401, 20)
        anytime = [estimators.confidence_sequence(terms[:n]) for n in looks]
        missed += any(not each.low <= 0.3 <= each.high for each in anytime)
        fixed = [estimators.fixed_n(terms[:n]) for n in looks]
        fixed_missed += any(not each.low <= 0.3 <= each.high for each in fixed)
    assert missed / 150 <= 0.05
    assert fixed_missed / 150 > 0.1


@pytest.mark.parametrize("interval", [estimators.fixed_n, estimators.confidence_sequence])
def test_more_evidence_gives_a_tighter_interval(interval: Callable[[NDArray[np.float64]], estimators.Estimate]) -> None:
    terms = np.random.default_rng(5).random(5000)
    widths = [interval(terms[:count]).high - interval(terms[:count]).low for count in (50, 500, 5000)]
    assert widths[0] > widths[1] > widths[2]
    assert widths[2] < 0.1


def test_a_confidence_sequence_scales_with_its_bounds() -> None:
    terms = np.random.default_rng(6).random(300)
    unit, wide = estimators.confidence_sequence(terms), estimators.confidence_sequence(terms * 4 - 1, -1.0, 3.0)
    assert wide.low == pytest.approx(unit.low * 4 - 1)
    assert wide.high == pytest.approx(unit.high * 4 - 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_intervals_contain_their_mean(terms: list[float]) -> None:
    for estimate in (estimators.fixed_n(terms), estimators.confidence_sequence(terms)):
        assert estimate.low <= estimate.mean <= estimate.high


BAD = [
    {"rewards": [math.nan] * 4},
    {"propensities": [0.0, 0.5, 0.5, 0.5]},
    {"propensities": [1.5, 0.5, 0.5, 0.5]},
    {"targets": [-0.1, 0.5, 0.5, 0.5]},
    {"targets": [0.5]},
    {"rewards": []},
]


@pytest.mark.parametrize("bad", BAD)
def test_bad_arrays_are_refused(bad: dict[str, list[float]]) -> None:
    arrays = {"rewards": REWARDS, "propensities": PROPENSITIES, "targets": TARGETS, **bad}
    with pytest.raises(InvalidInput):
        estimators.ips_terms(**arrays)


def test_terms_outside_their_bounds_are_refused() -> None:
    with pytest.raises(InvalidInput):
        estimators.confidence_sequence([0.5, 1.5])


def test_intervals_within_devices_hold_the_mean_of_these_devices_about_95_times_in_100() -> None:
    rng = np.random.default_rng(5)
    levels = np.array([0.2, 0.5, 0.9])
    devices = [name for name in "abc" for _ in range(12)]
    truth, runs = float(levels.mean()), 800
    held = 0
    for _ in range(runs):
        found = estimators.fixed_n_within(np.repeat(levels, 12) + rng.normal(0, 0.1, 36), devices)
        held += found.low <= truth <= found.high
    # Three standard errors of a share of 0.95 over the runs.
    assert abs(held / runs - 0.95) < 3 * (0.95 * 0.05 / runs) ** 0.5


def test_differences_between_devices_widen_only_the_interval_about_other_devices() -> None:
    terms = np.array([0.1, 0.2, 0.8, 0.9])
    within, between = estimators.fixed_n_within(terms, list("aabb")), estimators.fixed_n(terms, list("aabb"))
    assert within.high - within.low < 0.5 * (between.high - between.low)


def test_one_decision_each_says_nothing_within_devices_that_it_does_not_say_between_them() -> None:
    assert np.isinf(estimators.fixed_n_within([0.5], ["a"]).high)
    assert np.isfinite(estimators.fixed_n_within([0.1, 0.9], ["a", "b"]).high)
