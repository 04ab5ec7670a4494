"""Off-policy values: numbers worked out by hand, coverage, and intervals that tighten with evidence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from estimators.bandits import cressieread, cs, gaussian, ips
from estimators.bandits import snips as reference_snips
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special, stats

from selector import estimators
from selector.distributions import beta_cdf, log_lower_gamma, t_quantile
from selector.empirical_likelihood import cressie_read
from selector.errors import InvalidInput
from selector.sequences import off_policy_sequence

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


def varied(seed: int) -> dict[str, Any]:
    """A log over four actions under random logging and target policies, with real or binary rewards."""
    rng = np.random.default_rng(seed)
    logging, target = 0.05 + 0.8 * rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(4))
    count = int(rng.integers(2, 150))
    chosen = rng.choice(4, size=count, p=logging / logging.sum())
    rewards = rng.random(count) if seed % 2 else (rng.random(count) < 0.6).astype(float)
    return {"rewards": rewards, "propensities": (logging / logging.sum())[chosen], "targets": target[chosen]}


def told(reference: Any, log: dict[str, Any]) -> Any:
    for propensity, reward, target in zip(log["propensities"], log["rewards"], log["targets"], strict=True):
        reference.add_example(float(propensity), float(reward), float(target))
    return reference


@pytest.mark.parametrize("seed", range(12))
def test_values_and_intervals_agree_with_the_reference_implementation(seed: int) -> None:
    log = varied(seed)
    assert estimators.ips_terms(**log).mean() == pytest.approx(told(ips.Estimator(), log).get(), abs=1e-6)
    assert estimators.snips(**log) == pytest.approx(told(reference_snips.Estimator(), log).get(), abs=1e-6)
    largest = math.inf if seed % 3 == 0 else 20.0
    ours = cressie_read(**log, largest_weight=largest)
    assert ours.mean == pytest.approx(told(cressieread.Estimator(wmax=largest), log).get(), abs=1e-6)
    low, high = told(cressieread.Interval(wmax=largest), log).get(alpha=0.05)
    assert (ours.low, ours.high) == pytest.approx((min(low, ours.mean), max(high, ours.mean)), abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_t_intervals_are_the_reference_gaussian_ones_with_students_factor(seed: int) -> None:
    log = varied(seed)
    count = len(log["rewards"])
    low, high = told(gaussian.Interval(), log).get(alpha=0.05)
    ours = estimators.fixed_n(estimators.ips_terms(**log))
    factor = stats.t.ppf(0.975, count - 1) / stats.norm.ppf(0.975)
    assert ours.high - ours.low == pytest.approx(factor * (high - low), abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_confidence_sequences_agree_with_the_reference_while_its_guesses_are_valid(seed: int) -> None:
    """The reference also guesses above 1, which the theorem does not allow; with weights of at most 1.6 and rewards
    of at most 0.6 its guesses stay below."""
    rng = np.random.default_rng(seed)
    count = 120
    log: dict[str, Any] = {
        "rewards": 0.6 * rng.random(count) + 0.1,
        "propensities": np.full(count, 0.5),
        "targets": rng.choice([0.2, 0.8], size=count),
    }
    low, high = told(cs.Interval(), log).get(alpha=0.05)
    ours = off_policy_sequence(**log)
    weights = 2.0 * log["targets"]
    for terms in (weights * log["rewards"], weights * (1 - log["rewards"])):
        assert ((np.cumsum(terms) + 0.5) / np.arange(2, count + 2)).max() <= 1.0
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=1e-6)


def test_cressie_read_by_hand() -> None:
    """Weights 2 and 0 and an unseen 0: mean 2/3, variance 8/9, so the first decision's share is 1/2."""
    found = cressie_read([0.8, 0.5], [0.5, 0.5], [1.0, 0.0])
    assert found.mean == pytest.approx(0.5 * 2 * 0.8)
    assert (found.low, found.high) == (0.0, 1.0)


def test_one_decision_says_nothing() -> None:
    for interval in (cressie_read, off_policy_sequence):
        found = interval([1.0], [0.001], [1.0])
        assert (found.low, found.high) == (0.0, 1.0)


def test_cressie_read_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(8)
    runs, hits = 400, 0
    for _ in range(runs):
        estimate = cressie_read(**logged(rng, 300), largest_weight=2.5, smallest_weight=0.625)
        hits += estimate.low <= 0.5 <= estimate.high
    assert hits / runs >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / runs)


def test_cressie_read_is_tighter_than_a_gaussian_interval_and_with_more_data() -> None:
    """Where rewards hardly vary, the noise of the weights is most of what a Gaussian interval sees."""
    rng = np.random.default_rng(9)
    log = logged(rng, 4000)
    log["rewards"] = 0.7 + 0.1 * log["rewards"]
    widths = []
    for count in (200, 1000, 4000):
        part = {name: values[:count] for name, values in log.items()}
        found = cressie_read(**part, smallest_weight=0.625, largest_weight=2.5, low=0.7, high=0.8)
        plain = estimators.fixed_n(estimators.ips_terms(**part))
        assert found.high - found.low < plain.high - plain.low
        widths.append(found.high - found.low)
    assert widths[0] > widths[1] > widths[2]


def test_cressie_read_and_sequences_scale_with_their_bounds() -> None:
    log = varied(3)
    wide = {**log, "rewards": 4 * log["rewards"] - 1}
    for interval in (cressie_read, off_policy_sequence):
        unit, scaled = interval(**log), interval(**wide, low=-1.0, high=3.0)
        assert (scaled.low, scaled.high) == pytest.approx((4 * unit.low - 1, 4 * unit.high - 1), abs=1e-9)


def test_an_off_policy_sequence_survives_peeking() -> None:
    rng = np.random.default_rng(10)
    runs, missed = 60, 0
    for _ in range(runs):
        log = logged(rng, 400)
        found = [
            off_policy_sequence(**{name: values[:count] for name, values in log.items()}) for count in (25, 100, 400)
        ]
        missed += any(not each.low <= 0.5 <= each.high for each in found)
        assert found[2].high - found[2].low < found[0].high - found[0].low
    assert missed / runs <= 0.05


def test_cross_fitted_terms_are_right_and_less_noisy_than_weighted_rewards() -> None:
    rng = np.random.default_rng(11)
    logging, target, means = np.array([0.4, 0.3, 0.2, 0.1]), np.full(4, 0.25), np.array([0.2, 0.4, 0.6, 0.8])
    chosen = rng.choice(4, size=4000, p=logging)
    log: dict[str, Any] = {
        "rewards": np.clip(means[chosen] + rng.normal(0, 0.05, 4000), 0, 1),
        "propensities": logging[chosen],
        "targets": target[chosen],
    }
    terms = estimators.dr_cross_fitted(**log, features=np.eye(4)[chosen], target_features=np.tile(target, (4000, 1)))
    assert terms.mean() == pytest.approx(0.5, abs=4 * terms.std() / math.sqrt(4000))
    assert terms.std() < 0.5 * estimators.ips_terms(**log).std()


def test_a_cross_fitted_model_never_sees_the_device_that_it_corrects() -> None:
    """Where the target never goes, a term is the model alone: it must not move with the device's own rewards."""
    rng = np.random.default_rng(12)
    devices = [f"d{number % 4}" for number in range(40)]
    own = np.array([device == "d0" for device in devices])
    arrays: dict[str, Any] = {"propensities": np.full(40, 0.5), "targets": np.where(own, 0.0, 0.5)}
    features = rng.random((40, 3))
    rewards = rng.random(40)

    def terms(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return estimators.dr_cross_fitted(
            values, **arrays, features=features, target_features=features, clusters=devices, folds=4
        )

    assert terms(rewards)[own].tolist() == terms(np.where(own, 1.0 - rewards, rewards))[own].tolist()
    assert terms(rewards)[own].tolist() != terms(np.where(own, rewards, 1.0 - rewards))[own].tolist()


def test_distribution_functions_agree_with_scipy() -> None:
    for probability in (0.025, 0.6, 0.975, 0.9995):
        for freedom in (1, 2, 5, 30, 1000, 1e6):
            assert t_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-7)
    for x, a, b in ((0.4, 2, 3), (0.01, 0.5, 0.5), (0.3, 100, 200), (0.9999, 1e4, 2)):
        assert beta_cdf(x, a, b) == pytest.approx(special.betainc(a, b, x), abs=1e-10)
    for a, x in ((0.5, 0.1), (1, 5), (10, 3), (100.5, 101), (1000, 1100), (1e4, 1e4)):
        wanted = math.log(special.gammainc(a, x)) + special.gammaln(a)
        assert log_lower_gamma(a, x) == pytest.approx(wanted, rel=1e-9)


OUT_OF_RANGE: list[dict[str, Any]] = [
    {"rewards": [0.5, 0.5, 0.5, 1.5]},
    {"rewards": [0.5]},
    {"propensities": [0.0, 0.5, 0.5, 0.5]},
    {"targets": [math.nan] * 4},
    {"alpha": 0.0},
    {"low": 1.0},
]


@pytest.mark.parametrize("bad", [*OUT_OF_RANGE, {"largest_weight": 0.5}, {"smallest_weight": 2.0}])
def test_cressie_read_refuses_what_makes_no_sense(bad: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"rewards": REWARDS, "propensities": PROPENSITIES, "targets": TARGETS, **bad}
    with pytest.raises(InvalidInput):
        cressie_read(**arguments)


@pytest.mark.parametrize("bad", [*OUT_OF_RANGE, {"opening": -1.0}])
def test_off_policy_sequences_refuse_what_makes_no_sense(bad: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"rewards": REWARDS, "propensities": PROPENSITIES, "targets": TARGETS, **bad}
    with pytest.raises(InvalidInput):
        off_policy_sequence(**arguments)


@pytest.mark.parametrize(
    "bad",
    [
        {"features": np.ones((3, 1))},
        {"features": np.full((4, 1), math.inf)},
        {"features": [["a"], ["b"], ["c"], ["d"]]},
        {"features": [[1.0], [1.0, 2.0], [1.0], [1.0]]},
        {"target_features": np.ones((4, 2))},
        {"clusters": ["a", "b"]},
        {"clusters": [["a"], ["a", "b"], ["c"], ["d"]]},
        {"clusters": 3},
        {"folds": 1},
        {"folds": 2.5},
        {"folds": 5},
        {"ridge": 0.0},
    ],
)
def test_cross_fitting_refuses_what_makes_no_sense(bad: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "rewards": REWARDS,
        "propensities": PROPENSITIES,
        "targets": TARGETS,
        "features": np.ones((4, 1)),
        "target_features": np.ones((4, 1)),
        "folds": 2,
        **bad,
    }
    with pytest.raises(InvalidInput) as refused:
        estimators.dr_cross_fitted(**arguments)
    assert refused.value.field == next(iter(bad))


LOG: dict[str, Any] = {"rewards": REWARDS, "propensities": PROPENSITIES, "targets": TARGETS}
MODEL: dict[str, Any] = {"model": REWARDS, "model_target": REWARDS}


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize(
    ("estimator", "arguments"),
    [
        (estimators.ips_terms, LOG),
        (estimators.snips, LOG),
        (estimators.dr_terms, LOG | MODEL),
        (cressie_read, LOG),
        (off_policy_sequence, LOG),
    ],
)
def test_arrays_of_another_length_are_refused_never_stretched(
    estimator: Callable[..., object], arguments: dict[str, Any], length: int
) -> None:
    for field in arguments:
        with pytest.raises(InvalidInput):
            estimator(**arguments | {field: [0.5] * length})


@pytest.mark.parametrize("value", [math.nan, math.inf, "a", None, 10**400])
def test_what_is_no_finite_number_is_refused_by_name(value: Any) -> None:
    for field in LOG:
        with pytest.raises(InvalidInput, match=field):
            estimators.snips(**LOG | {field: [value, 0.5, 0.5, 0.5]})


def test_groups_of_another_length_are_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match="clusters"):
        estimators.fixed_n([1.0, 0.0, 1.0], ["a", "b"])
    with pytest.raises(InvalidInput, match="strata"):
        estimators.fixed_n_within([1.0, 0.0, 1.0], ["a", "b"])


@pytest.mark.parametrize("bad", [{"alpha": 0.0}, {"alpha": 3.0}, {"high": math.inf}, {"low": math.nan}, {"low": 2.0}])
def test_a_confidence_sequence_refuses_what_makes_no_sense(bad: dict[str, float]) -> None:
    with pytest.raises(InvalidInput):
        estimators.confidence_sequence(REWARDS, **bad)


@pytest.mark.parametrize("weights", [[math.nan, 1.0], [-1.0, 1.0], []])
def test_an_effective_sample_needs_weights(weights: list[float]) -> None:
    with pytest.raises(InvalidInput, match="weights"):
        estimators.effective_sample_size(weights)
