"""Effects of a fleet, of its classes and of their devices, learnt jointly from noisy sums of them.

What a scope's effects are depends on those above it, a class's on the fleet's and a device's on the sum of the fleet's
and its class's: they are ``mean + loadings @ above + error``, the errors with a full ``covariance``. In this form one
device's leases change its own numbers and those of its class and fleet, never another device's; but for what time makes
forget, predictions are those of one Kalman filter over all effects of the whole fleet, without its matrix (for the
conditional form see Bishop, *Pattern Recognition and Machine Learning*, 2.3.3).
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from selector.effects import CONDITIONS, DRIFT_VARIANCE, QUANTITIES, EffectTable, kind_of, prior_variance
from selector.errors import InvalidInput
from selector.validation import whole

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]

# No effect becomes larger, in mean or variance, and no loading.
LARGEST_EFFECT, LARGEST_LOADING = 10.0, 100.0
# What is said of an action stays within this: its exponential is a number.
LARGEST_SUM = 100.0
# Of fleet, class and device. Who learns of one more forgets what it has not heard of for longest.
MOST_EFFECTS = (160, 160, 48)
# What rounding to single precision may take from the least variance of a sum.
_ROUNDING = 1e-5
# The place of what is not there, as often as asked: the last, which counts for nothing.
_NOWHERE = repeat(-1)


class Level:
    """What is known of one scope's effects of all quantities, given those of the scopes above; ``depth`` is its place
    in ``SCOPES``.

    ``numbers`` (quantities, 2 effects + 1, effects) holds covariance, transposed loadings and mean above one another,
    so that one product with weights gives all that a sum needs. Single precision, as it is stored: learning goes on
    from rows as if they had never been written.
    """

    __slots__ = ("depth", "numbers", "place", "used")

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.place: dict[str, int] = {}
        self.used: list[int] = []
        self.numbers: Singles = np.zeros((len(QUANTITIES), 1, 0), np.float32)

    @property
    def covariance(self) -> Singles:
        """A view, shape (quantities, effects, effects)."""
        return self.numbers[:, : len(self.place)]

    @property
    def loadings(self) -> Singles:
        """A view, shape (quantities, effects above, effects)."""
        return self.numbers[:, len(self.place) : -1]

    @property
    def mean(self) -> Singles:
        """A view, shape (quantities, effects)."""
        return self.numbers[:, -1]

    def hear_of(self, names: Collection[str], clock: int, above: Sequence[Level]) -> None:
        """These effects are learnt now; a new one starts from what is known of such effects beforehand. ``above`` are
        the levels above, from the fleet down."""
        new = [name for name in names if name not in self.place]
        if new:
            self._make_room(len(new), names, above)
            old = len(self.place)
            self.numbers = _resized(self.numbers, range(old), old + len(new))
            self.place.update((name, old + index) for index, name in enumerate(new))
            self.used += [clock] * len(new)
            ends = range(old, old + len(new))
            for place, quantity in enumerate(QUANTITIES):
                self.covariance[place, ends, ends] = [prior_variance(quantity, name)[self.depth] for name in new]
        for name in names:
            self.used[self.place[name]] = clock

    def _make_room(self, count: int, names: Collection[str], above: Sequence[Level]) -> None:
        """Forget what was not heard of for longest. What is expected of the others stays: they no longer depend on what
        those above know of the forgotten, but are what follows from it now."""
        excess = len(self.place) + count - MOST_EFFECTS[self.depth]
        if excess <= 0:
            return
        others = sorted(set(self.place) - set(names), key=lambda name: (self.used[self.place[name]], name))
        gone = set(others[:excess])
        for quantity in range(len(QUANTITIES) if above else 0):
            for name in gone:
                known = sum(share.mean for share in shares(above, quantity, {name: 1.0}))
                mean = self.mean[quantity] + known * self.loadings[quantity, self.place[name]]
                self.mean[quantity] = np.clip(mean, -LARGEST_EFFECT, LARGEST_EFFECT)
        kept = {name: place for name, place in self.place.items() if name not in gone}
        self.numbers = _resized(self.numbers, kept.values(), len(kept))
        self.used = [self.used[place] for place in kept.values()]
        self.place = {name: place for place, name in enumerate(kept)}

    def wander(self, quantity: int, names: Collection[str]) -> None:
        """Effects change from one of their leases to the next. Who would become less sure than at the start returns to
        what is known beforehand instead, so that nothing is remembered for ever."""
        places = [self.place[name] for name in names]
        covariance = self.covariance[quantity]
        before = covariance[places, places].astype(np.float64)
        most = np.maximum(before, [prior_variance(QUANTITIES[quantity], name)[self.depth] for name in names])
        after = before + [DRIFT_VARIANCE[kind_of(name)][self.depth] for name in names]
        covariance[places, places] = after
        kept = np.ones(len(self.place))
        kept[places] = np.sqrt(np.minimum(most / after, 1.0))
        covariance *= np.outer(kept, kept)
        self.loadings[quantity] *= kept
        self.mean[quantity] *= kept

    def widen(self, quantity: int, name: str, variance: float) -> None:
        """This effect may have changed by as much."""
        place = self.place[name]
        grown = float(self.covariance[quantity, place, place]) + variance
        self.covariance[quantity, place, place] = min(grown, LARGEST_EFFECT)

    def as_row(self) -> dict[str, Any]:
        """JSON-able; exact."""
        count = len(self.place)
        row = {
            "names": list(self.place),
            "used": list(self.used),
            "mean": _packed(self.mean),
            "covariance": _packed(self.covariance[:, *np.triu_indices(count)]),
        }
        return row | {"loadings": _packed(self.loadings)} if self.depth else row

    @classmethod
    def from_row(cls, field: str, depth: int, row: object) -> Self:
        """Raises InvalidInput naming what ``as_row`` does not write."""
        if not isinstance(row, Mapping):
            raise InvalidInput(field, "must be a mapping")
        level, quantities = cls(depth), len(QUANTITIES)
        names, used = row.get("names"), row.get("used")
        if not isinstance(names, list) or len(names) > MOST_EFFECTS[depth]:
            raise InvalidInput(f"{field}.names", f"must be a list of at most {MOST_EFFECTS[depth]}")
        for name in names:
            if not isinstance(name, str) or kind_of(name) not in DRIFT_VARIANCE:
                raise InvalidInput(f"{field}.names", f"must name effects, has {str(name)[:80]!r}")
        count = len(names)
        level.place = {sys.intern(name): place for place, name in enumerate(names)}  # many devices share them
        if len(level.place) != count or not isinstance(used, list) or len(used) != count:
            raise InvalidInput(f"{field}.used", "must say once for each name when it was learnt")
        level.used = [whole(f"{field}.used", each, 0, 2**53) for each in used]
        level.numbers = np.zeros((quantities, 2 * count + 1, count), np.float32)
        level.mean[:] = _unpacked(f"{field}.mean", row.get("mean"), (quantities, count), LARGEST_EFFECT)
        triangle, (above, below) = count * (count + 1) // 2, np.triu_indices(count)
        packed = _unpacked(f"{field}.covariance", row.get("covariance"), (quantities, triangle), LARGEST_EFFECT)
        level.covariance[:, above, below] = level.covariance[:, below, above] = packed
        try:
            np.linalg.cholesky(level.covariance + _ROUNDING * np.eye(count))
        except np.linalg.LinAlgError as error:
            raise InvalidInput(f"{field}.covariance", "must be a covariance") from error
        if depth:
            shape = (quantities, count, count)
            level.loadings[:] = _unpacked(f"{field}.loadings", row.get("loadings"), shape, LARGEST_LOADING)
        return level


@dataclass(frozen=True, slots=True)
class Share:
    """What one scope has to do with a sum: the weights that the scopes above have in it because of this one, how errors
    of its effects go with the sum, and the part of the sum's mean and variance that is its own."""

    level: Level
    above: Floats
    direction: Floats
    mean: float
    variance: float


def shares(levels: Sequence[Level], quantity: int, weights: Mapping[str, float]) -> list[Share]:
    """Of a weighted sum of effects, from the device up. What a scope has not heard of adds nothing to it there."""
    found: list[Share] = []
    here = dict(weights)
    for level in reversed(levels):
        own = np.zeros(len(level.place))
        for name, weight in here.items():
            if name in level.place:
                own[level.place[name]] = weight
        direction = (level.covariance[quantity] * own).sum(axis=1)
        above = own + (level.loadings[quantity] * own).sum(axis=1)
        mean, variance = float(own @ level.mean[quantity]), max(float(own @ direction), 0.0)
        found.append(Share(level, above, direction, mean, variance))
        here |= zip(level.place, above.tolist(), strict=True)
    return found


def learn(quantity: int, found: Sequence[Share], came: float, noise: float) -> None:
    """The sum was measured with this variance of noise. For those above, what a scope adds to it is noise as well."""
    left, total = came, noise
    for share in found:
        left, total = left - share.mean, total + share.variance
        gain, level = share.direction / total, share.level
        mean = level.mean[quantity] + gain * left
        level.mean[quantity] = np.clip(mean, -LARGEST_EFFECT, LARGEST_EFFECT)
        level.covariance[quantity] -= np.outer(share.direction, share.direction) / total  # symmetric to the bit
        if level.depth:
            loadings = level.loadings[quantity] - np.outer(share.above, gain)
            level.loadings[quantity] = np.clip(loadings, -LARGEST_LOADING, LARGEST_LOADING)


def sums(levels: Sequence[Level], table: EffectTable, conditions: Sequence[float]) -> tuple[Floats, Floats]:
    """Means and variances of the sums that the actions of a table are, shape (quantities, actions), under conditions in
    the order of ``CONDITIONS``. As ``shares`` does it, for all at once; what a scope has not heard of is as unsure
    there as beforehand."""
    quantities, actions = len(QUANTITIES), table.design.shape[1]
    mean, variance = np.zeros((2, quantities, actions), np.float32)
    unheard = np.ones(table.prior.shape[::2], np.float32)
    below: tuple[Collection[str], Singles] | None = None
    for level in reversed(levels):
        place, count = level.place, len(level.place)
        at = [*map(table.place.get, place, _NOWHERE), -1]
        unheard[level.depth, at] = 0.0
        weights = table.design[at]
        for name, value in zip(CONDITIONS, conditions, strict=True):
            weights[place.get(name, -1)] = value
        passed: list[str] = []
        if below is not None:
            plain, weights = weights, np.empty((quantities, count + 1, actions), np.float32)
            weights[:] = plain
            weights[:, [*map(place.get, below[0], _NOWHERE)]] = below[1]
            passed = [name for name in below[0] if name not in place]
        weights = weights[..., :-1, :]
        product = level.numbers @ weights
        variance += np.einsum("...na,...na->...a", product[:, :count], weights)
        mean += product[:, -1]
        above = product[:, count:-1] + weights
        if passed and below is not None:
            above = np.concatenate((above, below[1][:, [name not in place for name in below[0]]]), axis=1)
        below = [*place, *passed], above
    rest = np.einsum("lqn,ln->qn", table.prior, unheard)
    variance += rest @ table.design + (rest[:, table.conditions] @ np.square(conditions))[:, None]
    return (
        np.minimum(np.maximum(mean, -LARGEST_SUM), LARGEST_SUM).astype(np.float64),
        np.minimum(np.maximum(variance, 0.0), LARGEST_SUM).astype(np.float64),
    )


def _resized(numbers: Singles, kept: Iterable[int], count: int) -> Singles:
    """The numbers of these effects, with room for so many; those of others are 0."""
    old, places = numbers.shape[2], list(kept)
    room = np.zeros((len(numbers), 2 * count + 1, count), np.float32)
    rows = [*places, *(old + place for place in places), 2 * old]
    new = [*range(len(places)), *range(count, count + len(places)), 2 * count]
    room[:, new, : len(places)] = numbers[:, rows][:, :, places]
    return room


def _packed(array: Singles) -> str:
    return base64.b64encode(array.astype("<f4").tobytes()).decode()


def _unpacked(field: str, text: object, shape: tuple[int, ...], most: float) -> Singles:
    try:
        if not isinstance(text, str):
            raise ValueError("is no text")
        content = base64.b64decode(text, validate=True)
        array = np.frombuffer(content, dtype="<f4").astype(np.float32).reshape(shape)
    except ValueError as error:
        raise InvalidInput(field, f"must be {shape} numbers of four bytes in base64") from error
    if not (np.abs(array) <= most).all():
        raise InvalidInput(field, f"must be numbers within {most:g}")
    return array
