from __future__ import annotations

import numpy as np
import pytest

from qoe_service.catalogue.evaluation import wilson_interval


@pytest.mark.parametrize(
    ("correct", "samples", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),  # by hand, and as tabulated in Newcombe 1998
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
    ],
)
def test_the_interval_agrees_with_published_values(correct: int, samples: int, low: float, high: float) -> None:
    assert wilson_interval(correct, samples) == pytest.approx((low, high), abs=5e-4)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    truth, trials = 0.95, 4000
    covered = sum(
        low <= truth <= high for low, high in (wilson_interval(int(c), 200) for c in rng.binomial(200, truth, trials))
    )
    # the standard error of the coverage is 0.0035
    assert 0.93 < covered / trials < 0.97
