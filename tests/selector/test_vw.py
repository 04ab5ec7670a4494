"""What Vowpal Wabbit would do silently, and this product must not."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vowpalwabbit
from hypothesis import given, settings
from hypothesis import strategies as st

from selector.errors import CorruptPolicy, InvalidInput
from selector.vw import MAGIC, VowpalWabbitPolicy, VwSettings, escaped
from tests.selector.builders import candidate, candidates, context, interaction, prediction

NASTY = ["a|b", "x:1e9", "name with space", "line\nbreak", "é", "1", "|", ":", "0:0:1", "", "a_7c_b", "\x00", "'", "#"]


def test_a_policy_that_never_learnt_follows_the_prediction_but_explores() -> None:
    policy = VowpalWabbitPolicy(VwSettings(gamma=2000.0, epsilon=0.01))
    probabilities = policy.probabilities(context(), candidates(0.8, 0.79, 0.7, 0.2))
    assert probabilities.tolist() == sorted(probabilities.tolist(), reverse=True)
    assert probabilities[0] > 0.8
    assert probabilities[1] > probabilities[3] > 0.001


def test_a_prediction_counts_as_it_is_over_the_whole_range() -> None:
    """Equal gaps get equal odds: the taught weight is -1 everywhere."""
    policy = VowpalWabbitPolicy()
    odds = [policy.probabilities(context(), candidates(qoe, qoe - 0.1))[1] for qoe in (1.0, 0.6, 0.2)]
    assert odds == pytest.approx([odds[0]] * 3, rel=0.02)


def test_preferences_that_no_prediction_shows_are_learnt_per_device() -> None:
    policy = VowpalWabbitPolicy()
    some = candidates(0.7, 0.7)
    for number in range(200):
        device, chosen = f"device-{number % 2}", (number // 2) % 2
        reward = 0.8 if chosen == number % 2 else 0.5
        policy.learn(interaction(context=context(device=device), candidates=some, chosen=chosen, reward=reward))
    first = policy.probabilities(context(device="device-0"), some)
    second = policy.probabilities(context(device="device-1"), some)
    assert first[0] > 0.9
    assert second[1] > 0.9


@pytest.mark.parametrize("text", NASTY)
def test_names_from_outside_cannot_become_syntax(text: str) -> None:
    assert escaped(text).replace("_", "").replace(".", "").replace("-", "").isalnum() or not text


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_different_names_stay_different(one: str, other: str) -> None:
    assert (escaped(one) == escaped(other)) == (one == other)


def test_a_hostile_device_name_changes_no_other_prediction() -> None:
    some = candidates(0.7, 0.69)
    hostile = context(device="x |p qoe:-1000", features={"a|p qoe": "b |p qoe:9", "c:9 |p qoe": 1.0})
    tame = context(device="x", features={"a": "b", "c": 1.0})
    calm = VowpalWabbitPolicy().probabilities(tame, some)
    assert VowpalWabbitPolicy().probabilities(hostile, some).tolist() == calm.tolist()


def test_numeric_names_do_not_collide_linearly() -> None:
    policy = VowpalWabbitPolicy()
    some = (candidate(0, 0.6), candidate(1, 0.6))
    for number in range(300):
        device = str(number % 50)
        policy.learn(
            interaction(context=context(device=device), candidates=some, chosen=0, reward=0.9 if device == "7" else 0.6)
        )
    gap = [policy.probabilities(context(device=name), some)[0] for name in ("7", "8", "6")]
    assert gap[0] > max(gap[1:])


@pytest.mark.parametrize("tiny", [8.023204931024695e-179, 3.439818131993612e-292, 1e-40, 5e-324])
@pytest.mark.parametrize("is_predicted", [False, True])
def test_tiny_numbers_with_many_digits_do_not_poison_the_model(tiny: float, is_predicted: bool) -> None:
    policy = VowpalWabbitPolicy()
    some = (candidate(0, tiny if is_predicted else 0.5), candidate(1))
    policy.learn(interaction(context=context(features={"tiny": tiny}), candidates=some, reward=tiny))
    elsewhere = context(device="device-2", device_class="nuc", application="other")
    probabilities = policy.probabilities(elsewhere, candidates(0.7, 0.6))
    assert probabilities[0] > 0.9


def test_extreme_but_valid_telemetry_does_not_blow_the_model_up() -> None:
    policy = VowpalWabbitPolicy()
    wild = context(features={"bytes": 1e30, "negative": -1e30, "tiny": 3.4e-292})
    some = (candidate(0, prediction=prediction(p95_ms=1e12, cpu_ms_per_request=1e12)), candidate(1))
    for number in range(300):
        policy.learn(interaction(context=wild, candidates=some, chosen=number % 2, reward=float(number % 2)))
    probabilities = policy.probabilities(context(), candidates(0.9, 0.2))
    assert probabilities[0] > 0.5


def leases_until_changed(history: int) -> int:
    """How many noisy leases it takes to prefer the other action for good, after ``history`` leases the old way."""
    rng, policy, some = np.random.default_rng(0), VowpalWabbitPolicy(), candidates(0.6, 0.6)
    streak = 0
    for number in range(-history, 1000):
        better = int(number >= 0)
        reward = float(np.clip((0.7 if number % 2 == better else 0.5) + rng.normal(0, 0.2), 0, 1))
        policy.learn(interaction(candidates=some, chosen=number % 2, reward=reward))
        if number >= 0:
            streak = streak + 1 if policy.probabilities(context(), some)[1] > 0.5 else 0
            if streak == 20:
                return number
    return 1000


def test_old_beliefs_give_way_as_fast_after_a_long_history_as_after_a_short_one() -> None:
    assert leases_until_changed(5000) <= 1.7 * leases_until_changed(500)


def test_probes_and_digest_are_checked_at_loading() -> None:
    policy, other = VowpalWabbitPolicy(), VowpalWabbitPolicy()
    for number in range(50):
        other.learn(interaction(candidates=candidates(0.6, 0.6), chosen=number % 2, reward=number % 2 * 1.0))
    data, probes = policy.to_bytes(), policy.probe_vectors()
    assert policy.digest == hashlib.sha256(data).hexdigest()
    VowpalWabbitPolicy.from_bytes(data, digest=policy.digest, probes=probes)
    with pytest.raises(CorruptPolicy):
        VowpalWabbitPolicy.from_bytes(data, digest=other.digest)
    wrong = [[*probe[1:], probe[0]] for probe in probes]
    with pytest.raises(CorruptPolicy):
        VowpalWabbitPolicy.from_bytes(data, probes=wrong)
    with pytest.raises(CorruptPolicy):
        VowpalWabbitPolicy.from_bytes(data, probes=probes[:1])


def with_right_digest(data: bytes, model: bytes | None = None, **header: Any) -> bytes:
    """Policy bytes with another model, or other parts of the header, under a digest that is right."""
    line, _, own_model = data[len(MAGIC) :].partition(b"\n")[2].partition(b"\n")
    body = json.dumps({**json.loads(line), **header}, sort_keys=True).encode() + b"\n" + (model or own_model)
    return MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def model_of(arguments: str, folder: Path) -> bytes:
    workspace = vowpalwabbit.Workspace(f"--quiet {arguments}")
    workspace.save(str(folder / "model"))
    return (folder / "model").read_bytes()


@pytest.mark.parametrize(
    "other",
    [{"gamma": 1.0}, {"epsilon": 1.0}, {"learning_rate": 0.5}, {"bits": 12}, {"seed": 9}],
)
def test_a_model_under_the_header_of_other_settings_is_refused(other: dict[str, Any]) -> None:
    data = VowpalWabbitPolicy().to_bytes()
    assert VowpalWabbitPolicy.from_bytes(with_right_digest(data)).to_bytes() == data
    with pytest.raises(CorruptPolicy):
        VowpalWabbitPolicy.from_bytes(with_right_digest(data, settings={**asdict(VwSettings()), **other}))


@pytest.mark.parametrize(
    "arguments", ["--cb_explore_adf --cb_type mtr --bag 5 --noconstant", "", "--cb_explore_adf --squarecb"]
)
def test_a_model_of_another_learner_is_refused(arguments: str, tmp_path: Path) -> None:
    data = with_right_digest(VowpalWabbitPolicy().to_bytes(), model=model_of(arguments, tmp_path))
    with pytest.raises(CorruptPolicy):
        VowpalWabbitPolicy.from_bytes(data)


@pytest.mark.parametrize(
    "trust", [{"product": 0.1, "square": 0}, {"product": 0.1, "square": -1.0}, {"product": 0.1}, {}, [], None, 3]
)
def test_a_trust_that_no_learning_leads_to_is_refused(trust: Any) -> None:
    with pytest.raises(CorruptPolicy):
        VowpalWabbitPolicy.from_bytes(with_right_digest(VowpalWabbitPolicy().to_bytes(), trust=trust))


@pytest.mark.parametrize(
    "made",
    [VwSettings(seed=0), VwSettings(0.5, 10.0, 0.05, 0.0, 18, 0), VwSettings(1e-6, 1e9, 1.0, 0.1, 24, 2**31 - 1)],
    ids=["seed 0", "as Vowpal Wabbit has them anyway", "at the bounds"],
)
def test_whatever_settings_are_allowed_can_be_stored(made: VwSettings) -> None:
    policy = VowpalWabbitPolicy(made)
    assert VowpalWabbitPolicy.from_bytes(policy.to_bytes(), probes=policy.probe_vectors()).settings == made


@pytest.mark.parametrize("data", [None, "text", 7, b"", b"\n", []])
def test_what_are_no_bytes_of_a_policy_are_refused(data: Any) -> None:
    with pytest.raises(CorruptPolicy):
        VowpalWabbitPolicy.from_bytes(data)


@pytest.mark.parametrize(
    "probes",
    [3, "x", [], [1, 2], [["a"] * 4] * 2, [[None] * 4] * 2, [[0.25] * 4] * 3, [[math.nan] * 4] * 2, {"a": 1, "b": 2},
     [[[0.25]] * 4] * 2],
)  # fmt: skip
def test_what_are_no_probes_are_refused(probes: Any) -> None:
    with pytest.raises(CorruptPolicy):
        VowpalWabbitPolicy().verify(probes)
    with pytest.raises(CorruptPolicy):
        VowpalWabbitPolicy().verify(None)  # type: ignore[arg-type]  # what a damaged registry may hold


@pytest.mark.parametrize(
    "arguments",
    ["-f out", "-i in", "--invert_hash x", "--cb_type dm", "--bag 5", "--power_t 0.5", "-q ::", "--epsilon",
     "--epsilon x", "'", "--epsilon 0", "--bit_precision 40", "-l nan", "-l 1e9", "--gamma_scale inf",
     "--random_seed 1.5"],
)  # fmt: skip
def test_arguments_off_the_allow_list_are_refused(arguments: str) -> None:
    with pytest.raises(InvalidInput):
        VwSettings.parse(arguments)


def test_arguments_on_the_allow_list_arrive() -> None:
    parsed = VwSettings.parse("--squarecb --gamma_scale=300 --epsilon 0.1 -l 0.02 -b 16 --l2 1e-6 --random_seed 4")
    assert parsed == VwSettings(0.02, 300.0, 0.1, 1e-6, 16, 4)
    restored = VowpalWabbitPolicy.from_bytes(VowpalWabbitPolicy(parsed).to_bytes())
    assert restored.settings == parsed
    assert restored.probabilities(context(), candidates(0.9, 0.1))[1] == pytest.approx(0.1 / 2, rel=0.1)


def test_nothing_is_left_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    VowpalWabbitPolicy.from_bytes(VowpalWabbitPolicy().to_bytes())
    assert os.listdir(tmp_path) == []


def test_the_floor_holds_for_every_candidate() -> None:
    policy = VowpalWabbitPolicy(VwSettings(epsilon=0.08))
    probabilities = policy.probabilities(context(), candidates(*np.linspace(0.1, 0.9, 16).tolist()))
    assert probabilities.min() >= 0.08 / 16 * 0.99


def taught(policy: VowpalWabbitPolicy, likes: float, noise_sd: float, count: int = 300) -> VowpalWabbitPolicy:
    """Leases of two actions with equal predictions; the second is liked better by so much."""
    rng = np.random.default_rng(7)
    for number in range(count):
        chosen = number % 2
        reward = min(max(0.6 + likes * chosen + noise_sd * float(rng.standard_normal()), 0.0), 1.0)
        where = context(device=f"device-{number % 10}", features={"battery": float(rng.random())})
        policy.learn(
            interaction(
                decision_id=f"d-{number}", context=where, candidates=candidates(0.6, 0.6), chosen=chosen, reward=reward
            )
        )
    return policy


def test_what_users_like_better_is_chosen_though_no_prediction_shows_it() -> None:
    policy = taught(VowpalWabbitPolicy(), likes=0.2, noise_sd=0.05)
    assert policy.probabilities(context(device="device-3"), candidates(0.6, 0.6))[1] > 0.95
    assert policy.probabilities(context(device="never-seen"), candidates(0.6, 0.6))[1] > 0.9


def test_where_predictions_say_all_the_noise_that_was_learnt_is_not_trusted() -> None:
    """A lead of 0.02 in the prediction stands against everything learnt from 300 noisy leases."""
    policy = taught(VowpalWabbitPolicy(), likes=0.0, noise_sd=0.3)
    for device in range(10):
        leading = policy.probabilities(context(device=f"device-{device}"), candidates(0.62, 0.6))
        assert leading[0] > 0.9
