"""Forecasts against what came."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from selector.errors import InvalidInput
from selector.reliability import brier_score, calibration_error, reliability_curve


def test_honest_forecasts_lie_on_the_diagonal_and_bold_ones_do_not() -> None:
    rng = np.random.default_rng(3)
    truth = rng.random(20_000)
    outcomes = rng.random(20_000) < truth
    bold = np.clip(0.5 + 2.5 * (truth - 0.5), 0, 1)
    honest_curve, bold_curve = reliability_curve(truth, outcomes), reliability_curve(bold, outcomes)
    assert len(honest_curve) == 10
    assert sum(each.count for each in honest_curve) == 20_000
    # Each bin holds about 2,000 forecasts: a standard error of 0.011 at most.
    assert all(abs(each.forecast - each.observed) < 5 * 0.5 / np.sqrt(each.count) for each in honest_curve)
    assert calibration_error(honest_curve) < 0.02
    assert calibration_error(bold_curve) > 0.1
    assert brier_score(truth, outcomes) < brier_score(bold, outcomes)


def test_a_certain_forecast_belongs_to_the_last_bin() -> None:
    curve = reliability_curve([0.0, 1.0], [False, True])
    assert [(each.low, each.high, each.observed) for each in curve] == [(0.0, 0.1, 0.0), (0.9, 1.0, 1.0)]
    assert brier_score([0.0, 1.0], [False, True]) == 0


@pytest.mark.parametrize(
    ("forecasts", "outcomes"),
    [
        ([], []),
        ([0.5], [0, 1]),
        ([1.5], [1]),
        ([float("nan")], [1]),
        ([0.5], [0.5]),
        ([[0.5]], [[1]]),
        (["high"], [1]),
        ([0.5], [None]),
        ([0.5, 0.5], [[1], [0, 1]]),
    ],
)
def test_what_is_no_forecast_is_refused(forecasts: list[Any], outcomes: list[Any]) -> None:
    with pytest.raises(InvalidInput, match=r"forecasts|outcomes"):
        brier_score(forecasts, outcomes)
    with pytest.raises(InvalidInput, match=r"forecasts|outcomes"):
        reliability_curve(forecasts, outcomes)


def test_a_curve_needs_a_bin() -> None:
    for bins in (0, -1, 2.5, True):
        with pytest.raises(InvalidInput, match="bins"):
            reliability_curve([0.5], [1], bins=bins)  # type: ignore[arg-type]  # what callers without types pass
    with pytest.raises(InvalidInput, match="curve"):
        calibration_error(())
