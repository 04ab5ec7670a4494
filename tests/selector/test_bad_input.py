"""Thousands of bad inputs: each must be refused with a typed error that names the thing, and leave no trace."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selector.baselines import PredictionPolicy
from selector.calibration import Calibration
from selector.errors import CorruptPolicy, InvalidInput, NoFeasibleAction, PolicyFailure
from selector.interactions import Interaction, Measurement, Profile
from selector.ranking import Exploration
from selector.stored import Stored
from selector.vw import VwSettings
from tests.selector.builders import (
    action,
    candidate,
    candidates,
    context,
    grid,
    interaction,
    prediction,
    profiles,
    ranked,
)
from tests.selector.test_policies import MAKERS, log

NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])
NOT_NUMBERS: st.SearchStrategy[Any] = st.sampled_from([None, "", "1", True, [], b"1"])
BELOW_ZERO = st.floats(max_value=-1e-9, allow_infinity=False)
ABOVE_ONE = st.floats(min_value=1.000001, allow_infinity=False)
HUGE = st.floats(min_value=1e19, allow_infinity=False)
NO_DOUBLE = st.sampled_from([10**400, -(10**400)])
NO_NUMBER = NOT_FINITE | NOT_NUMBERS | NO_DOUBLE
NO_AMOUNT = NO_NUMBER | BELOW_ZERO | HUGE
NO_SHARE = NO_NUMBER | BELOW_ZERO | ABOVE_ONE
NO_NAME: st.SearchStrategy[Any] = st.sampled_from(["", None, 7, "x" * 513, b"name", "half \ud800"])
LENGTHS = st.sampled_from(["", "x" * 513])
TELEMETRY = st.dictionaries(st.sampled_from(["load", "new"]), NOT_FINITE | st.none() | st.booleans(), min_size=1)

CONTEXT: dict[str, st.SearchStrategy[Any]] = {
    "device": NO_NAME,
    "device_class": NO_NAME,
    "application": NO_NAME,
    "arrival_rate_rps": NO_AMOUNT,
    "slo_p95_ms": NO_AMOUNT | st.just(0.0),
    "minimum_accuracy": NO_SHARE,
    "cores": NO_AMOUNT | st.just(0),
    "memory_free_bytes": NO_AMOUNT,
    "cpu_load_share": NO_SHARE,
    "features": TELEMETRY | st.none(),
    "incumbent": st.sampled_from([7, b"key"]),
    "baseline": st.sampled_from([7, b"key"]),
    "cached_digests": st.sampled_from([None, "ab", ["ab"]]),
    "supported_operators": st.sampled_from([None, "Conv", ["Conv"]]),
    "unmeasured_digests": st.sampled_from([None, "ab", ["ab"], 7]),
}
# A prediction is ours, so a truth value in it counts as the number that it is.
SPOILT: st.SearchStrategy[Any] = NOT_FINITE | NO_DOUBLE | BELOW_ZERO | st.sampled_from([None, "", "1", []])
PREDICTION: dict[str, st.SearchStrategy[Any]] = {
    "qoe": NOT_FINITE | st.none(),
    "slo_hit_share": SPOILT | ABOVE_ONE,
    "slo_violation_probability": SPOILT | ABOVE_ONE,
    "p50_ms": SPOILT | HUGE,
    "p95_ms": SPOILT | HUGE,
    "cpu_ms_per_request": SPOILT | HUGE,
    "log_sd": SPOILT | HUGE,
    "service_ms": SPOILT | HUGE,
    "batch": SPOILT | HUGE,
    "raw_a_ms": SPOILT | HUGE,
    "raw_b_ms": SPOILT | HUGE,
    "raw_cpu_ms": SPOILT | HUGE,
    "bonus": NOT_FINITE | HUGE | st.none(),
    "held_back": SPOILT | HUGE | st.floats(0, 0.999),
}
MEASUREMENT: dict[str, st.SearchStrategy[Any]] = {
    "requests": NO_AMOUNT,
    "failed": st.sampled_from(["no", None, 0, 1]),
    "errors": NO_AMOUNT,
    "download_bytes": NO_AMOUNT,
    "slo_hit_share": NOT_FINITE | BELOW_ZERO | ABOVE_ONE,
    "rating": NOT_FINITE | BELOW_ZERO | ABOVE_ONE,
    "ratings": NO_AMOUNT,
    "accuracy": NOT_FINITE | BELOW_ZERO | ABOVE_ONE,
    "p50_ms": NOT_FINITE | BELOW_ZERO | HUGE,
    "p95_ms": NOT_FINITE | BELOW_ZERO | HUGE,
    "service_ms": NOT_FINITE | BELOW_ZERO | HUGE,
    "batch_mean": NOT_FINITE | BELOW_ZERO | HUGE,
    "cpu_ms_per_request": NOT_FINITE | BELOW_ZERO | HUGE,
}
NO_BOUND = NO_NUMBER | st.integers(max_value=0) | st.sampled_from([0.0, 1.5, 4.0, -2.5, 10**7])
CONFIGURATION: dict[str, st.SearchStrategy[Any]] = {
    "max_batch": NO_BOUND,
    "max_concurrency": NO_BOUND,
    "threads": NO_BOUND,
}
CHOSEN: dict[str, st.SearchStrategy[Any]] = {"hard_masks": st.just(("memory",))}
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "propensity": NO_SHARE | st.just(0.0),
    "reward": NO_SHARE,
    "chosen": st.integers(2, 10**9) | st.integers(-(10**9), -1) | NO_NUMBER,
    "decision_id": NO_NAME,
    "context": st.sampled_from([None, {}, "device-1"]),
    "measurement": st.sampled_from([None, {}, 5.0]),
}
PARTS = {
    "context": CONTEXT,
    "prediction": PREDICTION,
    "measurement": MEASUREMENT,
    "configuration": CONFIGURATION,
    "chosen": CHOSEN,
}


def one_of(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[tuple[str, Any]]:
    """A field and a value that it must not have."""
    return st.sampled_from(sorted(fields)).flatmap(lambda field: st.tuples(st.just(field), fields[field]))


@st.composite
def bad_interactions(draw: st.DrawFn) -> tuple[Interaction, str]:
    """An interaction with one fault, and the name of what is wrong."""
    good = interaction()
    first, second = good.candidates
    part = draw(st.sampled_from([*PARTS, *FIELDS]))
    field, value = draw(one_of(PARTS.get(part, FIELDS)))
    changes: dict[str, Any] = {field: value}
    if part == "context":
        changes = {"context": context(**changes)}
    elif part == "prediction":
        changes = {"candidates": (replace(first, prediction=replace(first.prediction, **changes)), second)}
    elif part == "measurement":
        changes = {"measurement": replace(good.measurement, **changes)}
    elif part == "configuration":
        bounds = replace(first.action.configuration, **changes)
        changes = {"candidates": (replace(first, action=replace(first.action, configuration=bounds)), second)}
    elif part == "chosen":
        changes = {"candidates": (replace(first, **changes), second)}
    elif field == "propensity":
        changes = {"candidates": (replace(first, probability=value), second)}
    return replace(good, **changes), field


@st.composite
def bad_questions(draw: st.DrawFn) -> tuple[dict[str, Any], str]:
    """Context and candidates with one fault, and the name of what is wrong."""
    part = draw(st.sampled_from(["context", "prediction", "empty", "twice", "accuracy"]))
    if part == "context":
        field, value = draw(one_of(CONTEXT))
        return {"context": context(**{field: value}), "candidates": candidates(0.7, 0.6)}, field
    if part == "empty":
        return {"context": context(), "candidates": draw(st.sampled_from([(), []]))}, "candidates"
    if part == "twice":
        listed = [candidate(number) for number in draw(st.permutations([0, 1, 2, draw(st.integers(0, 2))]))]
        return {"context": context(), "candidates": listed}, "candidates"
    if part == "accuracy":
        spoilt = candidate(0, action=action(0, accuracy=draw(SPOILT | ABOVE_ONE)))
        return {"context": context(), "candidates": (spoilt, candidate(1))}, "accuracy"
    field, value = draw(one_of(PREDICTION))
    spoilt = candidate(0, prediction=prediction(**{field: value}))
    return {"context": context(), "candidates": draw(st.permutations([spoilt, candidate(1), candidate(2)]))}, field


QUICK = settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("which", MAKERS)
def test_no_policy_learns_from_or_answers_what_is_bad(which: str) -> None:
    policy = MAKERS[which]()
    for entry in log(4):
        policy.learn(entry)
    before = policy.to_bytes()
    answer = policy.probabilities(context(), candidates(0.7, 0.6, 0.5)).tolist()

    @QUICK
    @given(bad_interactions())
    def learning_refuses(drawn: tuple[Interaction, str]) -> None:
        with pytest.raises(InvalidInput) as refused:
            policy.learn(drawn[0])
        assert drawn[1] in str(refused.value)

    @QUICK
    @given(bad_questions())
    def answering_refuses(drawn: tuple[dict[str, Any], str]) -> None:
        with pytest.raises(InvalidInput) as refused:
            policy.probabilities(**drawn[0])
        assert drawn[1] in str(refused.value)

    learning_refuses()
    answering_refuses()
    assert policy.to_bytes() == before
    assert policy.probabilities(context(), candidates(0.7, 0.6, 0.5)).tolist() == answer


@QUICK
@given(st.data())
def test_calibration_learns_nothing_from_what_is_bad_and_keeps_rows_that_can_be_loaded(data: st.DataObject) -> None:
    """Also not from the baseline, which the standing reads and nobody chose."""
    calibration = Calibration()
    raw: dict[str, Any] = {"raw_a_ms": 4.0, "raw_b_ms": 2.0, "raw_cpu_ms": 6.0, "source": "device"}
    first, second = (replace(each, prediction=replace(each.prediction, **raw)) for each in candidates(0.7, 0.6))
    measured = Measurement(requests=100, p50_ms=9.0, p95_ms=15.0, service_ms=8.0, cpu_ms_per_request=5.0)
    good = interaction(context=context(baseline=second.action.key), candidates=(first, second), measurement=measured)
    calibration.update(good)
    before = calibration.rows()
    part = data.draw(st.sampled_from(["chosen", "baseline"]))
    field, value = data.draw(one_of(CONFIGURATION if part == "chosen" else PREDICTION))
    if part == "chosen":
        bounds = replace(first.action.configuration, **{field: value})
        spoilt = replace(first, action=replace(first.action, configuration=bounds)), second
    else:
        spoilt = first, replace(second, prediction=replace(second.prediction, **{field: value}))
    with pytest.raises(InvalidInput, match=field):
        calibration.update(replace(good, candidates=spoilt))
    assert calibration.rows() == before
    assert Calibration.from_rows(calibration.rows()).rows() == before


def test_a_variant_said_in_two_ways_is_refused() -> None:
    with pytest.raises(InvalidInput, match="two ways"):
        ranked(actions=(action(0), action(0, batch=4, accuracy=0.1)))


BAD_PROFILE: dict[str, st.SearchStrategy[Any]] = {
    "digest": NO_NAME,
    "threads": NO_AMOUNT | st.just(0),
    "a_ms": NO_AMOUNT,
    "b_ms": NO_AMOUNT,
    "memory_bytes": NO_AMOUNT,
    "source": st.sampled_from(["", "cloud", "Device"]),
}
BAD_VARIANT: dict[str, st.SearchStrategy[Any]] = {
    "accuracy": NO_SHARE,
    "size_bytes": NO_AMOUNT,
    "digest": LENGTHS,
    "precision": st.none() | st.integers(),
}
BAD_EXPLORATION: dict[str, st.SearchStrategy[Any]] = {
    "epsilon": NO_SHARE,
    "holdout": NO_SHARE,
    "slo_violation_limit": NO_SHARE,
    "budget": NO_SHARE,
    "risk_aversion": NO_SHARE,
    "horizon": NO_AMOUNT,
    "shortlist_size": st.integers(max_value=0) | st.integers(min_value=1001) | st.just(2.5) | NO_NUMBER,
}


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_ranking_refuses_bad_arguments_and_forgets_nothing(data: st.DataObject) -> None:
    calibration, policy = Calibration(), PredictionPolicy()
    rows, known = calibration.rows(), policy.to_bytes()
    parts = "context", "profiles", "measured twice", "variant", "twice", "decision_id", "exploration"
    part = data.draw(st.sampled_from(parts))
    arguments: dict[str, Any] = {"decision_id": "decision-1", "policy": policy, "calibration": calibration}
    if part == "context":
        field, value = data.draw(one_of(CONTEXT))
        arguments["context"] = context(**{field: value})
    elif part == "profiles":
        field, value = data.draw(one_of(BAD_PROFILE))
        arguments["profiles"] = (replace(Profile(action(0).variant.digest, 1, 8.0, 2.0), **{field: value}),)
    elif part == "measured twice":
        measured = (*profiles(), *profiles(source="class"))
        again = replace(data.draw(st.sampled_from(measured)), a_ms=data.draw(st.floats(0.1, 10.0)))
        field, arguments["profiles"] = f"profiles[{len(measured)}]", (*measured, again)
    elif part == "variant":
        field, value = data.draw(one_of(BAD_VARIANT))
        arguments["actions"] = (action(0, **{field: value}), action(1))
    elif part == "twice":
        field, listed = "actions", grid()
        arguments["actions"] = (*listed, data.draw(st.sampled_from(listed)))
    elif part == "decision_id":
        field, arguments["decision_id"] = "decision_id", data.draw(NO_NAME)
    else:
        field, value = data.draw(one_of(BAD_EXPLORATION))
    with pytest.raises(InvalidInput) as refused:
        ranked(**arguments) if part != "exploration" else Exploration(**{field: value})
    assert field in str(refused.value)
    assert calibration.rows() == rows
    assert policy.to_bytes() == known


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 4), st.sampled_from(["memory", "banned", "accuracy", "operators"]))
def test_nothing_to_choose_from_says_why_for_every_action(count: int, reason: str) -> None:
    actions = grid()[: count * 2]
    situations = {
        "memory": context(memory_free_bytes=1),
        "accuracy": context(minimum_accuracy=1.0),
        "operators": context(supported_operators=frozenset(["Relu"])),
        "banned": context(),
    }
    needy = tuple(
        replace(each, variant=replace(each.variant, memory_bytes=10**9, operators=frozenset(["Conv"])))
        for each in actions
    )
    bans = {each.key: "pinned" for each in needy} if reason == "banned" else {}
    with pytest.raises(NoFeasibleAction) as refused:
        ranked(actions=needy, context=situations[reason], bans=bans)
    assert set(refused.value.reasons) == {each.key for each in needy}
    assert all(any(mask.startswith(reason) for mask in masks) for masks in refused.value.reasons.values())


class Broken(PredictionPolicy):
    """Answers whatever it was given."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self._answer = answer

    def probabilities(self, *_: Any) -> Any:
        return np.array(self._answer)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-0.5, 1.5) | st.sampled_from([math.nan, math.inf]), min_size=0, max_size=4))
def test_a_policy_that_gives_no_distribution_is_a_typed_failure(answer: list[float]) -> None:
    is_distribution = len(answer) == 2 and all(each > 0 for each in answer) and abs(sum(answer) - 1) <= 1e-3 + 1e-9
    arguments: dict[str, Any] = {"actions": grid(1, (1, 4), (1,)), "policy": Broken(answer)}
    if is_distribution:
        assert ranked(**arguments).propensity > 0
    else:
        with pytest.raises(PolicyFailure):
            ranked(**arguments)


WORDS = [
    "--cb_explore_adf", "--squarecb", "-l", "--learning_rate", "--gamma_scale", "--epsilon", "-b", "--random_seed",
    "-f", "-i", "--invert_hash", "--extra_metrics", "--daemon", "--audit_regressor", "-d", "--cb_type", "mtr", "0.1",
    "500", "18", "nan", "inf", "-1", "/etc/passwd", "--l2=1e-3", "-q", "::", "'", ";", "\x00",
]  # fmt: skip
HARMFUL = ("-f", "-i", "-d", "--invert_hash", "--extra_metrics", "--daemon", "--audit_regressor", "/etc/passwd", ";")


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=7))
def test_arguments_are_settings_from_the_allow_list_or_refused(words: list[str]) -> None:
    try:
        parsed = VwSettings.parse(" ".join(words))
    except InvalidInput:
        return
    assert not set(HARMFUL) & set(words)
    assert not set(HARMFUL) & set(parsed.arguments.split())


def places(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in a JSON value."""
    yield path
    inside = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, value in inside:
        yield from places(value, (*path, key))


def spoilt_bytes(data: bytes, path: tuple[Any, ...], value: Any) -> bytes:
    """The policy's bytes with one value of its state replaced, under a digest that is right."""
    stored = json.loads(data.partition(b"\n")[2])
    inside = stored
    for key in ("state", *path)[:-1]:
        inside = inside[key]
    inside[("state", *path)[-1]] = value
    body = json.dumps(stored, sort_keys=True).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def learnt(which: str) -> bytes:
    policy = MAKERS[which]()
    for entry in log(3):
        policy.learn(entry)
    return policy.to_bytes()


JSON_POLICIES = [which for which, make in MAKERS.items() if isinstance(make(), Stored)]
REPLACEMENTS = [None, math.nan, math.inf, -1, 0, 2**70, 1e300, "", "é", "AAAA", True, [], {}, [1.0], {"a": None}]


@pytest.mark.parametrize("which", JSON_POLICIES)
def test_bytes_with_a_right_digest_and_a_wrong_state_are_refused_or_still_a_policy(which: str) -> None:
    kind, data = type(MAKERS[which]()), learnt(which)
    paths = list(places(json.loads(data.partition(b"\n")[2])["state"]))

    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(paths), st.sampled_from(REPLACEMENTS))
    def reads_or_refuses(path: tuple[Any, ...], value: Any) -> None:
        try:
            policy = kind.from_bytes(spoilt_bytes(data, path, value))
        except CorruptPolicy:
            return
        shares = policy.probabilities(context(), candidates(0.7, 0.6, 0.5))
        assert (shares > 0).all()
        assert shares.sum() == pytest.approx(1.0)

    reads_or_refuses()
