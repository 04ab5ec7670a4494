"""One contract that every policy keeps: Vowpal Wabbit's, the baselines and the peers of the benchmark alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.peers import (
    FLAT_SQUARECB,
    HOSTED_DEFAULT,
    BoostedResidualPolicy,
    FlatVowpalWabbitPolicy,
    NeuralResidualPolicy,
)
from selector.baselines import (
    BaselinePolicy,
    FixedPerClassPolicy,
    FixedPolicy,
    PredictionPolicy,
    RandomPolicy,
)
from selector.errors import CorruptPolicy, InvalidInput
from selector.interactions import Interaction, Measurement
from selector.linear import LinTsPolicy, LinUcbPolicy
from selector.policy import Policy
from selector.preferences import PreferencePolicy
from selector.reward import QoeFormula
from selector.tabular import ThompsonPolicy, Ucb1Policy
from selector.tastes import TastePolicy
from selector.vw import VowpalWabbitPolicy
from tests.selector.builders import action, candidate, candidates, context, interaction, prediction

MAKERS: dict[str, Callable[[], Policy]] = {
    "vw": VowpalWabbitPolicy,
    "random": RandomPolicy,
    "fixed": lambda: FixedPolicy(action(1).key),
    "fixed_per_class": lambda: FixedPerClassPolicy({"pi4": [action(1).key]}, [action(0).key]),
    "prediction": PredictionPolicy,
    "tastes": TastePolicy,
    "baseline": BaselinePolicy,
    "ucb1": Ucb1Policy,
    "thompson": ThompsonPolicy,
    "linucb": LinUcbPolicy,
    "linucb_with_prediction": lambda: LinUcbPolicy(0.05, with_prediction=True),
    "linucb_with_history": lambda: LinUcbPolicy(0.05, with_prediction=True, with_history=True),
    "lints": LinTsPolicy,
    "lints_with_prediction": lambda: LinTsPolicy(0.02, with_prediction=True),
    "preferences": lambda: PreferencePolicy({"digits": QoeFormula(slo_p95_ms=60.0)}),
    "neural_residual": NeuralResidualPolicy,
    "lints_with_history": lambda: LinTsPolicy(0.1, with_history=True),
    "boosted_residual": BoostedResidualPolicy,
    "boosted_residual_with_history": lambda: BoostedResidualPolicy(with_history=True),
    "flat_squarecb": lambda: FlatVowpalWabbitPolicy(
        FLAT_SQUARECB.format(gamma=1000, rate=0.1), learns_all_lines=False, with_device=True
    ),
    "flat_with_standing": lambda: FlatVowpalWabbitPolicy(
        FLAT_SQUARECB.format(gamma=1000, rate=0.1), learns_all_lines=False, with_device=True, with_standing=True
    ),
    "hosted_default": lambda: FlatVowpalWabbitPolicy(HOSTED_DEFAULT),
}
# What learns which action is best from rewards alone, quickly enough for a test.
LEARNERS = (
    "vw", "ucb1", "thompson", "linucb", "linucb_with_prediction", "lints", "lints_with_prediction",
    "neural_residual", "boosted_residual", "flat_squarecb", "linucb_with_history", "lints_with_history",
    "boosted_residual_with_history", "flat_with_standing",
)  # fmt: skip
UPDATED = ("preferences", "tastes", "hosted_default", *LEARNERS)
STORED = {name: maker() for name, maker in MAKERS.items()}
STORED_BYTES = {name: policy.to_bytes() for name, policy in STORED.items()}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable[[], Policy]:
    return MAKERS[request.param]


def log(count: int, start: int = 0) -> list[Interaction]:
    rng = np.random.default_rng(3)
    entries = []
    for number in range(count + start):
        some = candidates(*rng.uniform(0.3, 0.9, 4).tolist())
        chosen = int(rng.integers(4))
        situation = context(device=f"device-{number % 3}", device_class=("pi4", "nuc")[number % 2])
        reward = float(rng.uniform(0, 1))
        entries.append(
            interaction(decision_id=f"d-{number}", context=situation, candidates=some, chosen=chosen, reward=reward)
        )
    return entries[start:]


def test_it_is_a_policy(make: Callable[[], Policy]) -> None:
    assert isinstance(make(), Policy)


@settings(max_examples=25, deadline=None)
@given(
    qoe=st.lists(st.floats(-1, 2), min_size=1, max_size=20),
    learnt=st.integers(0, 3),
    which=st.sampled_from(list(MAKERS)),
)
def test_probabilities_are_positive_and_sum_to_one(qoe: list[float], learnt: int, which: str) -> None:
    policy = MAKERS[which]()
    for entry in log(learnt):
        policy.learn(entry)
    probabilities = policy.probabilities(context(), candidates(*qoe))
    assert probabilities.shape == (len(qoe),)
    assert probabilities.dtype == np.float64
    assert (probabilities > 0).all()
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-9)


def test_asking_changes_nothing(make: Callable[[], Policy]) -> None:
    policy = make()
    before = policy.to_bytes()
    first = policy.probabilities(context(), candidates(0.7, 0.6, 0.5))
    assert policy.probabilities(context(), candidates(0.7, 0.6, 0.5)).tolist() == first.tolist()
    assert policy.to_bytes() == before


def test_the_same_log_gives_the_same_bytes(make: Callable[[], Policy]) -> None:
    one, other = make(), make()
    for entry in log(40):
        one.learn(entry)
        one.probabilities(entry.context, entry.candidates)
        other.learn(entry)
    assert one.to_bytes() == other.to_bytes()


def test_saving_in_the_middle_changes_nothing(make: Callable[[], Policy]) -> None:
    straight, broken = make(), make()
    for entry in log(60):
        straight.learn(entry)
    for entry in log(30):
        broken.learn(entry)
    restored = type(broken).from_bytes(broken.to_bytes())
    for entry in log(30, start=30):
        restored.learn(entry)
    assert restored.to_bytes() == straight.to_bytes()
    some = candidates(0.7, 0.69, 0.4)
    assert restored.probabilities(context(), some).tolist() == straight.probabilities(context(), some).tolist()


@pytest.mark.parametrize("which", LEARNERS)
def test_learners_learn(which: str) -> None:
    policy = MAKERS[which]()
    some = candidates(0.6, 0.6, 0.6)
    for number in range(120):
        chosen = number % 3
        policy.learn(interaction(candidates=some, chosen=chosen, reward=0.8 if chosen == 1 else 0.4))
    assert int(np.argmax(policy.probabilities(context(), some))) == 1


@pytest.mark.parametrize("which", UPDATED)
def test_what_was_learnt_is_in_the_bytes(which: str) -> None:
    policy = MAKERS[which]()
    policy.learn(log(1)[0])
    assert policy.to_bytes() != STORED_BYTES[which]


@settings(max_examples=300, deadline=None)
@given(cut=st.floats(0, 1), flip=st.integers(0, 7), which=st.sampled_from(list(MAKERS)), truncate=st.booleans())
def test_damaged_bytes_are_refused(cut: float, flip: int, which: str, truncate: bool) -> None:
    policy = STORED[which]
    data = STORED_BYTES[which]
    at = min(int(cut * len(data)), len(data) - 1)
    damaged = data[:at] if truncate else data[:at] + bytes([data[at] ^ (1 << flip)]) + data[at + 1 :]
    with pytest.raises(CorruptPolicy):
        type(policy).from_bytes(damaged)


@pytest.mark.parametrize("data", [None, "text", 7, b"", b"\n", b"\n{}"])
def test_what_are_no_bytes_of_a_policy_are_refused(make: Callable[[], Policy], data: Any) -> None:
    with pytest.raises(CorruptPolicy):
        type(make()).from_bytes(data)


def test_bytes_of_another_policy_are_refused(make: Callable[[], Policy]) -> None:
    for other in MAKERS.values():
        if type(other()) is not type(make()):
            with pytest.raises(CorruptPolicy):
                type(make()).from_bytes(other().to_bytes())


BAD: list[dict[str, Any]] = [
    {"reward": math.nan},
    {"reward": math.inf},
    {"reward": -0.01},
    {"reward": 1.01},
    {"chosen": 2},
    {"chosen": -1},
    {"candidates": ()},
    {"candidates": (candidate(0, probability=0.0), candidate(1))},
    {"candidates": (candidate(0, probability=math.nan), candidate(1))},
    {"candidates": (candidate(0, probability=1.5), candidate(1))},
    {"candidates": (candidate(0, qoe=math.inf), candidate(1))},
    {"candidates": (candidate(0, prediction=prediction(p95_ms=math.nan)),)},
    {"candidates": (candidate(0, prediction=prediction(slo_hit_share=-0.5)),)},
    {"context": context(slo_p95_ms=-1.0)},
    {"context": context(features={"load": math.inf})},
    {"context": context(device="x" * 10_000)},
    {"measurement": Measurement(requests=1, p95_ms=math.nan)},
    {"decision_id": ""},
]


@pytest.mark.parametrize("bad", BAD, ids="-".join)
def test_what_must_not_be_learnt_changes_nothing(make: Callable[[], Policy], bad: dict[str, Any]) -> None:
    policy = make()
    before = policy.to_bytes()
    with pytest.raises(InvalidInput):
        policy.learn(replace(interaction(), **bad))
    assert policy.to_bytes() == before


numbers = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(LEARNERS), st.tuples(*[numbers] * 4), numbers | st.text(max_size=20))
def test_no_number_poisons_a_learner(which: str, drawn: tuple[float, ...], feature: float | str) -> None:
    """Either refused without a trace, or learnt and still a policy that answers."""
    reward, probability, qoe, p95_ms = drawn
    policy = MAKERS[which]()
    tried = candidate(0, qoe, probability, prediction=prediction(qoe, p95_ms=p95_ms))
    situation = context(features={"telemetry": feature})
    try:
        policy.learn(interaction(context=situation, candidates=(tried, candidate(1)), reward=reward))
    except InvalidInput:
        return
    probabilities = policy.probabilities(context(), candidates(0.7, 0.6))
    assert np.isfinite(probabilities).all()


@pytest.mark.parametrize("some", [(), (candidate(0), candidate(0)), (candidate(0, math.nan), candidate(1))])
def test_bad_candidates_are_refused(make: Callable[[], Policy], some: tuple[Any, ...]) -> None:
    with pytest.raises(InvalidInput):
        make().probabilities(context(), some)


def test_the_baseline_policy_plays_the_baseline_or_else_the_best_prediction() -> None:
    some = candidates(0.5, 0.9, 0.7)
    on_baseline = BaselinePolicy().probabilities(context(baseline=some[2].action.key), some)
    elsewhere = BaselinePolicy().probabilities(context(baseline="gone/b1c1t1"), some)
    assert (int(np.argmax(on_baseline)), int(np.argmax(elsewhere))) == (2, 1)
    assert on_baseline.min() > 0
    assert on_baseline.sum() == pytest.approx(1)
