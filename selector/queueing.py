"""Waiting in front of a device that serves batches: how long requests stay, from queues that were played. Knows no
device, no variant.

Formulas exist for callers that serve one request each (Pollaczek and Khinchine; Allen and Cunneen) and for the mean of
one caller that serves batches (Inoue, *Queueing analysis of GPU-based inference servers with dynamic batching*,
Performance Evaluation 2021), none for percentiles behind several callers that serve batches. So
`benchmarks/play_queues.py` played such queues request by request, and this module interpolates: over the fixed share of
an execution, the largest batch, the callers and the load.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import ArrayLike, NDArray

from selector.errors import CorruptTable

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

# Above this utilisation the stay grows on along its tangent: still steep, still smooth, never infinite.
STEEP_FROM = 0.95
LONGEST_MS = 1e7
Z_95 = 1.6448536269514722
SMALLEST_SPREAD = 0.05

PLAYED = Path(__file__).with_name("queues.npz")
# What was played: fixed shares b / (a + b), largest batches, callers, and positions between no load and STEEP_FROM.
# Shares are finer near 1, where large batches are almost free.
FIXED_SHARES: Floats = np.asarray(1.0 - np.linspace(1.0, 0.0, 9) ** 2, dtype=np.float64)
BATCHES: Floats = np.exp2(np.arange(8.0))
CALLERS: Floats = np.array((1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0))
POSITIONS: Floats = np.linspace(0.0, 1.0, 24)
# Logarithms are kept as whole numbers of this part.
SCALE = 1000
# Positions are finer in load where waiting begins, and finer in utilisation where it explodes.
_ONSET = 4.0
_LAST_PLACE = len(POSITIONS) - 2


@dataclass(frozen=True, slots=True)
class QueueEstimate:
    """Sojourn times (waiting plus service), arrays of one shape. ``utilisation`` may exceed 1: overload."""

    p50_ms: Floats
    p95_ms: Floats
    utilisation: Floats
    batch: Floats
    service_ms: Floats


class Queues:
    """The played queues of some actions: largest batches and callers, shape (actions,), once for many devices.

    Both are at least 1. What is more than was played waits as the most that was, at the same utilisation. Raises
    CorruptTable if the played queues cannot be read.
    """

    def __init__(self, max_batch: Floats, callers: Floats) -> None:
        self.max_batch, self.callers = max_batch, callers
        logs = _played()
        batch, batch_part = _between(np.interp(np.log(max_batch), np.log(BATCHES), range(len(BATCHES))), len(BATCHES))
        caller, caller_part = _between(np.interp(np.log(callers), np.log(CALLERS), range(len(CALLERS))), len(CALLERS))
        surface = np.zeros((len(max_batch), len(FIXED_SHARES), len(POSITIONS), 3))
        for step, weight in ((0, 1.0 - batch_part), (1, batch_part)):
            for other, share in ((0, 1.0 - caller_part), (1, caller_part)):
                corner = logs[:, batch + step, caller + other]
                surface += np.moveaxis(corner, 1, 0) * (weight * share)[:, None, None, None]
        self._surface = surface.astype(np.float32)

    def curves(self, fixed: Floats) -> NDArray[np.float32]:
        """Logarithms of p50, p95 and batch over POSITIONS for these shares of fixed cost, shape (actions, positions,
        3)."""
        row, part = _between((1.0 - np.sqrt(1.0 - fixed)) * (len(FIXED_SHARES) - 1), len(FIXED_SHARES))
        every, weight = np.arange(len(fixed)), part.astype(np.float32)[:, None, None]
        curves: NDArray[np.float32] = self._surface[every, row] * (1 - weight) + self._surface[every, row + 1] * weight
        return curves


class Waiting:
    """The queues of one device: a batch of n takes ``a n + b`` ms, both of shape (actions,) and together above 0, once
    for many loads."""

    def __init__(self, queues: Queues, a_ms: Floats, b_ms: Floats) -> None:
        largest = queues.max_batch
        fixed = b_ms / (a_ms + b_ms)
        self._a_ms, self._b_ms, self._one_ms = a_ms, b_ms, a_ms + b_ms
        self._largest, self._room = largest, largest - 1.0
        self._per_ms = 1e-3 / queues.callers
        self._full_ms = a_ms + b_ms / largest
        self._onset = _ONSET * self._one_ms / self._full_ms
        self._scale = (len(POSITIONS) - 1) / _farthest(fixed, largest)
        self._flat = queues.curves(fixed).reshape(-1, 3)
        self._first = np.arange(len(fixed)) * len(POSITIONS)

    def at(self, stretch: Floats | float, rate_rps: Floats | float, held_back: Floats | float = 1.0) -> QueueEstimate:
        """Stays where everything takes ``stretch`` times as long; it broadcasts to (actions,) or (speeds, actions).

        ``held_back`` says how many times longer than a service its server is taken: above 1 where a quota must recover.
        """
        rho: Floats = self._full_ms * stretch * (self._per_ms * rate_rps * held_back)
        # As `load_at`, the other way round.
        at_most = np.minimum(rho, STEEP_FROM)
        position = np.log((1.0 + self._onset * at_most) / (1.0 - at_most)) * self._scale
        place = np.minimum(position, _LAST_PLACE).astype(np.intp)
        part = (position - place)[..., None]
        corner = self._first + place
        below = self._flat.take(corner, axis=0)
        p50, p95, batch = np.moveaxis(np.exp(below + (self._flat.take(corner + 1, axis=0) - below) * part), -1, 0)
        beyond = np.maximum(rho - STEEP_FROM, 0.0) / (1.0 - STEEP_FROM)
        # In overload every batch is full.
        size = np.minimum(batch + self._room * beyond, self._largest)
        stays = np.array((p50, p95)) * (self._one_ms * stretch * (1.0 + beyond))
        # A server that is held back keeps others waiting, not those whom it has served.
        served = np.multiply.outer(_idle(), (self._a_ms * batch + self._b_ms) * stretch)
        stays += (held_back - 1.0) * np.maximum(stays - served, 0.0)
        p50_ms, p95_ms = np.minimum(stays, LONGEST_MS)
        return QueueEstimate(p50_ms, p95_ms, rho, size, (self._a_ms * size + self._b_ms) * stretch)


def sojourn(
    a_ms: ArrayLike,
    b_ms: ArrayLike,
    max_batch: ArrayLike,
    servers: ArrayLike,
    rate_rps: ArrayLike,
    *,
    held_back: float = 1.0,
) -> QueueEstimate:
    """Sojourn times of Poisson requests at ``servers`` callers that each serve up to ``max_batch`` in ``a*n +
    b`` ms. All arguments broadcast; ``a + b`` is above 0, ``max_batch`` and ``servers`` at least 1, the rate finite.

    >>> idle = sojourn(0.0, 10.0, 1, 1, 1e-9)
    >>> round(float(idle.p50_ms), 1), round(float(idle.utilisation), 3)
    (10.0, 0.0)
    >>> bool(np.isfinite(sojourn(0.0, 10.0, 1, 1, 1e6).p95_ms))
    True
    """
    columns = np.broadcast_arrays(
        *(np.asarray(each, dtype=np.float64) for each in (a_ms, b_ms, max_batch, servers, rate_rps))
    )
    a, b, largest, callers, rate = (each.ravel() for each in columns)
    flat = Waiting(Queues(largest, callers), a, b).at(1.0, rate, held_back)
    return QueueEstimate(**{each.name: getattr(flat, each.name).reshape(columns[0].shape) for each in fields(flat)})


def load_at(fixed: Floats, max_batch: Floats, position: Floats) -> Floats:
    """Requests per caller and time of one request alone, at a position between no load (0) and STEEP_FROM (1)."""
    gain = 1.0 / (1.0 - fixed + fixed / max_batch)
    grown = np.exp(position * _farthest(fixed, max_batch))
    return np.asarray(gain * (grown - 1.0) / (_ONSET * gain + grown))


def _farthest(fixed: Floats, max_batch: Floats) -> Floats:
    gain = 1.0 / (1.0 - fixed + fixed / max_batch)
    return np.asarray(np.log((1.0 + _ONSET * STEEP_FROM * gain) / (1.0 - STEEP_FROM)))


def _between(place: Floats, count: int) -> tuple[Indices, Floats]:
    """The grid point below, but the last, and how far beyond it in [0, 1]."""
    below = np.minimum(place.astype(np.intp), count - 2)
    return below, np.minimum(place - below, 1.0)


@lru_cache(maxsize=1)
def _played() -> Floats:
    """Logarithms of p50 and p95 in median times of one request alone and of the mean batch, shape (fixed shares,
    batches, callers, positions, 3)."""
    shape = len(FIXED_SHARES), len(BATCHES), len(CALLERS), len(POSITIONS), 3
    try:
        with np.load(BytesIO(PLAYED.read_bytes())) as stored:
            logs = np.asarray(stored["logs"] / SCALE, dtype=np.float64)
    except (OSError, EOFError, KeyError, ValueError, BadZipFile) as error:
        raise CorruptTable(f"{PLAYED} cannot be read; python -m benchmarks.play_queues makes it: {error}") from error
    if logs.shape != shape:
        raise CorruptTable(
            f"{PLAYED} holds {logs.shape} numbers, not {shape}; python -m benchmarks.play_queues makes it"
        )
    logs[..., :2] -= logs[0, 0, 0, 0, 0]
    return logs


@lru_cache(maxsize=1)
def _idle() -> Floats:
    """Median and 95th percentile of the stay where nobody waits, in median times of one request alone."""
    return np.asarray(np.exp(_played()[0, 0, 0, 0, :2]))


def normal_cdf(z: ArrayLike) -> Floats:
    """Standard normal distribution function, vectorised; Abramowitz & Stegun 7.1.26, error below 1e-6.

    >>> [round(float(p), 4) for p in normal_cdf([-1.6449, 0.0, 1.96])]
    [0.05, 0.5, 0.975]
    """
    x = np.asarray(z, dtype=np.float64) * math.sqrt(0.5)
    size = np.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * size)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    inside = 1.0 - poly * np.exp(-np.minimum(size * size, 700.0))
    return np.asarray(0.5 + np.copysign(0.5, x) * inside, dtype=np.float64)


def share_within(limit_ms: ArrayLike, p50_ms: ArrayLike, p95_ms: ArrayLike, log_sd: ArrayLike = 0.0) -> Floats:
    """Share of requests within the limit if latency is lognormal with these percentiles, known up to
    ``log_sd``.

    >>> round(float(share_within(100.0, 50.0, 100.0)), 3)
    0.95
    """
    middle = np.log(np.maximum(p50_ms, 1e-9))
    spread = np.maximum((np.log(np.maximum(p95_ms, 1e-9)) - middle) / Z_95, SMALLEST_SPREAD)
    return normal_cdf((np.log(np.maximum(limit_ms, 1e-9)) - middle) / np.hypot(spread, log_sd))
