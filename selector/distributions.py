"""The few distribution functions that intervals need, without scipy: accurate to about 1e-10, one number at a time.

Continued fractions by the modified Lentz method (Press et al., *Numerical Recipes*, 3rd ed., ch. 5.2, 6.2, 6.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

from selector.errors import InvalidInput
from selector.validation import number

_TINY = 1e-300
_MOST_TERMS = 100_000


def beta_cdf(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function I_x(a, b) for a, b > 0.

    >>> round(beta_cdf(0.25, 2.0, 1.0), 12)
    0.0625
    """
    if x <= 0:
        return 0.0
    if x >= 1:
        return 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - beta_cdf(1.0 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)

    def term(index: int) -> tuple[float, float]:
        m = index // 2
        if index % 2 == 0:
            return m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)), 1.0
        return -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)), 1.0

    return math.exp(log_front) / (a * _continued_fraction(1.0, term))


@lru_cache(maxsize=4096)
def t_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t.

    >>> [round(t_quantile(0.975, n), 4) for n in (1, 2, 10, 1000)]
    [12.7062, 4.3027, 2.2281, 1.9623]
    """
    number("probability", probability, 1e-12, 1 - 1e-12)
    # Beyond ten million it differs from the normal quantile by less than the logarithms below lose.
    freedom = min(number("freedom", freedom, 1, 1e15), 1e7)
    if probability < 0.5:
        return -t_quantile(1.0 - probability, freedom)
    wanted = 2.0 * (1.0 - probability)
    # Two-sided tail mass as a function of x = freedom / (freedom + t^2), which falls from 1 to 0 as t grows.
    x = _root(lambda x: beta_cdf(x, freedom / 2.0, 0.5) - wanted, 0.0, 1.0)
    if x > 0.5:
        # Near 1 the difference from 1 carries the digits: solve for it instead.
        rest = _root(lambda y: 1.0 - wanted - beta_cdf(y, 0.5, freedom / 2.0), 0.0, 1.0)
        return math.sqrt(freedom * rest / (1.0 - rest))
    return math.sqrt(freedom * (1.0 - x) / x)


def log_lower_gamma(a: float, x: float) -> float:
    """Logarithm of the lower incomplete gamma function, the integral of t^(a-1) e^-t from 0 to x, for a, x > 0.

    >>> round(log_lower_gamma(1.0, 2.0), 12) == round(math.log(1 - math.exp(-2.0)), 12)
    True
    """
    if a <= 0 or x <= 0:
        raise InvalidInput("a", "and x must be positive")
    log_front = a * math.log(x) - x
    if x < a + 1:
        total = part = 1.0 / a
        for index in range(1, _MOST_TERMS):
            part *= x / (a + index)
            total += part
            if part < total * 1e-16:
                break
        return log_front + math.log(total)

    def term(index: int) -> tuple[float, float]:
        return -index * (index - a), x - a + 2 * index + 1

    upper = math.exp(log_front - math.lgamma(a)) / _continued_fraction(x - a + 1.0, term)
    return math.lgamma(a) + math.log1p(-upper)


def _continued_fraction(start: float, term: Callable[[int], tuple[float, float]]) -> float:
    """start + a1 / (b1 + a2 / (b2 + ...)) with (a, b) = term(index) for index 1, 2, ..."""
    value = start or _TINY
    numerator, denominator = value, 0.0
    for index in range(1, _MOST_TERMS):
        a, b = term(index)
        denominator = 1.0 / (b + a * denominator or _TINY)
        numerator = b + a / numerator or _TINY
        value *= numerator * denominator
        if abs(numerator * denominator - 1.0) < 1e-15:
            break
    return value


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where an increasing or decreasing function is 0 between low and high, by bisection to the last bits."""
    rising = function(low) < 0
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        if (function(middle) < 0) == rising:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)
