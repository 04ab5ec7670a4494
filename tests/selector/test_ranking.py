"""Decisions: masks, shortlists, and probabilities that are what they say."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selector.baselines import FixedPolicy, PredictionPolicy, RandomPolicy
from selector.errors import InvalidInput, NoFeasibleAction, PolicyFailure
from selector.interactions import Action, Candidate, Configuration, Context
from selector.policy import checked, sample, seed_of
from selector.ranking import EXPLOIT, HOLDOUT_BEST_FIXED, HOLDOUT_UNIFORM, UNIFORM, Exploration, mixture
from selector.vw import VowpalWabbitPolicy
from tests.selector.builders import action, context, grid, profiles, ranked, variant


def test_the_same_decision_id_gives_the_same_decision() -> None:
    assert ranked("d-1", PredictionPolicy()) == ranked("d-1", PredictionPolicy())
    assert len({ranked(f"d-{number}").chosen for number in range(50)}) > 5


def test_how_often_an_action_is_drawn_is_its_logged_probability() -> None:
    """Over many ids; 5 standard errors, so a right sampler fails once in a million."""
    fixed = action(0, 4, 2).key
    draws, count = Counter[int](), 6000
    ranking = ranked("any", RandomPolicy(), best_fixed=fixed, exploration=Exploration(0.2, 0.3, 4))
    probabilities = np.array([each.probability for each in ranking.candidates])
    draws.update(sample(probabilities, seed_of(f"d-{number}")) for number in range(count))
    frequency = np.array([draws[index] / count for index in range(len(probabilities))])
    assert (np.abs(frequency - probabilities) <= 5 * np.sqrt(probabilities * (1 - probabilities) / count)).all()


def test_kinds_are_drawn_as_often_as_the_mixture_says_and_only_where_they_can_be() -> None:
    fixed = action(0, 4, 2).key
    some = Exploration(epsilon=0.2, holdout=0.4, shortlist_size=3)
    rankings = [ranked(f"d-{n}", PredictionPolicy(), best_fixed=fixed, exploration=some) for n in range(400)]
    kinds = Counter(each.kind for each in rankings)
    expected = {EXPLOIT: 0.4, UNIFORM: 0.2, HOLDOUT_UNIFORM: 0.2, HOLDOUT_BEST_FIXED: 0.2}
    for kind, share in expected.items():
        assert abs(kinds[kind] / 400 - share) <= 5 * math.sqrt(share * (1 - share) / 400)
    assert {each.action.key for each in rankings if each.kind == HOLDOUT_BEST_FIXED} == {fixed}
    assert all(each.candidates[each.chosen].shortlisted for each in rankings if each.kind == EXPLOIT)


def test_the_kind_says_nothing_but_the_mixture_given_the_action() -> None:
    """Two actions, a policy that is uniform: whichever is drawn, 0.4 of the draws are the policy's."""
    some = Exploration(epsilon=0.3, holdout=0.3, slo_violation_limit=1.0)
    rankings = [ranked(f"d-{n}", RandomPolicy(), actions=(action(0), action(1)), exploration=some) for n in range(400)]
    for chosen in (0, 1):
        kinds = [each.kind for each in rankings if each.chosen == chosen]
        assert abs(kinds.count(EXPLOIT) / len(kinds) - 0.4) <= 5 * math.sqrt(0.24 / len(kinds))


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.floats(0.01, 0.5), st.floats(0, 0.5)),
    st.integers(1, 20),
    st.integers(0, 12),
    st.floats(0, 1),
    st.integers(0, 2),
)
def test_every_feasible_action_can_happen_and_no_other(
    chance: tuple[float, float], size: int, best: int, accuracy: float, banned: int
) -> None:
    epsilon, holdout = chance
    situation = context(minimum_accuracy=0.95 * accuracy, incumbent=action(1, 4).key)
    actions = grid()
    fixed = actions[best].key if best < len(actions) else "gone"
    ranking = ranked(
        policy=PredictionPolicy(),
        context=situation,
        best_fixed=fixed,
        exploration=Exploration(epsilon, holdout, size),
        bans={actions[number].key: "slow" for number in range(banned)},
    )
    probabilities = np.array([each.probability for each in ranking.candidates])
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-12)
    assert all((each.probability > 0) == each.is_feasible for each in ranking.candidates)
    feasible = sum(each.is_feasible for each in ranking.candidates)
    least = (epsilon + holdout / 2) / feasible
    assert all(each.probability >= least - 1e-12 for each in ranking.candidates if each.is_feasible)


def test_the_mixture_is_the_stated_sum() -> None:
    ranking = ranked(
        policy=FixedPolicy(action(0).key),
        best_fixed=action(1).key,
        exploration=Exploration(epsilon=0.1, holdout=0.2, shortlist_size=2, slo_violation_limit=1.0),
        context=context(incumbent=action(0).key, baseline=action(2).key),
    )
    by_key = {each.action.key: each for each in ranking.candidates}
    count = len(ranking.candidates)
    assert by_key[action(0).key].probability == pytest.approx(0.7 * (0.999 + 0.0005) + 0.1 / count + 0.1 / count)
    assert by_key[action(1).key].probability == pytest.approx(0.1 / count + 0.1 / count + 0.1)


def test_a_best_fixed_action_that_cannot_be_taken_makes_the_holdout_uniform() -> None:
    parts = mixture(np.array([1.0, 0, 0]), np.array([True, True, False]), 2, Exploration(0.1, 0.3), True)
    assert parts[HOLDOUT_UNIFORM].tolist() == pytest.approx([0.15, 0.15, 0.0])
    assert parts[HOLDOUT_BEST_FIXED].sum() == 0


def test_without_a_policy_the_draw_is_uniform_over_what_is_feasible() -> None:
    ranking = ranked(bans={variant(0).digest: "broken"})
    assert ranking.kind == UNIFORM
    assert [each.probability for each in ranking.candidates] == pytest.approx([0.0] * 4 + [1 / 8] * 8)


SURE = Exploration(shortlist_size=4, horizon=0.0, risk_aversion=0.0)


def test_what_is_unsure_but_promising_is_shortlisted_too() -> None:
    """A slow guess for a more accurate variant: nobody measured it, so it may be fast enough."""
    accurate = replace(variant(0), accuracy=1.0, size_bytes=6_000_000)
    actions = (Action(accurate, Configuration(1, 1, 1)), action(1), action(2))
    situation = context(slo_p95_ms=12.0, arrival_rate_rps=1.0)
    some = tuple(each for each in profiles() if each.digest != variant(0).digest)

    def listed(exploration: Exploration) -> bool:
        ranking = ranked(
            policy=RandomPolicy(), context=situation, actions=actions, profiles=some, exploration=exploration
        )
        first = ranking.candidates[0]
        assert "slo_violation_likely" in first.soft_masks
        assert first.prediction.source == "size"
        return first.shortlisted

    assert not listed(SURE)
    assert listed(replace(SURE, horizon=200.0))


def test_the_shortlist_holds_the_best_predictions_and_always_incumbent_and_baseline() -> None:
    situation = context(incumbent=action(0, 4, 2).key, baseline=action(0, 1, 2).key)
    ranking = ranked(policy=RandomPolicy(), context=situation, exploration=SURE)
    listed = {each.action.key for each in ranking.candidates if each.shortlisted}
    best = sorted(ranking.candidates, key=lambda each: -each.prediction.qoe)
    assert len(listed) == 4
    assert {action(0, 4, 2).key, action(0, 1, 2).key} <= listed
    assert best[0].action.key in listed


def test_likely_slo_misses_stay_off_the_shortlist_but_not_out_of_reach() -> None:
    slow = profiles() + profiles()[:0]
    slow = tuple(replace(each, a_ms=500.0) if each.digest == variant(0).digest else each for each in slow)
    ranking = ranked(policy=RandomPolicy(), profiles=slow)
    late = [each for each in ranking.candidates if each.soft_masks]
    assert {each.action.variant.name for each in late} == {"variant-0"}
    assert all(not each.shortlisted and each.probability > 0 for each in late)


def test_if_every_action_will_be_late_the_policy_still_chooses() -> None:
    ranking = ranked(policy=RandomPolicy(), context=context(slo_p95_ms=0.001))
    assert all(each.soft_masks for each in ranking.candidates)
    assert sum(each.shortlisted for each in ranking.candidates) == Exploration().shortlist_size


MASKS = [
    ({"minimum_accuracy": 0.945}, {}, "accuracy_below_minimum", {"variant-1", "variant-2"}),
    ({"memory_free_bytes": 3_000_000}, {}, "memory", {"variant-0"}),
    ({"supported_operators": frozenset({"Conv"})}, {}, "operators", {"variant-0", "variant-1", "variant-2"}),
    ({}, {variant(1).digest: "rollback"}, "banned:rollback", {"variant-1"}),
    ({}, {variant(1).digest[:12]: "operator"}, "banned:operator", {"variant-1"}),
    ({}, {action(2).key: "operator"}, "banned:operator", {"variant-2"}),
]


@pytest.mark.parametrize(("situation", "bans", "reason", "names"), MASKS)
def test_hard_masks_say_why(situation: dict[str, Any], bans: dict[str, str], reason: str, names: set[str]) -> None:
    actions = tuple(action(number, operators=frozenset({"Conv", "QAttention"})) for number in range(3))
    actions += (action(9, accuracy=0.99, size_bytes=10),)
    ranking = ranked(actions=actions, context=context(**situation), bans=bans)
    assert {each.action.variant.name for each in ranking.candidates if reason in each.hard_masks} == names


def test_more_threads_than_cores_are_masked() -> None:
    ranking = ranked(actions=(action(0), action(0, threads=8)), context=context(cores=4))
    assert [each.hard_masks for each in ranking.candidates] == [(), ("threads_above_cores",)]


def test_the_running_variant_needs_no_more_memory() -> None:
    situation = context(memory_free_bytes=10, incumbent=action(0).key)
    ranking = ranked(context=situation)
    assert {each.action.variant.name for each in ranking.candidates if each.is_feasible} == {"variant-0"}


def test_no_feasible_action_is_an_error_with_all_reasons() -> None:
    with pytest.raises(NoFeasibleAction, match="memory") as caught:
        ranked(context=context(memory_free_bytes=1))
    assert set(caught.value.reasons) == {each.key for each in grid()}
    with pytest.raises(NoFeasibleAction):
        ranked(actions=())


def test_variants_on_the_device_are_preferred_to_equal_ones_elsewhere() -> None:
    actions = (action(0), replace(action(0), variant=replace(variant(0), digest="ff" * 32)))
    measured = profiles() + tuple(replace(each, digest="ff" * 32) for each in profiles()[:1])
    ranking = ranked(actions=actions, profiles=measured, context=context(cached_digests=frozenset({"ff" * 32})))
    assert ranking.candidates[1].prediction.qoe > ranking.candidates[0].prediction.qoe


BAD_CONTEXTS = [
    {"arrival_rate_rps": math.nan},
    {"arrival_rate_rps": -1.0},
    {"slo_p95_ms": 0.0},
    {"slo_p95_ms": math.inf},
    {"cores": 0},
    {"device": ""},
    {"cpu_load_share": 1.5},
    {"minimum_accuracy": -0.1},
    {"features": {"temperature": math.nan}},
    {"features": {"": 1.0}},
]


@pytest.mark.parametrize("bad", BAD_CONTEXTS)
def test_a_bad_context_is_refused_by_field_name(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as caught:
        ranked(context=context(**bad))
    assert next(iter(bad)) in caught.value.field


@pytest.mark.parametrize(
    "bad",
    [
        {"actions": (action(0), action(0))},
        {"actions": (action(0, batch=0),)},
        {"actions": (action(0, accuracy=math.nan),)},
        {"actions": (action(0, size_bytes=-1),)},
        {"profiles": (replace(profiles()[0], a_ms=math.inf),)},
        {"profiles": (replace(profiles()[0], a_ms=-1.0),)},
        {"profiles": (replace(profiles()[0], a_ms=0.0, b_ms=0.0),)},
    ],
)
def test_bad_actions_and_profiles_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        ranked(**bad)


@pytest.mark.parametrize("bad", [{"bans": {action(0).key}}, {"bans": None}, {"best_fixed": [action(0).key]}])
def test_bans_without_reasons_and_a_best_fixed_action_without_a_name_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(bad))):
        ranked(**bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"epsilon": -0.1},
        {"epsilon": 0.0, "holdout": 0.0},
        {"epsilon": 0.6, "holdout": 0.6},
        {"shortlist_size": 0},
        {"shortlist_size": 2.5},
        {"slo_violation_limit": math.nan},
    ],
)
def test_senseless_exploration_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        Exploration(**bad)


class Broken(RandomPolicy):
    """Answers whatever it was given."""

    def __init__(self, answer: Sequence[float]) -> None:
        self.answer = np.array(answer)

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> Any:
        return self.answer


@pytest.mark.parametrize("answer", [[1.0], [0.5, 0.5, 0.5], [1.0, 0.0, 0.0], [math.nan, 0.5, 0.5], [-0.5, 1.0, 0.5]])
def test_a_policy_that_answers_no_distribution_is_refused(answer: list[float]) -> None:
    with pytest.raises(PolicyFailure):
        ranked(policy=Broken(answer), actions=tuple(action(number) for number in range(3)))


def test_load_and_arrivals_of_any_size_still_give_a_decision() -> None:
    for rate in (0.0, 1e-3, 1e3, 1e9):
        ranking = ranked(policy=VowpalWabbitPolicy(), context=context(arrival_rate_rps=rate, cpu_load_share=1.0))
        assert all(math.isfinite(each.prediction.p95_ms) for each in ranking.candidates)


def test_a_zero_probability_is_never_drawn() -> None:
    assert {sample([0.0, 0.5, 0.0, 0.5, 0.0], seed) for seed in range(200)} == {1, 3}


@pytest.mark.parametrize("bad", [[], [0.5, 0.4], [math.nan, 1.0], [-0.5, 1.5]])
def test_the_sampler_refuses_what_is_no_distribution(bad: list[float]) -> None:
    with pytest.raises(InvalidInput):
        sample(bad, 1)


def test_seeds_fit_a_signed_database_integer() -> None:
    assert all(0 <= seed_of(f"d-{number}") < 2**63 for number in range(100))


def test_a_digest_that_is_no_text_is_named() -> None:
    wrong: Any = 7
    with pytest.raises(InvalidInput, match=r"variant\.digest"):
        ranked(actions=(Action(replace(variant(0), digest=wrong), Configuration(1, 1, 1)),))


@pytest.mark.parametrize("shares", [[np.inf, -np.inf], [np.nan, 1.0]])
def test_probabilities_that_are_no_numbers_are_a_failure_of_the_policy(shares: list[float]) -> None:
    with pytest.raises(PolicyFailure, match="not finite"):
        checked(shares, 2)
