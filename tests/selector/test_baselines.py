"""What each baseline does with what it knows: hand-computed choices, sharing, shrinkage, bad settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.peers import BoostedResidualPolicy, FlatVowpalWabbitPolicy, NeuralResidualPolicy
from selector.baselines import FixedPerClassPolicy, FixedPolicy, PredictionPolicy
from selector.errors import InvalidInput
from selector.features import QOE_FROM_END, Features
from selector.interactions import Candidate, Context, Interaction, Measurement
from selector.linear import LinTsPolicy, LinUcbPolicy
from selector.policy import Policy
from selector.preferences import PreferencePolicy
from selector.residuals import Residuals
from selector.reward import QoeFormula
from selector.tabular import ThompsonPolicy, Ucb1Policy
from selector.tastes import TastePolicy
from tests.selector.builders import action, candidate, candidates, context, interaction, prediction


def best(policy: Policy, some: tuple[Candidate, ...], situation: Context | None = None) -> int:
    return int(np.argmax(policy.probabilities(situation or context(), some)))


def lesson(some: tuple[Candidate, ...], chosen: int, reward: float, **changes: Any) -> Interaction:
    return interaction(candidates=some, chosen=chosen, reward=reward, **changes)


def test_a_fixed_policy_falls_back_in_order() -> None:
    policy = FixedPolicy("gone/b1c1t1", [action(2).key, action(1).key])
    assert best(policy, candidates(0.5, 0.6, 0.7)) == 2
    assert best(policy, candidates(0.5, 0.6)) == 1
    assert policy.probabilities(context(), candidates(0.5)).tolist() == [1.0]


def test_each_class_has_its_own_fixed_action() -> None:
    policy = FixedPerClassPolicy({"pi4": [action(1).key], "nuc": ["gone/b1c1t1", action(2).key]}, [action(0).key])
    some = candidates(0.5, 0.5, 0.5)
    chosen = [best(policy, some, context(device_class=each)) for each in ("pi4", "nuc", "unheard-of")]
    assert chosen == [1, 2, 0]
    nowhere = FixedPerClassPolicy({"pi4": ["gone/b1c1t1"]})
    assert nowhere.probabilities(context(), some).tolist() == [1 / 3] * 3


def test_ucb1_tries_everything_once_and_then_follows_its_index() -> None:
    """Width 0.5. After 2, 1 and 1 tries of means 0.6, 0.5 and 0.3 the indices are 1.19, 1.33 and 1.13; after one more
    0.5 for the second they are 1.23, 1.13 and 1.20."""
    policy, some = Ucb1Policy(width=0.5), candidates(0.9, 0.5, 0.1)
    for tried, reward in enumerate((0.6, 0.5, 0.3)):
        shares = policy.probabilities(context(), some)
        assert shares[tried:].sum() > 0.99
        policy.learn(lesson(some, tried, reward))
    for expected, reward in ((0, 0.6), (1, 0.5), (0, 0.6)):
        assert best(policy, some) == expected
        policy.learn(lesson(some, expected, reward))


@pytest.mark.parametrize("make", [Ucb1Policy, ThompsonPolicy])
def test_tables_are_shared_by_whoever_agrees_in_their_fields(make: Callable[..., Policy]) -> None:
    some, other = candidates(0.5, 0.5), context(device="device-2")
    for by, is_shared in ((("device", "application"), False), (("device_class",), True)):
        policy = make(by=by)
        untouched = policy.probabilities(other, some).tolist()
        for number in range(40):
            policy.learn(lesson(some, number % 2, 0.9 if number % 2 else 0.1))
        assert best(policy, some) == 1
        assert (policy.probabilities(other, some).tolist() != untouched) == is_shared


def test_thompson_sampling_gives_up_what_is_surely_worse_and_keeps_what_is_unknown() -> None:
    policy, some = ThompsonPolicy(noise_sd=0.2, prior=0.5), candidates(0.5, 0.5, 0.5)
    for _ in range(60):
        policy.learn(lesson(some, 0, 0.6))
        policy.learn(lesson(some, 1, 0.2))
    worse_than_known, unknown = policy.probabilities(context(), some)[1:]
    assert worse_than_known < 0.001
    assert 0.1 < unknown < 0.5


@pytest.mark.parametrize("make", [LinUcbPolicy, LinTsPolicy])
def test_linear_policies_with_the_prediction_start_from_it(make: Callable[..., Policy]) -> None:
    policy = make(alpha=0.01, with_prediction=True)
    assert best(policy, candidates(0.5, 0.8, 0.6)) == 1
    assert best(policy, candidates(0.9, 0.8, 0.6)) == 0


@pytest.mark.parametrize("make", [LinUcbPolicy, LinTsPolicy])
def test_linear_policies_share_what_one_device_taught(make: Callable[..., Policy]) -> None:
    policy, some = make(alpha=0.05), candidates(0.5, 0.5, 0.5)
    for number in range(60):
        policy.learn(lesson(some, number % 3, 0.9 if number % 3 == 2 else 0.3))
    assert best(policy, some, context(device="never-seen")) == 2


@pytest.mark.parametrize("make", [LinUcbPolicy, LinTsPolicy])
def test_linear_policies_tell_classes_of_devices_apart(make: Callable[..., Policy]) -> None:
    policy, some = make(alpha=0.02), (candidate(0), candidate(1, action=action(1, precision="int8")))
    for number in range(120):
        chosen, is_first = number % 2, number % 4 < 2
        situation = context(device_class="pi4" if is_first else "nuc")
        policy.learn(lesson(some, chosen, 0.8 if is_first == (chosen == 0) else 0.4, context=situation))
    assert [best(policy, some, context(device_class=each)) for each in ("pi4", "nuc")] == [0, 1]


def test_names_get_columns_when_they_are_learnt_and_never_more_than_there_are() -> None:
    features, some = Features(with_prediction=False), candidates(0.5, 0.6)
    unheard_of = features.rows(context(), some)
    features.learn(context(features={"battery": 0.5, "network": "wifi"}), some[1])
    known = features.rows(context(features={"battery": 0.5}), some)
    assert known.shape == unheard_of.shape == (2, features.width)
    assert np.flatnonzero(known[1]).size > np.flatnonzero(unheard_of[1]).size
    for number in range(100):
        features.learn(context(device_class=f"class-{number}"), candidate(number))
    assert features.rows(context(device_class="class-99"), some).shape == (2, features.width)
    stored = Features.from_state(False, features.state())
    assert stored.rows(context(), some).tolist() == features.rows(context(), some).tolist()


def test_residuals_are_shrunk_and_taken_level_by_level() -> None:
    """First everything is new: each level takes the whole 0.3 and tells a third of it. Then fleet, device and variant
    leave 0.3 - 0.1, 0.2 - 0.1 and 0.1 - 0.1."""
    known = Residuals()
    known.learn("d1", "staff", "v1", "v1/b1", 0.3)
    first = known.columns("d1", "staff", ["v1", "v2"], ["v1/b1", "v2/b1"])
    assert first == pytest.approx(np.array([[0.1, 0.1, 0.1, 0.1], [0.1, 0.0, 0.0, 0.0]]))
    known.learn("d1", "staff", "v1", "v1/b1", 0.3)
    device, variant, group, action_itself = known.columns("d1", "staff", ["v1"], ["v1/b1"])[0]
    assert (device, group) == pytest.approx((0.5 * (0.3 + 0.2) / 2, 0.5 * (0.3 + 0.1) / 2))
    assert (variant, action_itself) == pytest.approx((0.5 * (0.3 + 0.1) / 2, 0.5 * (0.3 + 0.0) / 2))
    elsewhere = known.columns("d2", "staff", ["v1"], ["v1/b1"])[0]
    assert elsewhere == pytest.approx([0.0, 0.0, group, 0.0])
    assert Residuals.from_state(known.state()).state() == known.state()


@pytest.mark.parametrize("with_prediction", [False, True])
def test_history_tells_devices_groups_and_the_baseline_apart(with_prediction: bool) -> None:
    plain, told = Features(with_prediction), Features(with_prediction, with_history=True)
    some = candidates(0.5, 0.6)
    here = context(features={"group": "staff"}, baseline=some[1].action.key)
    for features in (plain, told):
        features.learn(here, some[0])
        features.remember(here, some[0], 0.9)
    there = context(device="device-2", features={"group": "staff"}, baseline=some[0].action.key)
    assert plain.rows(here, some).tolist() == plain.rows(there, some).tolist()
    differ = np.flatnonzero((told.rows(here, some) != told.rows(there, some)).any(axis=0))
    assert len(differ) == 4  # device, its variant, its action, the baseline; not the group
    assert told.rows(here, some).shape == (2, told.width)


def test_the_taste_policy_takes_the_bonus_into_account() -> None:
    some = candidate(0, 0.7), candidate(1, prediction=prediction(0.65, bonus=0.1))
    assert (best(TastePolicy(), some), best(PredictionPolicy(), some)) == (1, 0)


def test_flat_vowpal_wabbit_is_told_the_baseline_if_wanted() -> None:
    """Whichever action is the baseline is good: only the standing tells it."""
    some, shares = candidates(0.5, 0.5), []
    for with_standing in (False, True):
        policy = FlatVowpalWabbitPolicy(
            "--cb_explore_adf --epsilon 0.01 -l 0.5 --power_t 0 --cb_type mtr",
            learns_all_lines=False,
            with_standing=with_standing,
        )
        for number in range(200):
            situation = context(baseline=some[number // 2 % 2].action.key)
            is_baseline = number % 2 == number // 2 % 2
            policy.learn(lesson(some, number % 2, 0.9 if is_baseline else 0.2, context=situation))
        shares.append([policy.probabilities(context(baseline=each.action.key), some) for each in some])
    assert np.array_equal(shares[0][0], shares[0][1])
    assert [int(np.argmax(each)) for each in shares[1]] == [0, 1]


def test_the_prediction_is_last_and_bounded() -> None:
    features = Features(with_prediction=True)
    wild = candidate(0, prediction=prediction(7.0, p95_ms=1e15, cpu_ms_per_request=1e15))
    rows = features.rows(context(arrival_rate_rps=1e9, slo_p95_ms=1e-6), [wild])
    assert rows[0, -QOE_FROM_END] == 1.0
    assert np.abs(rows).max() <= 9.0


def test_a_wider_confidence_prefers_what_was_tried_less() -> None:
    """Few tries of a slightly worse action: its upper bound is above, its mean below."""
    some = candidates(0.5, 0.5)
    bold, timid = LinUcbPolicy(alpha=5.0), LinUcbPolicy(alpha=0.0)
    for policy in (bold, timid):
        for number in range(51):
            policy.learn(lesson(some, int(number == 50), 0.55 if number == 50 else 0.6))
    assert (best(bold, some), best(timid, some)) == (1, 0)


def test_linear_policies_stay_sound_over_thousands_of_alike_decisions() -> None:
    """Rows that hardly differ drive the inverse towards singular: distributions must stay distributions."""
    policies: tuple[Policy, ...] = LinUcbPolicy(ridge=0.01, with_prediction=True), LinTsPolicy(ridge=0.01)
    some = candidates(0.6, 0.6)
    for number in range(3000):
        entry = lesson(some, number % 2, 0.7 if number % 2 else 0.5)
        for policy in policies:
            policy.learn(entry)
    for policy in policies:
        shares = policy.probabilities(context(), some)
        assert np.isfinite(shares).all()
        assert shares[1] > 0.9


ACCURATE, FAST = (
    candidate(0, prediction=prediction(0.70, slo_hit_share=0.80)),
    candidate(5, prediction=prediction(0.72, slo_hit_share=0.98)),
)
FORMULA = QoeFormula(slo_p95_ms=60.0, accuracy_floor=0.8)


def rated(device: str, number: int, **changes: Any) -> Interaction:
    """Users of this device care for accuracy only: variant 0 pleases them, the faster variant 5 does not."""
    chosen = number % 2
    measured = Measurement(requests=100, slo_hit_share=(0.80, 0.98)[chosen], cpu_ms_per_request=5.0, rating=0.9)
    measured = replace(measured, rating=(0.95, 0.35)[chosen], ratings=5)
    taken = (ACCURATE, FAST)[chosen]
    reward = FORMULA.reward(measured, taken.action.variant.accuracy)
    made = lesson((ACCURATE, FAST), chosen, reward, measurement=measured, context=context(device=device))
    return replace(made, **changes)


@pytest.mark.parametrize("formulas", [{"digits": FORMULA}, None])
def test_ratings_turn_the_choice_of_a_device_and_shrink_towards_its_class(formulas: Any) -> None:
    policy, other_class = PreferencePolicy(formulas), context(device="device-3", device_class="nuc")
    pair = (ACCURATE, FAST)
    assert best(policy, pair) == 1
    for number in range(30):
        policy.learn(rated("device-1", number))
    assert best(policy, pair) == 0
    same_class = context(device="device-2")
    accuracy = [policy.correction(each)[2] for each in (context(), same_class, other_class)]
    assert accuracy[0] > accuracy[1] > accuracy[2] > 0
    assert policy.correction(context(application="other")).tolist() == [0.0] * 4


def test_what_was_measured_explains_the_reward_and_noise_in_latency_is_no_preference() -> None:
    """Rewards that are just the declared worth of what was measured teach nothing, however far from the prediction."""
    rng = np.random.default_rng(1)
    policy = PreferencePolicy({"digits": FORMULA})
    for _ in range(30):
        measured = Measurement(requests=100, slo_hit_share=float(rng.random()), cpu_ms_per_request=5.0)
        reward = FORMULA.reward(measured, FAST.action.variant.accuracy)
        policy.learn(lesson((FAST,), 0, reward, measurement=measured))
    assert np.abs(policy.correction(context())).max() < 1e-9


def test_a_failed_lease_says_nothing_about_preferences() -> None:
    policy = PreferencePolicy()
    before = policy.to_bytes()
    policy.learn(lesson((FAST,), 0, 0.0, measurement=Measurement(requests=5, errors=5, failed=True)))
    assert policy.to_bytes() == before


@pytest.mark.parametrize("make", [NeuralResidualPolicy, BoostedResidualPolicy])
def test_residual_peers_follow_the_prediction_until_they_were_fitted(make: Callable[[], Policy]) -> None:
    policy = make()
    policy.learn(lesson(candidates(0.6, 0.8), 0, 1.0))
    assert best(policy, candidates(0.6, 0.8)) == 1


def test_the_hosted_default_explores_a_fifth_of_the_time() -> None:
    policy, some = FlatVowpalWabbitPolicy(), candidates(0.5, 0.5, 0.5, 0.5)
    assert policy.probabilities(context(), some).tolist() == [0.25] * 4
    policy.learn(lesson(some, 2, 1.0))
    shares = policy.probabilities(context(), some)
    assert int(np.argmax(shares)) == 2
    assert shares[2] == pytest.approx(0.8 + 0.2 / 4, abs=1e-5)


BAD_SETTINGS: list[tuple[Callable[[], object], str]] = [
    (lambda: FixedPolicy(""), "action"),
    (lambda: FixedPolicy("a", [""]), "action"),
    (lambda: FixedPerClassPolicy({"": ["a"]}), "device_class"),
    (lambda: Ucb1Policy(width=float("nan")), "width"),
    (lambda: Ucb1Policy(epsilon=0.0), "epsilon"),
    (lambda: Ucb1Policy(by=("battery",)), "by"),
    (lambda: Ucb1Policy(by="device"), "by"),
    (lambda: Ucb1Policy(by=()), "by"),
    (lambda: ThompsonPolicy(noise_sd=0.0), "noise_sd"),
    (lambda: ThompsonPolicy(prior=2.0), "prior"),
    (lambda: LinUcbPolicy(alpha=-1.0), "alpha"),
    (lambda: LinTsPolicy(ridge=0.0), "ridge"),
    (lambda: PreferencePolicy(noise_sd=-0.1), "noise_sd"),
    (lambda: PreferencePolicy(drift_sd=float("inf")), "drift_sd"),
    (lambda: NeuralResidualPolicy(seed=-1), "seed"),
    (lambda: FlatVowpalWabbitPolicy("--epsilon 0.1"), "arguments"),
    (lambda: FlatVowpalWabbitPolicy("--cb_explore_adf -f /tmp/model"), "arguments"),
]


@pytest.mark.parametrize(("make", "field"), BAD_SETTINGS)
def test_bad_settings_are_refused_by_name(make: Callable[[], object], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        make()
    assert refused.value.field == field
