"""The QoE formula: what it promises about scales, missing parts and expectation."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selector.errors import InvalidInput
from selector.interactions import Measurement
from selector.reward import QoeFormula

share = st.floats(0, 1)
formulas = st.builds(
    QoeFormula,
    st.integers(0, 9),
    st.floats(0.01, 10),
    st.floats(0, 10),
    st.floats(0, 10),
    st.floats(0, 10),
    slo_p95_ms=st.floats(1, 1e4),
    accuracy_floor=st.floats(0, 0.99),
    switching_weight=share,
    failure_reward=share,
)
measurements = st.builds(
    Measurement,
    requests=st.integers(1, 10**6),
    errors=st.integers(0, 10**6),
    slo_hit_share=share,
    accuracy=st.none() | share,
    cpu_ms_per_request=st.none() | st.floats(0, 1e6),
    rating=st.none() | share,
    download_bytes=st.integers(0, 10**12),
    failed=st.booleans(),
)


@settings(max_examples=100, deadline=None)
@given(formulas, measurements)
def test_every_reward_lies_between_zero_and_one(formula: QoeFormula, measurement: Measurement) -> None:
    assert 0.0 <= formula.reward(measurement) <= 1.0


@settings(max_examples=50, deadline=None)
@given(formulas)
def test_a_formula_survives_json_exactly(formula: QoeFormula) -> None:
    assert QoeFormula.from_record(json.loads(json.dumps(formula.as_record()))) == formula


def test_a_rating_of_zero_is_a_rating() -> None:
    formula = QoeFormula(weight_accuracy=0, weight_energy=0)
    answered = Measurement(requests=10, slo_hit_share=0.8)
    assert formula.reward(answered) == pytest.approx(0.8)
    assert formula.reward(Measurement(requests=10, slo_hit_share=0.8, rating=0.0)) == pytest.approx(0.4)


def test_missing_parts_leave_the_other_weights_renormalised() -> None:
    formula = QoeFormula(weight_latency=3, weight_accuracy=1, weight_energy=1, weight_rating=5)
    assert formula.reward(Measurement(requests=4, slo_hit_share=0.5, accuracy=0.9)) == pytest.approx(
        (3 * 0.5 + 0.9) / 4
    )


def test_errors_count_as_misses() -> None:
    formula = QoeFormula(weight_accuracy=0, weight_energy=0)
    assert formula.reward(Measurement(requests=10, errors=5, slo_hit_share=1.0)) == pytest.approx(0.5)
    assert formula.reward(Measurement(requests=10, errors=10)) == 0.0


def test_percentiles_stand_in_for_a_missing_share() -> None:
    formula = QoeFormula(weight_accuracy=0, weight_energy=0, slo_p95_ms=80.0)
    assert formula.reward(Measurement(requests=9, p50_ms=40.0, p95_ms=80.0)) == pytest.approx(0.95, abs=1e-3)


def test_a_failed_lease_has_its_own_reward() -> None:
    failed = Measurement(requests=10, slo_hit_share=1.0, failed=True)
    assert QoeFormula().reward(failed) == 0.0
    assert QoeFormula(failure_reward=0.25).reward(failed) == 0.25


def test_accuracy_of_the_variant_stands_in_for_a_measured_one() -> None:
    formula = QoeFormula(weight_latency=0, weight_energy=0, accuracy_floor=0.5)
    assert formula.reward(Measurement(requests=1), accuracy=0.75) == pytest.approx(0.5)
    assert formula.reward(Measurement(requests=1, accuracy=1.0), accuracy=0.75) == pytest.approx(1.0)


def test_nothing_measured_is_not_a_reward() -> None:
    assert not QoeFormula().can_score(Measurement())
    with pytest.raises(InvalidInput, match="measurement"):
        QoeFormula().reward(Measurement())


def test_downloads_are_charged_up_to_the_switching_weight() -> None:
    formula = QoeFormula(weight_accuracy=0, weight_energy=0, switching_weight=0.1, switching_reference_bytes=1e6)
    rewards = [formula.reward(Measurement(requests=1, slo_hit_share=1.0, download_bytes=n)) for n in (0, 10**6, 10**12)]
    assert rewards == pytest.approx([1.0, 0.95, 0.9], abs=1e-5)


def test_prediction_estimates_the_reward_when_its_ingredients_are_right() -> None:
    rng = np.random.default_rng(5)
    formula = QoeFormula(accuracy_floor=0.8)
    predicted = float(formula.predicted(0.93, 0.9, 30.0, 4e6))
    base = formula.predicted(0.93, 0.9, 30.0, 0.0)
    rewards = [
        formula.reward(
            Measurement(
                requests=200,
                slo_hit_share=rng.binomial(200, 0.9) / 200,
                cpu_ms_per_request=30.0 * math.exp(rng.normal(0, 0.05)),
                rating=float(np.clip(base + rng.normal(0, 0.1), 0, 1)),
                download_bytes=4_000_000,
            ),
            accuracy=0.93,
        )
        for _ in range(400)
    ]
    assert np.mean(rewards) == pytest.approx(predicted, abs=4 * np.std(rewards) / 20)


@pytest.mark.parametrize(
    "bad",
    [
        {"weight_latency": -1},
        {"weight_rating": math.nan},
        {"slo_p95_ms": 0},
        {"accuracy_floor": 1.0},
        {"energy_reference_cpu_ms": math.inf},
        {"switching_weight": 2},
        {"failure_reward": -0.1},
        {"version": "1"},
        {"weight_latency": True},
    ],
)
def test_a_senseless_formula_is_refused_by_field_name(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as caught:
        QoeFormula(**bad)
    assert caught.value.field in bad


@pytest.mark.parametrize(
    "bad",
    [
        {"p95_ms": math.nan},
        {"slo_hit_share": 1.5},
        {"rating": -0.1},
        {"requests": -1},
        {"cpu_ms_per_request": math.inf},
    ],
)
def test_a_senseless_measurement_is_refused_by_field_name(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as caught:
        QoeFormula().reward(Measurement(**{"requests": 1, **bad}))
    assert caught.value.field == f"measurement.{next(iter(bad))}"
