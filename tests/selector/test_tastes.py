"""What users like beyond the prediction: learnt of devices, believed of those that are like them, doubted where it is
noise."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selector import tastes as module
from selector.errors import InvalidInput
from selector.interactions import Action, Candidate, Context
from selector.policy import Policy
from selector.tastes import TastePolicy, Tastes
from selector.trust import Trust
from selector.vw import VowpalWabbitPolicy
from tests.selector.builders import action, candidate, candidates, context, interaction, prediction, variant

PAIR = candidates(0.6, 0.6)
THREE = candidates(0.6, 0.6, 0.6)


def taught(*likes: float, rounds: int = 20, where: Context | None = None, tastes: Tastes | None = None) -> Tastes:
    """So many leases of each of the candidates, each worth so much more than predicted."""
    tastes = tastes or Tastes()
    some = candidates(*[0.6] * len(likes))
    for _ in range(rounds):
        for each, like in zip(some, likes, strict=True):
            tastes.learn(where or context(), each, like)
    return tastes


def lead(tastes: Tastes, where: Context) -> float:
    """By how much the second of two candidates is liked better."""
    mean = tastes.liking(where, PAIR).mean
    return float(mean[1] - mean[0])


def test_nothing_is_liked_before_anything_is_learnt_but_everything_is_hoped_for() -> None:
    liking = Tastes().liking(context(), THREE)
    assert liking.mean.tolist() == [0, 0, 0]
    assert (liking.hope > 0).all()


def test_what_a_device_likes_is_expected_of_its_like_and_less_so_of_others() -> None:
    tastes = taught(-0.1, 0.1)
    own = lead(tastes, context())
    kin = lead(tastes, context(device="device-2"))
    stranger = lead(tastes, context(device="device-2", device_class="nuc"))
    elsewhere = lead(tastes, context(device="device-2", device_class="nuc", application="other"))
    assert 0.2 > own > 0.15 > kin > stranger > elsewhere == 0


def test_a_word_of_the_telemetry_is_a_group_that_shares_tastes() -> None:
    tastes = Tastes()
    for number in range(20):
        group, sign = ("staff", 1.0) if number % 2 else ("guests", -1.0)
        where = context(device=f"device-{number}", features={"group": group, "temperature": 50.0})
        taught(-0.1 * sign, 0.1 * sign, rounds=3, where=where, tastes=tastes)
    staff, guests = (lead(tastes, context(device="new", features={"group": group})) for group in ("staff", "guests"))
    assert staff > 0.05
    assert guests < -0.05


@pytest.mark.parametrize("what", ["accuracy", "energy", "latency", "precision"])
def test_who_likes_what_a_variant_has_is_expected_to_like_another_that_has_it(what: str) -> None:
    """Variants that nobody tried are told apart by what they share with those that were."""

    def one(number: int, has_it: bool) -> Candidate:
        made: dict[str, dict[str, Any]] = {
            "accuracy": {"action": _action(number, accuracy=0.95 if has_it else 0.75)},
            "energy": {"prediction": prediction(0.6, cpu_ms_per_request=5.0 if has_it else 200.0)},
            "latency": {"prediction": prediction(0.6, slo_hit_share=1.0 if has_it else 0.4)},
            "precision": {"action": _action(number, precision="int8" if has_it else "fp32")},
        }
        base: dict[str, Any] = {"action": _action(number, accuracy=0.9), "prediction": prediction(0.6)}
        return candidate(number, **(base | made[what]))

    tastes = Tastes()
    for _ in range(30):
        for number in range(3):
            tastes.learn(context(), one(number, True), 0.1)
            tastes.learn(context(), one(number + 3, False), -0.1)
    mean = tastes.liking(context(), [one(7, True), one(8, False)]).mean
    assert mean[0] - mean[1] > 0.02


def test_a_device_whose_leases_are_all_worth_more_likes_nothing_in_particular() -> None:
    tastes = taught(0.15, 0.15)
    assert lead(tastes, context()) == pytest.approx(0, abs=0.02)
    assert tastes.trust.square < 0.1  # nothing that tells actions apart was foretold


@pytest.mark.parametrize("offset", [-0.15, 0.15])
def test_ratings_that_are_lower_or_higher_throughout_are_no_dislike_of_what_runs(offset: float) -> None:
    tastes = taught(offset, rounds=100)
    assert abs(lead(tastes, context())) < 0.03


def test_what_was_tried_is_hoped_for_less() -> None:
    tastes = taught(0.0, rounds=30)
    tried, untried = tastes.liking(context(), PAIR).hope
    assert untried > 1.2 * tried > 0


@pytest.mark.parametrize("make", [TastePolicy, VowpalWabbitPolicy])
def test_of_two_that_are_expected_to_be_alike_the_one_not_tried_is_tried(make: type[Policy]) -> None:
    policy = make()
    for number in range(20):
        policy.learn(interaction(decision_id=f"d-{number}", candidates=PAIR, chosen=0, reward=0.6))
    assert int(np.argmax(policy.probabilities(context(), PAIR))) == 1


def test_what_misses_the_slo_is_not_hoped_for_more() -> None:
    keeps, misses = (candidate(0, prediction=prediction(0.6, slo_hit_share=share)) for share in (1.0, 0.0))
    where = context(features={"group": "staff", "network": "wifi", "daypart": "night"})
    assert np.ptp(Tastes().liking(where, [keeps, misses]).hope) == pytest.approx(0)


def test_vowpal_wabbit_stands_on_the_same_tastes() -> None:
    """They learn from reward less prediction, whatever Vowpal Wabbit makes of the rest."""
    alone, below = TastePolicy(), VowpalWabbitPolicy()
    for number in range(30):
        for policy in (alone, below):
            policy.learn(interaction(decision_id=f"d-{number}", candidates=PAIR, chosen=number % 2, reward=0.8))
    assert below._tastes.state() == alone.state()


def test_noise_is_learnt() -> None:
    """Little noise lets one lease say more than much noise does."""
    rng, leads = np.random.default_rng(6), []
    for noise_sd in (0.01, 0.2):
        tastes = Tastes()
        for number in range(400):
            tastes.learn(context(device=f"device-{number % 20}"), PAIR[number % 2], noise_sd * rng.standard_normal())
        assert tastes.noise.variance**0.5 == pytest.approx(noise_sd, rel=0.4)
        before = tastes.effects["device:device-1"]["variant:" + PAIR[1].action.variant.digest[:12]][0]
        tastes.learn(context(), PAIR[1], 0.1)
        leads.append(tastes.effects["device:device-1"]["variant:" + PAIR[1].action.variant.digest[:12]][0] - before)
    assert leads[0] > 2 * leads[1] > 0


def test_much_telemetry_does_not_mean_strong_tastes() -> None:
    """One lease moves a device that tells sixty words hardly more than one that tells three."""
    leads = []
    for count in (3, 60):
        where = context(features={f"word-{number}": "yes" for number in range(count)})
        leads.append(lead(taught(-0.1, 0.1, rounds=1, where=where), where))
    assert leads[1] < 1.1 * leads[0]


def test_words_say_nothing_of_devices_that_are_called_alike_nor_of_each_other() -> None:
    scopes = [
        set(taught(0.1, rounds=1, where=context(features=features)).effects)
        for features in ({"device:device": "1"}, {"a": "b=c"}, {"a=b": "c"}, {"class": "pi4"})
    ]
    assert {len(each) for each in scopes} == {4}
    assert len(set.union(*scopes)) == 3 + 4


def test_a_lease_among_many_words_leaves_what_is_unknown_of_each_unknown() -> None:
    tastes = Tastes()
    taught(0.0, rounds=1, where=context(features={"group": "staff"}), tastes=tastes)
    before = _variances(tastes, "group")
    many = {"group": "staff"} | {f"word-{number}": "yes" for number in range(60)}
    taught(0.0, rounds=1, where=context(features=many), tastes=tastes)
    assert all(after > 0.5 * known for known, after in zip(before, _variances(tastes, "group"), strict=True))


@pytest.mark.parametrize("residual", [1e6, -1e6])
def test_no_residual_is_so_large_that_the_state_cannot_be_loaded(residual: float) -> None:
    tastes = taught(residual, rounds=1500)
    assert Tastes.from_state(tastes.state()).state() == tastes.state()
    assert max(abs(mean) for row in tastes.effects.values() for mean, _ in row.values()) <= 1.5


def test_what_is_mostly_noise_is_neither_liked_nor_hoped_for_much() -> None:
    leads, hopes = [], []
    for seed in range(6):
        rng, tastes = np.random.default_rng(seed), Tastes()
        for number in range(1500):
            residual = 0.1 + 0.3 * float(rng.standard_normal())
            tastes.learn(context(device=f"device-{number % 10}"), PAIR[number % 2], residual)
        everyone = [context(device=f"device-{number}") for number in range(10)]
        leads.append(max(abs(lead(tastes, each)) for each in everyone))
        hopes.append(max(tastes.liking(each, PAIR).hope.max() for each in everyone))
    assert np.mean(leads) < 0.03
    assert np.mean(hopes) < 0.01


def test_what_foretells_nothing_is_neither_liked_nor_hoped_for() -> None:
    doubted = Tastes(taught(-0.1, 0.1).effects, trust=Trust(0.0, 1.0))
    liking = doubted.liking(context(), PAIR)
    assert (liking.mean.tolist(), liking.hope.tolist()) == ([0, 0], [0, 0])


def test_many_failures_are_believed() -> None:
    tastes = taught(0.0, 0.05)
    for _ in range(11):
        tastes.learn(context(), PAIR[1], -0.6)
    assert lead(tastes, context()) < -0.1


def test_one_failure_says_little_more_than_a_bad_lease_and_makes_less_sure() -> None:
    leads, variances = [], []
    for residual in (0.05, -0.4, -0.8):
        tastes = taught(0.0, 0.05)
        tastes.learn(context(), PAIR[1], residual)
        leads.append(lead(tastes, context()))
        variances.append(min(_variances(tastes, "device:device-1")))
    assert leads[0] > leads[1] > leads[2]
    assert leads[0] - leads[2] < 1.3 * (leads[0] - leads[1])
    assert variances[0] < variances[1] < variances[2]


def test_tastes_that_change_are_followed() -> None:
    tastes = taught(-0.1, 0.1, rounds=300)
    taught(0.1, -0.1, rounds=100, tastes=tastes)
    assert lead(tastes, context()) < -0.05


def test_the_longest_idle_scopes_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SCOPES", 5)
    tastes = Tastes()
    for device in ("a", "b", "c", "a", "d"):
        tastes.learn(context(device=device), PAIR[0], 0.1)
    assert [scope for scope, _ in tastes.state()["effects"]] == [
        "device:c", "device:a", "device:d", "class:pi4", "application:digits",
    ]  # fmt: skip


@pytest.mark.parametrize("make", [TastePolicy, VowpalWabbitPolicy])
def test_what_is_forgotten_does_not_depend_on_when_it_was_stored(
    make: type[Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_SCOPES", 6)
    straight, stored = make(), make()
    for number, device in enumerate("zbacydxw"):
        entry = interaction(decision_id=f"d-{number}", context=context(device=device), candidates=PAIR)
        straight.learn(entry)
        stored.learn(entry)
        stored = make.from_bytes(stored.to_bytes())
    assert stored.to_bytes() == straight.to_bytes()


def test_what_is_stored_goes_on_exactly() -> None:
    tastes = taught(-0.1, 0.07, 0.01, where=context(features={"group": "staff"}))
    loaded = Tastes.from_state(json.loads(json.dumps(tastes.state())))
    assert loaded.state() == tastes.state()
    for each in (tastes, loaded):
        taught(0.3, 0.0, 0.1, rounds=2, tastes=each)
    assert loaded.state() == tastes.state()


@pytest.mark.parametrize(
    "damage",
    [
        {"noise": {"leases": 0.0, "square": 1.0}},
        {"noise": {"leases": 1.0, "square": -1.0}},
        {"noise": {}},
        {"trust": {"product": float("nan"), "square": 1.0}},
        {"effects": [["device:a", {"level": [0.0, -1.0]}]]},
        {"effects": [["device:a", {"level": [float("inf"), 1.0]}]]},
        {"effects": [["device:a", {"level": [float("nan"), 1.0]}]]},
        {"effects": [["device:a", {"level": [0.0]}]]},
        {"effects": [["device:a", {"level": ["x", 1.0]}]]},
        {"effects": [["device:a", [0.0, 1.0]]]},
        {"effects": [["device:a"]]},
        {"effects": {"device:a": {}}},
        {"effects": None},
    ],
)
def test_a_state_that_no_learning_leads_to_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises((InvalidInput, ValueError, KeyError, TypeError, AttributeError)):
        Tastes.from_state(Tastes().state() | damage)


@settings(max_examples=200, deadline=None)
@given(
    lessons=st.lists(
        st.tuples(st.integers(0, 2), st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1e12), st.floats(0, 1)),
        max_size=40,
    )
)
def test_whatever_is_learnt_liking_stays_finite_and_known_effects_stay_known(
    lessons: list[tuple[int, float, float, float, float]],
) -> None:
    tastes = Tastes()
    for number, residual, share, cpu_ms, accuracy in lessons:
        some = candidate(
            number,
            action=_action(number, accuracy),
            prediction=prediction(slo_hit_share=share, cpu_ms_per_request=cpu_ms),
        )
        tastes.learn(context(device=f"device-{number}"), some, residual)
    liking = tastes.liking(context(), THREE)
    assert np.isfinite(liking.mean).all()
    assert (liking.hope >= 0).all()
    assert np.abs(liking.mean).max() < 3
    assert Tastes.from_state(tastes.state()).state() == tastes.state()


def _action(number: int, accuracy: float = 0.9, precision: str = "fp32") -> Action:
    return Action(variant(number, accuracy=accuracy, precision=precision), action(number).configuration)


def _variances(tastes: Tastes, word: str) -> list[float]:
    return [variance for scope, row in tastes.effects.items() if word in scope for _, variance in row.values()]
