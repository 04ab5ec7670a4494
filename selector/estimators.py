"""Off-policy values with intervals, from arrays. Knows no interaction and no policy. Empirical likelihood is in
`empirical_likelihood.py`, confidence sequences for unbounded terms in `sequences.py`.

Arrays have shape (decisions,) and are finite: ``rewards``, in [0, 1] where bounds are not given (IPS, SNIPS and DR need
none); ``propensities``, the logged probability of the logged action; ``targets``, the probability of the logged action
under the policy to be valued; ``model``, a prediction of the logged action's reward; ``model_target``, its expectation
under the target. Sources: Dudik, Langford & Li, "Doubly robust policy evaluation and learning" (ICML 2011); Swaminathan
& Joachims (NeurIPS 2015) for SNIPS; Kong (1992) for the effective sample size; Waudby-Smith & Ramdas, "Estimating means
of bounded random variables by betting" (JRSS B 2024), theorem 2, for the confidence sequence; Chernozhukov et al.,
"Double/debiased machine learning" (2018) for cross-fitting; Cameron & Miller (2015) for clustered errors; Cochran
(1977) for stratified ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from selector.distributions import t_quantile
from selector.errors import InvalidInput
from selector.validation import number

Floats = NDArray[np.float64]

FIXED_N, ANYTIME = "fixed_n", "anytime"


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
    each = vector("weights", weights)
    if (each < 0).any():
        raise InvalidInput("weights", "must not be negative")
    squares = float(np.sum(each * each))
    return float(np.sum(each)) ** 2 / squares if squares > 0 else 0.0


def importance_weights(propensities: ArrayLike, targets: ArrayLike) -> Floats:
    """target / propensity, checked: propensities in (0, 1], targets in [0, 1]."""
    logged = vector("propensities", propensities)
    wanted = beside("targets", targets, logged.size)
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
    weights = importance_weights(propensities, targets)
    return weights * beside("rewards", rewards, weights.size)


def snips(rewards: ArrayLike, propensities: ArrayLike, targets: ArrayLike) -> float:
    """Self-normalised estimate; NaN-free: 0 if no decision supports the target.

    >>> snips([1.0, 0.5], [0.5, 0.25], [1.0, 0.5])
    0.75
    """
    weights = importance_weights(propensities, targets)
    values = beside("rewards", rewards, weights.size)
    total = float(weights.sum())
    return float((weights * values).sum()) / total if total > 0 else 0.0


def dr_terms(
    rewards: ArrayLike, propensities: ArrayLike, targets: ArrayLike, *, model: ArrayLike, model_target: ArrayLike
) -> Floats:
    """Per-decision doubly robust terms: unbiased whatever the model, if propensities are right.

    >>> dr_terms([1.0], [0.5], [1.0], model=[0.75], model_target=[0.75]).tolist()
    [1.25]
    """
    weights = importance_weights(propensities, targets)
    count = weights.size
    residual = beside("rewards", rewards, count) - beside("model", model, count)
    return beside("model_target", model_target, count) + weights * residual


def dr_cross_fitted(
    rewards: ArrayLike,
    propensities: ArrayLike,
    targets: ArrayLike,
    *,
    features: ArrayLike,
    target_features: ArrayLike,
    clusters: Sequence[str] | None = None,
    folds: int = 5,
    ridge: float = 1.0,
) -> Floats:
    """Doubly robust terms whose model never saw the decisions that it corrects.

    The model is a ridge regression of the reward on ``features`` (decisions, d) of the logged action, fitted on all
    other folds; ``target_features`` (decisions, d) are the features expected under the target, so that a linear model
    values the target too. Decisions of one cluster share a fold. Raises InvalidInput naming the argument.

    >>> ones = np.ones((4, 1))
    >>> terms = dr_cross_fitted([0.5] * 4, [0.5] * 4, [0.5] * 4, features=ones, target_features=ones, folds=2)
    >>> terms.round(9).tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    values = vector("rewards", rewards)
    logged, wanted = (
        _matrix("features", features, values.size),
        _matrix("target_features", target_features, values.size),
    )
    if logged.shape != wanted.shape:
        raise InvalidInput("target_features", f"has {wanted.shape[1]} columns for {logged.shape[1]} features")
    names = np.arange(values.size) if clusters is None else _groups("clusters", clusters, values.size)
    if isinstance(folds, bool) or not isinstance(folds, int) or not 2 <= folds <= names.max() + 1:
        raise InvalidInput("folds", f"must be an integer between 2 and the number of clusters, {names.max() + 1}")
    model, model_target = np.empty(values.size), np.empty(values.size)
    for fold in range(folds):
        held = names % folds == fold
        centre, weights = _ridge(logged[~held], values[~held], number("ridge", ridge, 1e-12, 1e12))
        model[held], model_target[held] = centre + logged[held] @ weights, centre + wanted[held] @ weights
    return dr_terms(values, propensities, targets, model=model, model_target=model_target)


def _ridge(rows: Floats, values: Floats, ridge: float) -> tuple[float, Floats]:
    centre = float(values.mean())
    gram = rows.T @ rows + ridge * np.eye(rows.shape[1])
    return centre, np.asarray(np.linalg.solve(gram, rows.T @ (values - centre)), dtype=np.float64)


def fixed_n(terms: ArrayLike, clusters: Sequence[str] | None = None, effective: float | None = None) -> Estimate:
    """Mean of the terms with a 95 % t-interval; errors are clustered (by device) if clusters are given.

    Clustered, the interval is about the population that the devices were drawn from; it is infinite with fewer than
    two clusters. Valid if looked at once.
    """
    values = vector("terms", terms)
    mean = float(values.mean())
    groups = np.arange(values.size) if clusters is None else _groups("clusters", clusters, values.size)
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
    values = vector("terms", terms)
    mean = float(values.mean())
    groups = _groups("strata", strata, values.size)
    sizes = np.bincount(groups)
    centres = np.where(sizes > 1, np.bincount(groups, weights=values) / sizes, mean)
    squares = np.bincount(groups, weights=(values - centres[groups]) ** 2)
    freedom = int(values.size - np.count_nonzero(sizes > 1))
    corrected = squares * sizes / np.maximum(sizes - 1, 1)
    variance = math.inf if freedom < 1 or values.size < 2 else float(corrected.sum()) / values.size**2
    return _t_interval(mean, variance, freedom, float(values.size) if effective is None else effective)


def _t_interval(mean: float, variance: float, freedom: int, effective: float) -> Estimate:
    half = math.inf if math.isinf(variance) else t_quantile(0.975, freedom) * math.sqrt(variance)
    return Estimate(mean, mean - half, mean + half, FIXED_N, effective)


def confidence_sequence(
    terms: ArrayLike, low: float = 0.0, high: float = 1.0, alpha: float = 0.05, effective: float | None = None
) -> Estimate:
    """Mean of the terms, which lie in [low, high], with an interval that holds at every time at once.

    Predictable plug-in empirical Bernstein. Terms in log order; they may depend on the past (adaptive
    logging), as long as each has the same conditional mean. Raises InvalidInput for a term outside the
    bounds.
    """
    values = vector("terms", terms)
    number("alpha", alpha, 1e-9, 1 - 1e-9)
    _check_bounds(low, high)
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


def vector(field: str, values: ArrayLike) -> Floats:
    """The values as finite float64 of shape (n,), n > 0; InvalidInput naming the field otherwise."""
    try:
        vector = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInput(field, "must be numbers") from error
    if vector.ndim != 1 or vector.size == 0:
        raise InvalidInput(field, "must be a non-empty vector")
    if not np.isfinite(vector).all():
        raise InvalidInput(field, "must be finite")
    return vector


def beside(field: str, values: ArrayLike, count: int) -> Floats:
    """The values as finite float64 of shape (count,), one for each logged decision; InvalidInput naming the field."""
    found = vector(field, values)
    if found.size != count:
        raise InvalidInput(field, f"has {found.size} entries for {count} decisions")
    return found


def bounded_rewards(rewards: ArrayLike, count: int, low: float, high: float) -> Floats:
    """The rewards as finite float64 of shape (count,), all in [low, high]; InvalidInput naming the field otherwise."""
    values = beside("rewards", rewards, count)
    _check_bounds(low, high)
    if values.min() < low - 1e-9 or values.max() > high + 1e-9:
        raise InvalidInput("rewards", f"must be between {low:g} and {high:g}")
    return values


def _check_bounds(low: float, high: float) -> None:
    if number("low", low) >= number("high", high):
        raise InvalidInput("high", "must be above low")


def _groups(field: str, names: Sequence[str], count: int) -> NDArray[np.intp]:
    """Which group each decision belongs to, shape (count,), numbered from 0."""
    try:
        groups = np.unique(np.asarray(names), return_inverse=True)[1]
    except (TypeError, ValueError) as error:
        raise InvalidInput(field, "must be names of one kind") from error
    if groups.shape != (count,):
        raise InvalidInput(field, f"has the shape {groups.shape} for {count} decisions")
    return groups


def _matrix(field: str, values: ArrayLike, rows: int) -> Floats:
    try:
        matrix = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInput(field, "must be numbers in rows of one length") from error
    if matrix.ndim != 2 or matrix.shape[0] != rows or matrix.shape[1] == 0:
        raise InvalidInput(field, f"must have the shape ({rows}, columns), has {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise InvalidInput(field, "must be finite")
    return matrix
