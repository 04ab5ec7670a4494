"""Off-policy values with intervals, from arrays. Knows no interaction and no policy.

Arrays have shape (decisions,): ``rewards`` in [0, 1]; ``propensities``, the logged probability of the logged
action; ``targets``, the probability of the logged action under the policy to be valued; ``model``, a
prediction of the logged action's reward; ``model_target``, its expectation under the target. Sources: Dudik,
Langford & Li, "Doubly robust policy evaluation and learning" (ICML 2011); Swaminathan & Joachims (NeurIPS
2015) for SNIPS; Kong (1992) for the effective sample size; Waudby-Smith & Ramdas, "Estimating means of
bounded random variables by betting" (JRSS B 2024), theorem 2, for the confidence sequence; Cameron & Miller
(2015) for clustered errors; Cochran (1977) for stratified ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from selector.errors import InvalidInput

Floats = NDArray[np.float64]

FIXED_N, ANYTIME = "fixed_n", "anytime"
_Z_975 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with a 95 % interval. ``kind``: ``fixed_n`` holds once at the end, ``anytime`` also under
    peeking."""

    mean: float
    low: float
    high: float
    kind: str
    effective_sample_size: float


def effective_sample_size(weights: ArrayLike) -> float:
    """Kong's: how many equally weighted decisions are worth as much.

    >>> effective_sample_size([1.0, 1.0, 0.0, 0.0])
    2.0
    """
    each = np.asarray(weights, dtype=np.float64)
    squares = float(np.sum(each * each))
    return float(np.sum(each)) ** 2 / squares if squares > 0 else 0.0


def importance_weights(propensities: ArrayLike, targets: ArrayLike) -> Floats:
    """target / propensity, checked: propensities in (0, 1], targets in [0, 1]."""
    logged, wanted = _vector("propensities", propensities), _vector("targets", targets)
    if logged.shape != wanted.shape:
        raise InvalidInput("targets", f"has {wanted.size} entries for {logged.size} propensities")
    if (logged <= 0).any() or (logged > 1 + 1e-9).any():
        raise InvalidInput("propensities", "must be in (0, 1]")
    if (wanted < 0).any() or (wanted > 1 + 1e-9).any():
        raise InvalidInput("targets", "must be in [0, 1]")
    return wanted / logged


def ips_terms(rewards: ArrayLike, propensities: ArrayLike, targets: ArrayLike) -> Floats:
    """Per-decision terms whose mean is the inverse-propensity estimate.

    >>> float(ips_terms([1.0, 0.5], [0.5, 0.25], [1.0, 0.0]).mean())
    1.0
    """
    return importance_weights(propensities, targets) * _vector("rewards", rewards)


def snips(rewards: ArrayLike, propensities: ArrayLike, targets: ArrayLike) -> float:
    """Self-normalised estimate; NaN-free: 0 if no decision supports the target.

    >>> snips([1.0, 0.5], [0.5, 0.25], [1.0, 0.5])
    0.75
    """
    weights = importance_weights(propensities, targets)
    total = float(weights.sum())
    return float((weights * _vector("rewards", rewards)).sum()) / total if total > 0 else 0.0


def dr_terms(
    rewards: ArrayLike, propensities: ArrayLike, targets: ArrayLike, *, model: ArrayLike, model_target: ArrayLike
) -> Floats:
    """Per-decision doubly robust terms: unbiased whatever the model, if propensities are right.

    >>> dr_terms([1.0], [0.5], [1.0], model=[0.75], model_target=[0.75]).tolist()
    [1.25]
    """
    weights = importance_weights(propensities, targets)
    return _vector("model_target", model_target) + weights * (_vector("rewards", rewards) - _vector("model", model))


def fixed_n(terms: ArrayLike, clusters: Sequence[str] | None = None, effective: float | None = None) -> Estimate:
    """Mean of the terms with a 95 % t-interval; errors are clustered (by device) if clusters are given.

    Clustered, the interval is about the population that the devices were drawn from; it is infinite with fewer than
    two clusters. Valid if looked at once.
    """
    values = _vector("terms", terms)
    mean = float(values.mean())
    groups = np.arange(values.size) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    count = int(groups.max()) + 1
    sums = np.bincount(groups, weights=values - mean)
    variance = math.inf if count < 2 else float(np.sum(sums**2)) * count / (count - 1) / values.size**2
    return _t_interval(mean, variance, count - 1, float(values.size) if effective is None else effective)


def fixed_n_within(terms: ArrayLike, strata: Sequence[str], effective: float | None = None) -> Estimate:
    """Mean of the terms with a 95 % t-interval about these very devices: errors vary within a device only.

    Given the past, a doubly robust term errs independently of the terms before it, so decisions of one device need no
    clustering when the question is about the devices at hand (stratified mean; Cochran, Sampling Techniques, ch. 5).
    A device with one decision is compared with the mean of all. Valid if looked at once.

    >>> found = fixed_n_within([0.1, 0.1, 0.9, 0.9], ["a", "a", "b", "b"])
    >>> found.mean, found.low == found.high
    (0.5, True)
    """
    values = _vector("terms", terms)
    mean = float(values.mean())
    groups = np.unique(np.asarray(strata), return_inverse=True)[1]
    sizes = np.bincount(groups)
    centres = np.where(sizes > 1, np.bincount(groups, weights=values) / sizes, mean)
    squares = np.bincount(groups, weights=(values - centres[groups]) ** 2)
    freedom = int(values.size - np.count_nonzero(sizes > 1))
    corrected = squares * sizes / np.maximum(sizes - 1, 1)
    variance = math.inf if freedom < 1 or values.size < 2 else float(corrected.sum()) / values.size**2
    return _t_interval(mean, variance, freedom, float(values.size) if effective is None else effective)


def _t_interval(mean: float, variance: float, freedom: int, effective: float) -> Estimate:
    half = math.inf if math.isinf(variance) else t_quantile_975(freedom) * math.sqrt(variance)
    return Estimate(mean, mean - half, mean + half, FIXED_N, effective)


def confidence_sequence(
    terms: ArrayLike, low: float = 0.0, high: float = 1.0, alpha: float = 0.05, effective: float | None = None
) -> Estimate:
    """Mean of the terms, which lie in [low, high], with an interval that holds at every time at once.

    Predictable plug-in empirical Bernstein. Terms in log order; they may depend on the past (adaptive
    logging), as long as each has the same conditional mean. Raises InvalidInput for a term outside the
    bounds.
    """
    values = _vector("terms", terms)
    if not low < high:
        raise InvalidInput("high", "must be above low")
    if values.min() < low - 1e-9 or values.max() > high + 1e-9:
        raise InvalidInput("terms", f"must be between {low:g} and {high:g}")
    x = np.clip((values - low) / (high - low), 0.0, 1.0)
    t = np.arange(1, x.size + 1)
    means = (0.5 + np.cumsum(x)) / (t + 1)
    variances = (0.25 + np.cumsum((x - means) ** 2)) / (t + 1)
    before = np.concatenate(([0.25], variances[:-1]))
    guess = np.concatenate(([0.5], means[:-1]))
    log_term = math.log(2.0 / alpha)
    bets = np.minimum(np.sqrt(2.0 * log_term / (before * t * np.log1p(t))), 0.5)
    cost = 4.0 * (x - guess) ** 2 * (-np.log1p(-bets) - bets) / 4.0
    total = np.cumsum(bets)
    centre = np.cumsum(bets * x) / total
    half = (log_term + np.cumsum(cost)) / total
    lower = float(np.clip(np.max(centre - half), 0.0, 1.0))
    upper = float(np.clip(np.min(centre + half), 0.0, 1.0))
    mean = float(values.mean())
    scale = high - low
    bounds = (low + scale * min(lower, upper), low + scale * max(lower, upper))
    size = float(values.size) if effective is None else effective
    return Estimate(mean, min(bounds[0], mean), max(bounds[1], mean), ANYTIME, size)


def paired_lift(
    rewards: ArrayLike,
    propensities: ArrayLike,
    targets: ArrayLike,
    *,
    model: ArrayLike,
    model_target: ArrayLike,
    clusters: Sequence[str] | None = None,
) -> Estimate:
    """How much better the logged decisions were than the target on the same decisions: mean of reward - DR
    term."""
    value = dr_terms(rewards, propensities, targets, model=model, model_target=model_target)
    terms = _vector("rewards", rewards) - value
    return fixed_n(terms, clusters, effective_sample_size(importance_weights(propensities, targets)))


def t_quantile_975(freedom: int) -> float:
    """97.5 % quantile of Student's t: exact for 1 and 2, else Cornish-Fisher (Abramowitz & Stegun 26.7.5).

    >>> [round(t_quantile_975(n), 2) for n in (1, 2, 3, 10, 1000)]
    [12.71, 4.3, 3.18, 2.23, 1.96]
    """
    small = {1: 12.706204736, 2: 4.30265273, 3: 3.182446305, 4: 2.776445105}
    if freedom in small:
        return small[freedom]
    z, n = _Z_975, float(freedom)
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / n + g2 / n**2 + g3 / n**3


def _vector(field: str, values: ArrayLike) -> Floats:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or vector.size == 0:
        raise InvalidInput(field, "must be a non-empty vector")
    if not np.isfinite(vector).all():
        raise InvalidInput(field, "must be finite")
    return vector
