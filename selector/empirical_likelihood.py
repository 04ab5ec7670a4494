"""Off-policy value by empirical likelihood with a Cressie-Read divergence: an estimate that uses that importance
weights average one, and the tightest of the intervals for charts.

Karampatziakis, Langford & Mineiro, "Empirical likelihood for contextual bandits" (NeurIPS 2020), with the Cressie-Read
power -2, for which everything has a closed form; worked out here as least squares. The n logged decisions and one that
was not seen get shares q of the total. Importance weights must average one, so q must satisfy sum q = 1 and
sum q w = 1; the estimate takes the shares nearest to equal ones, the interval all shares within a distance that a true
law keeps in 1 - alpha of the logs. The weight of the unseen decision is as large or as small as weights can be, its
reward unknown. An interval holds for dozens of decisions that count, looked at once; gates use
`estimators.confidence_sequence` or `sequences.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from selector.distributions import t_quantile
from selector.errors import InvalidInput
from selector.estimators import FIXED_N, Estimate, bounded_rewards, effective_sample_size, importance_weights
from selector.validation import number

Floats = NDArray[np.float64]


def cressie_read(
    rewards: ArrayLike,
    propensities: ArrayLike,
    targets: ArrayLike,
    *,
    smallest_weight: float = 0.0,
    largest_weight: float = math.inf,
    low: float = 0.0,
    high: float = 1.0,
    alpha: float = 0.05,
) -> Estimate:
    """Value of the target with a 1 - ``alpha`` interval; arrays as in `estimators.py`, rewards in [low, high].

    ``smallest_weight`` and ``largest_weight`` bound every weight that could have been drawn, not only those that were:
    the tighter they are known, the tighter the interval. Raises InvalidInput naming the argument.

    >>> found = cressie_read([1.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5], [1.0, 0.0, 1.0, 0.0])
    >>> round(found.mean, 3), round(found.low, 3), found.high
    (1.0, 0.0, 1.0)
    """
    weights = importance_weights(propensities, targets)
    values = bounded_rewards(rewards, weights.size, low, high)
    number("smallest_weight", smallest_weight, 0, 1)
    if math.isnan(largest_weight) or largest_weight < 1:
        raise InvalidInput("largest_weight", "must be at least 1")
    number("alpha", alpha, 1e-9, 1 - 1e-9)
    log = _Log(weights, values, min(smallest_weight, float(weights.min())), max(largest_weight, float(weights.max())))
    mean = min(max(log.estimate(), low), high)
    lowest, highest = log.bound(alpha, low, 1.0, low, high), log.bound(alpha, high, -1.0, low, high)
    size = effective_sample_size(log.weights)
    return Estimate(mean, min(lowest, mean), max(highest, mean), FIXED_N, size)


@dataclass(frozen=True, slots=True)
class _Log:
    """Weights and rewards of shape (n,), and the bounds of every weight that could have been drawn."""

    weights: Floats
    rewards: Floats
    smallest: float
    largest: float

    @property
    def unseen(self) -> float:
        """The weight that the log lacks: a large one if its weights average below 1, else a small one."""
        return self.largest if float(self.weights.sum()) < self.weights.size else self.smallest

    def estimate(self) -> float:
        """Sum of share x weight x reward; what the shares leave of the total is worth the mean reward."""
        shares = self._nearest_shares()
        value = float(shares @ (self.weights * self.rewards))
        missing = max(0.0, 1.0 - float(shares @ self.weights))
        return value + missing * float(self.rewards.mean())

    def _nearest_shares(self) -> Floats:
        """Shares of the logged decisions, nearest to equal ones among those under which weights average 1."""
        count = self.weights.size
        if math.isinf(self.unseen):
            return np.full(count, 1.0 / count)
        mean, variance = self._moments(self.unseen)
        slope = (1.0 - mean) / variance if variance > 0 else 0.0
        return (1.0 + slope * (self.weights - mean)) / (count + 1)

    def _moments(self, unseen: float) -> tuple[float, float]:
        """Mean and variance of the weights with the unseen one among them."""
        every = np.append(self.weights, unseen)
        return float(every.mean()), float(every.var())

    def _distance(self, unseen: float) -> float:
        """Mean square by which the nearest shares differ from equal ones, in units of an equal share."""
        if math.isinf(unseen):
            return 1.0 / self.weights.size
        mean, variance = self._moments(unseen)
        return (1.0 - mean) ** 2 / variance if variance > 0 else math.inf

    def bound(self, alpha: float, reward: float, sign: float, low: float, high: float) -> float:
        """The least (sign 1) or largest (sign -1) value that shares within the distance give, the unseen decision
        having this reward."""
        count = self.weights.size
        if count < 2:
            return reward
        allowed = self._distance(self.unseen) + t_quantile(1.0 - alpha / 2.0, count) ** 2 / (count + 1)
        found = [self._extreme(each, reward, sign, allowed) for each in (self.smallest, self.largest)]
        values = [value for value in found if value is not None]
        if not values:
            return reward
        return min(max(min(values) * sign, low), high)

    def _extreme(self, unseen: float, reward: float, sign: float, allowed: float) -> float | None:
        """The least value of sign x the estimate over these shares; None if there are none."""
        spare = allowed - self._distance(unseen)
        if spare < 0:
            return None
        count = self.weights.size
        if math.isinf(unseen):
            # The unseen decision takes no share but all weight that is missing, so only w (r - reward) counts.
            gains = sign * self.weights * (self.rewards - reward)
            return sign * reward + float(gains.mean()) - math.sqrt(spare * float(gains.var()) * count / (count + 1))
        weights = np.append(self.weights, unseen)
        values = sign * weights * np.append(self.rewards, reward)
        mean, variance = float(weights.mean()), float(weights.var())
        covariance = float(((weights - mean) * (values - values.mean())).mean())
        residual = max(float(values.var()) - covariance**2 / variance, 0.0)
        centre = float(values.mean()) + (1.0 - mean) * covariance / variance
        return centre - math.sqrt(spare * residual)
