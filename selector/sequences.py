"""Confidence sequences for off-policy values: intervals that hold at every time at once, whatever logged the decisions.

Waudby-Smith, Wu, Ramdas, Karampatziakis & Mineiro, "Anytime-valid off-policy inference for contextual bandits"
(2022): importance-weighted rewards are non-negative, so their deviations can be bet on from below without a bound on
the weights; the upper limit comes from high - reward in the same way. The bets are mixed by the gamma-exponential
mixture of Howard, Ramdas, McAuliffe & Sekhon, "Time-uniform Chernoff bounds via nonnegative supermartingales" (2020),
proposition 9. `estimators.confidence_sequence` is the narrower one where the terms themselves are bounded.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from selector.distributions import log_lower_gamma
from selector.estimators import ANYTIME, Estimate, bounded_rewards, effective_sample_size, importance_weights
from selector.validation import number

Floats = NDArray[np.float64]


def off_policy_sequence(
    rewards: ArrayLike,
    propensities: ArrayLike,
    targets: ArrayLike,
    *,
    low: float = 0.0,
    high: float = 1.0,
    alpha: float = 0.05,
    opening: float = 1.0,
) -> Estimate:
    """Inverse-propensity value of the target with a 1 - ``alpha`` interval that survives peeking; arrays in log order.

    Propensities may depend on the past. ``opening`` says at which scale of evidence the interval is tightest. The mean
    is clipped into the interval. Raises InvalidInput naming the argument.
    """
    weights = importance_weights(propensities, targets)
    values = bounded_rewards(rewards, weights.size, low, high)
    number("alpha", alpha, 1e-9, 1 - 1e-9)
    number("opening", opening, 1e-6, 1e6)
    scaled = np.clip((values - low) / (high - low), 0.0, 1.0)
    lower = low + (high - low) * _lower_limit(weights * scaled, alpha / 2.0, opening)
    upper = high - (high - low) * _lower_limit(weights * (1.0 - scaled), alpha / 2.0, opening)
    mean = float((weights * values).mean())
    return Estimate(
        min(max(mean, min(lower, upper)), max(lower, upper)),
        min(lower, upper),
        max(lower, upper),
        ANYTIME,
        effective_sample_size(weights),
    )


def _lower_limit(terms: Floats, alpha: float, opening: float) -> float:
    """Largest m in [0, 1] such that non-negative terms of conditional mean m or less win this much with a chance of at
    most alpha: where the wealth of the mixture falls to 1/alpha."""
    count, total = terms.size, float(terms.sum())
    before = np.concatenate(([0.0], np.cumsum(terms)[:-1]))
    # What is expected of a term from those before it. The guarantee needs a guess made in advance, and none above 1.
    guesses = np.minimum((before + 0.5) / np.arange(1, count + 1), 1.0)
    variation = float(((terms - guesses) ** 2).sum())
    wanted = -math.log(alpha)

    def wealth(mean: float) -> float:
        return _log_wealth(total - count * mean, variation, opening)

    if wealth(0.0) <= wanted:
        return 0.0
    lowest, highest = 0.0, min(1.0, total / count)
    if wealth(highest) >= wanted:
        return highest
    for _ in range(60):
        middle = 0.5 * (lowest + highest)
        if wealth(middle) > wanted:
            lowest = middle
        else:
            highest = middle
    return 0.5 * (lowest + highest)


def _log_wealth(gain: float, variation: float, opening: float) -> float:
    """Logarithm of the mixture over bets in [0, 1) after a summed gain with this summed squared deviation."""
    shape, scale = variation + opening, gain + variation + opening
    return (
        gain
        + variation
        + opening * math.log(opening)
        - shape * math.log(scale)
        + log_lower_gamma(shape, scale)
        - log_lower_gamma(opening, opening)
    )
