"""What is logged comes back as it was, to the last bit."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selector import records
from selector.errors import InvalidInput
from selector.interactions import Configuration, Context, Interaction, Measurement, Prediction, Profile, Ranking
from tests.selector.builders import action, candidate, context, interaction, prediction, ranked, variant

finite = st.floats(allow_nan=False, allow_infinity=False)
maybe = st.none() | finite


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(records.as_record(value), allow_nan=False))


@settings(max_examples=50, deadline=None)
@given(st.builds(Prediction, *[finite] * 7, *[finite] * 5, st.text(max_size=5)))
def test_predictions_survive_exactly(value: Prediction) -> None:
    assert records.prediction_from_record(through_json(value)) == value


@settings(max_examples=50, deadline=None)
@given(
    st.builds(Measurement, st.integers(0), st.integers(0), *[maybe] * 8, st.integers(0), st.integers(0), st.booleans())
)
def test_measurements_survive_exactly(value: Measurement) -> None:
    assert records.measurement_from_record(through_json(value)) == value


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), finite | st.text()), st.frozensets(st.text()), finite)
def test_contexts_survive_exactly(features: dict[str, float | str], digests: frozenset[str], rate: float) -> None:
    value = context(features=features, cached_digests=digests, supported_operators=digests, arrival_rate_rps=rate)
    assert records.context_from_record(through_json(value)) == value


def test_the_other_words_survive_exactly() -> None:
    one = variant(2, operators=frozenset({"Conv", "Relu"}))
    assert records.variant_from_record(through_json(one)) == one
    assert records.configuration_from_record(through_json(Configuration(4, 2, 1, True))) == Configuration(4, 2, 1, True)
    assert records.action_from_record(through_json(action(3, 4))) == action(3, 4)
    profile = Profile("ab" * 32, 2, 0.1 + 0.2, 1e-17, 5, "class")
    assert records.profile_from_record(through_json(profile)) == profile
    masked = candidate(hard_masks=("memory",), soft_masks=("slo_violation_likely",))
    assert records.candidate_from_record(through_json(masked)) == masked


def test_a_whole_decision_survives_exactly() -> None:
    ranking = ranked(bans={action(1).variant.digest: "broken"})
    restored: Ranking = records.ranking_from_record(through_json(ranking))
    assert restored == ranked(bans={action(1).variant.digest: "broken"})
    assert sum(bool(each.hard_masks) for each in restored.candidates) == 4
    closed = Interaction(
        "decision-1", context(), ranking.candidates, ranking.chosen, Measurement(rating=0.0), 0.1 + 0.2
    )
    assert records.interaction_from_record(through_json(closed)) == closed


def test_equal_variants_that_are_separate_objects_still_come_back() -> None:
    value = interaction(candidates=(candidate(0), candidate(1), candidate(0, action=action(0, 4))))
    assert records.interaction_from_record(through_json(value)) == value


def test_old_records_without_newer_fields_are_still_read() -> None:
    record = through_json(context())
    del record["supported_operators"]
    record["added_later"] = 1
    assert records.context_from_record(record) == context()
    record = through_json(interaction())
    for name in ("source", "raw_a_ms"):
        del record["candidates"]["prediction"][name]
    assert records.interaction_from_record(record) == interaction()


def test_a_missing_field_is_named() -> None:
    record = through_json(prediction())
    del record["p95_ms"]
    with pytest.raises(InvalidInput, match=r"prediction\.p95_ms is missing"):
        records.prediction_from_record(record)


@pytest.mark.parametrize("damage", [{"variant": [9]}, {"probability": None}, {"prediction": {}}, {"shortlisted": 1}])
def test_damaged_candidates_are_refused(damage: dict[str, Any]) -> None:
    record = through_json(interaction())
    with pytest.raises(InvalidInput, match="candidates"):
        records.interaction_from_record({**record, "candidates": {**record["candidates"], **damage}})


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("context", {"features": None}),
        ("context", {"features": 3}),
        ("context", {"cached_digests": None}),
        ("context", {"cached_digests": "ab"}),
        ("context", {"supported_operators": [["Conv"]]}),
        ("context", {"unmeasured_digests": 7}),
    ],
)
def test_a_field_of_another_kind_is_named(part: str, damage: dict[str, Any]) -> None:
    record = through_json(interaction())
    with pytest.raises(InvalidInput, match=next(iter(damage))):
        records.interaction_from_record({**record, part: {**record[part], **damage}})


def test_a_variant_whose_operators_are_no_list_is_refused_by_name() -> None:
    record = through_json(action())
    with pytest.raises(InvalidInput, match="operators"):
        records.action_from_record({**record, "variant": {**record["variant"], "operators": None}})


def test_contexts_compare_as_values() -> None:
    assert records.context_from_record(through_json(context(features={"a": 1.0}))) != Context("x", "y", "z", 1.0, 1.0)
