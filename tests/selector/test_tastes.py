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
from selector.interactions import Context
from selector.tastes import TastePolicy, Tastes
from tests.selector.builders import candidate, candidates, context, interaction, prediction, variant

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


def test_who_likes_accuracy_is_expected_to_like_a_variant_that_nobody_tried() -> None:
    tastes = Tastes()
    accurate, coarse = (
        candidate(number, action=_action(number, accuracy)) for number, accuracy in ((0, 0.95), (1, 0.75))
    )
    for _ in range(20):
        tastes.learn(context(), accurate, 0.1)
        tastes.learn(context(), coarse, -0.1)
    new = [candidate(number, action=_action(number, accuracy)) for number, accuracy in ((5, 0.93), (6, 0.77))]
    mean = tastes.liking(context(), new).mean
    assert mean[0] - mean[1] > 0.05


def test_a_device_whose_leases_are_all_worth_more_likes_nothing_in_particular() -> None:
    assert lead(taught(0.15, 0.15), context()) == pytest.approx(0, abs=0.02)


def test_what_was_tried_is_hoped_for_less() -> None:
    tastes = taught(0.0, rounds=30)
    tried, untried = tastes.liking(context(), PAIR).hope
    assert untried > 1.2 * tried > 0


def test_hope_tries_again_what_was_disliked_by_mistake() -> None:
    """One bad lease among devices whose tastes are real, and the better action is back."""
    policy = TastePolicy(taught(-0.05, 0.05, rounds=10))
    policy.learn(interaction(candidates=PAIR, chosen=1, reward=0.2))
    assert int(np.argmax(policy.probabilities(context(), PAIR))) == 1


def test_noise_is_not_trusted() -> None:
    rng, tastes = np.random.default_rng(4), Tastes()
    for number in range(1500):
        tastes.learn(context(device=f"device-{number % 10}"), PAIR[number % 2], 0.3 * float(rng.standard_normal()))
    assert max(abs(lead(tastes, context(device=f"device-{number}"))) for number in range(10)) < 0.01


def test_one_failure_among_many_good_leases_is_hardly_believed_many_are() -> None:
    tastes = taught(0.0, 0.05)
    before = lead(tastes, context())
    tastes.learn(context(), PAIR[1], -0.6)
    once = lead(tastes, context())
    for _ in range(10):
        tastes.learn(context(), PAIR[1], -0.6)
    assert before > once > before - 0.1
    assert lead(tastes, context()) < -0.1


def test_tastes_that_change_are_followed() -> None:
    tastes = taught(-0.1, 0.1, rounds=300)
    taught(0.1, -0.1, rounds=100, tastes=tastes)
    assert lead(tastes, context()) < -0.05


def test_the_longest_idle_scopes_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SCOPES", 5)
    tastes = Tastes()
    for device in ("a", "b", "c", "a", "d"):
        tastes.learn(context(device=device), PAIR[0], 0.1)
    assert set(tastes.state()["effects"]) == {"device:c", "device:a", "device:d", "class:pi4", "application:digits"}


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
        {"effects": {"device:a": {"level": [0.0, -1.0]}}},
        {"effects": {"device:a": {"level": [float("inf"), 1.0]}}},
        {"effects": {"device:a": {"level": [0.0]}}},
        {"effects": {"device:a": [0.0, 1.0]}},
        {"effects": []},
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


def _action(number: int, accuracy: float) -> Any:
    base = candidate(number).action
    return type(base)(variant(number, accuracy=accuracy), base.configuration)
