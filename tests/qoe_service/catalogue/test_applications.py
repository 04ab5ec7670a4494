from __future__ import annotations

import math
from typing import Any

import pytest

from qoe_service.catalogue import applications
from qoe_service.catalogue.models import Application, Artifact, QoeFormula
from qoe_service.errors import InvalidInput, NotFound
from selector.reward import QoeFormula as Formula
from tests.builders import NOW, make_application, make_variant

pytestmark = pytest.mark.django_db


def record(**changes: Any) -> dict[str, Any]:
    """A complete application, but for the changes."""
    return {
        "name": "digits",
        "title": "Digits",
        "slo_p95_ms": 40,
        "minimum_accuracy": 0.8,
        "arrival_rate_rps": 20,
        "configurations": [{"max_batch": 1, "threads": 1}, {"max_batch": 8, "threads": 2}],
        "baseline": {"variant": "digits-small", "configuration": {"max_batch": 1, "threads": 1}},
        "qoe": {"weight_latency": 2.0, "weight_rating": 0.5},
        "lease_s": 8,
        "feedback_wait_s": 1.5,
        "silence": {"after_s": 30, "reward": 0.1},
        "epsilon": 0.05,
        "holdout": 0.1,
        "health_gate": {"min_requests": 5, "soak_s": 1},
        **changes,
    }


def define(**changes: Any) -> Application:
    return applications.define(record=record(**changes), now=NOW)


def test_an_application_is_created_from_a_record() -> None:
    dataset = Artifact.objects.create(digest="0" * 64, size_bytes=1, created_at=NOW)
    applications.define(record=record(), dataset=dataset, now=NOW)
    application = Application.objects.get()
    assert (application.name, application.slo_p95_ms, application.lease_s) == ("digits", 40, 8)
    assert application.configurations[1] == {"max_batch": 8, "max_concurrency": 1, "threads": 2, "controller": False}
    assert application.baseline_configuration == application.configurations[0]
    assert (application.baseline_variant, application.baseline_digest) == ("digits-small", "")
    assert (application.silence_after_s, application.silence_reward) == (30, 0.1)
    assert application.health_gate["min_requests"] == 5
    assert application.dataset == dataset


def test_the_formula_is_complete_and_takes_the_slo_of_the_application() -> None:
    define()
    stored = QoeFormula.objects.get()
    formula = Formula.from_record(stored.definition)
    assert (stored.version, formula.version, formula.slo_p95_ms, formula.weight_latency) == (1, 1, 40, 2.0)
    assert set(stored.definition) == set(Formula().as_record())


def test_a_changed_definition_is_a_new_version_and_an_equal_one_is_not() -> None:
    define()
    define(title="Renamed")
    assert [each.version for each in QoeFormula.objects.all()] == [1]
    define(qoe={"weight_latency": 1.0})
    define(qoe={"weight_latency": 1.0})
    assert [each.version for each in QoeFormula.objects.all()] == [2, 1]
    assert QoeFormula.objects.get(version=1).definition["weight_latency"] == 2.0
    define(qoe={"weight_latency": 1.0}, slo_p95_ms=80)
    assert QoeFormula.objects.first().definition["slo_p95_ms"] == 80  # type: ignore[union-attr]  # three there are


def test_defining_again_updates_and_keeps_what_it_does_not_name() -> None:
    dataset = Artifact.objects.create(digest="0" * 64, size_bytes=1, created_at=NOW)
    applications.define(record=record(), dataset=dataset, now=NOW)
    define(lease_s=20)
    application = Application.objects.get()
    assert (application.lease_s, application.dataset) == (20, dataset)


def test_a_baseline_that_is_there_already_is_pointed_at() -> None:
    variant = make_variant(make_application("digits"), "digits-small")
    assert define().baseline_digest == variant.artifact_id


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": "no spaces"}, "name"),
        ({"title": ""}, "title"),
        ({"slo_p95_ms": 0}, "slo_p95_ms"),
        ({"slo_p95_ms": math.nan}, "slo_p95_ms"),
        ({"minimum_accuracy": 1.5}, "minimum_accuracy"),
        ({"configurations": []}, "configurations"),
        ({"configurations": [{"max_batch": 0}]}, "configurations.0.max_batch"),
        ({"configurations": [{"batch": 4}]}, "configurations.0.batch"),
        ({"configurations": [{}, {"threads": 1}], "baseline": None}, "configurations"),
        ({"baseline": {"variant": "digits-small", "configuration": {"max_batch": 64}}}, "baseline.configuration"),
        ({"qoe": {"weight_latency": -1}}, "qoe.weight_latency"),
        ({"qoe": {"weight_speed": 1}}, "qoe.weight_speed"),
        ({"qoe": {"weight_latency": "much"}}, "qoe.weight_latency"),
        ({"lease_s": -1}, "lease_s"),
        ({"silence": {"reward": 2}}, "silence.reward"),
        ({"epsilon": 0.6, "holdout": 0.6}, "holdout"),
        ({"epsilon": 0, "holdout": 0}, "holdout"),
        ({"health_gate": {"soak_s": 3}, "lease_s": 9}, "lease_s"),
        ({"health_gate": {"soak": 1}}, "health_gate.soak"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_a_wrong_field_is_named_and_nothing_is_stored(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        define(**changes)
    assert refusal.value.field == field
    assert refusal.value.detail
    assert not Application.objects.exists()


@pytest.mark.parametrize("content", [[], "text", None, 3])
def test_a_record_that_is_no_object_is_refused(content: Any) -> None:
    with pytest.raises(InvalidInput):
        applications.define(record=content, now=NOW)


def test_an_unknown_application_is_not_found() -> None:
    with pytest.raises(NotFound):
        applications.get("nothing")
