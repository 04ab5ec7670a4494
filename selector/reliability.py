"""How well probabilities are calibrated: reliability curve and Brier score. Knows nothing of what they are about."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from selector.errors import InvalidInput
from selector.estimators import beside, vector
from selector.validation import whole

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Bin:
    """Forecasts within [low, high): their mean, the share of those that came true, and how many there were."""

    low: float
    high: float
    forecast: float
    observed: float
    count: int


def brier_score(forecasts: ArrayLike, outcomes: ArrayLike) -> float:
    """Mean squared error of probabilities (Brier, 1950); 0 is perfect, 0.25 is a coin. Shapes (n,) and (n,).

    Raises InvalidInput for what is no probability in [0, 1], or no outcome that is 0 or 1.

    >>> brier_score([1.0, 0.0, 0.5], [True, False, True])
    0.08333333333333333
    """
    p, y = _checked(forecasts, outcomes)
    return float(np.mean((p - y) ** 2))


def reliability_curve(forecasts: ArrayLike, outcomes: ArrayLike, bins: int = 10) -> tuple[Bin, ...]:
    """Forecast against what came, in bins of equal width; empty bins are left out. Shapes (n,) and (n,).

    Raises InvalidInput as `brier_score` does, and for less than one bin.

    >>> [(b.count, b.observed) for b in reliability_curve([0.1, 0.15, 0.9, 0.95], [0, 0, 1, 0], bins=2)]
    [(2, 0.0), (2, 0.5)]
    """
    p, y = _checked(forecasts, outcomes)
    whole("bins", bins, 1, 1_000_000)
    place = np.minimum((p * bins).astype(np.intp), bins - 1)
    return tuple(
        Bin(each / bins, (each + 1) / bins, float(p[place == each].mean()), float(y[place == each].mean()), int(count))
        for each, count in enumerate(np.bincount(place, minlength=bins))
        if count
    )


def calibration_error(curve: tuple[Bin, ...]) -> float:
    """Expected calibration error: mean distance between forecast and outcome, weighted by how many (Naeini, 2015).

    Raises InvalidInput for a curve without bins.

    >>> round(calibration_error(reliability_curve([0.2] * 10, [1, 1] + [0] * 8)), 6)
    0.0
    """
    if not curve:
        raise InvalidInput("curve", "must not be empty")
    return sum(each.count * abs(each.forecast - each.observed) for each in curve) / sum(each.count for each in curve)


def _checked(forecasts: ArrayLike, outcomes: ArrayLike) -> tuple[Floats, Floats]:
    p = vector("forecasts", forecasts)
    y = beside("outcomes", outcomes, p.size)
    if not ((p >= 0) & (p <= 1)).all():
        raise InvalidInput("forecasts", "must be probabilities in [0, 1]")
    if not ((y == 0) | (y == 1)).all():
        raise InvalidInput("outcomes", "must be 0 or 1")
    return p, y
