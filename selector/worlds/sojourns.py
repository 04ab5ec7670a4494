"""How long requests stay at a batching server, found by playing single requests: the truth of simulated worlds.

Shares no formula with `queueing.py`. Times are in units of the median time of one request alone, so that one set of
curves serves devices of any speed. Where execution times come from is an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Mask = NDArray[np.bool_]

LEVELS: Floats = np.concatenate([[0.01], np.arange(0.05, 0.9, 0.05), [0.9, 0.925, 0.95, 0.97, 0.985, 0.995]])
LEVEL_50, LEVEL_95 = int(np.argmin(np.abs(LEVELS - 0.5))), int(np.argmin(np.abs(LEVELS - 0.95)))
# Offered load: requests per time of one request alone. Beyond the ends the end holds, scaled by its time.
LOADS: Floats = np.geomspace(0.02, 40.0, 30)
REQUESTS = 300


class ExecutionTimes(Protocol):
    """Execution times of batches; a *kind* is one row of curves, for example a variant on a device class."""

    @property
    def kinds(self) -> int:
        """How many kinds there are."""
        ...

    def times(self, kind: Indices, size: Indices, shared: Mask, uniform: Floats) -> Floats:
        """One execution time each: batches of these sizes, with another one executing beside it or not."""
        ...


@dataclass(frozen=True, slots=True)
class Stay:
    """Sojourn times of one step in milliseconds, all of one shape but ``quantiles`` (..., levels)."""

    quantiles: Floats
    service_ms: Floats
    batch: Floats

    @property
    def p50_ms(self) -> Floats:
        """Median."""
        return np.asarray(self.quantiles[..., LEVEL_50])

    @property
    def p95_ms(self) -> Floats:
        """95th percentile."""
        return np.asarray(self.quantiles[..., LEVEL_95])

    def share_within(self, limit_ms: Floats) -> Floats:
        """Share of requests within the limit, which broadcasts against the shape, linear between levels."""
        limit = np.broadcast_to(limit_ms, self.service_ms.shape)
        above = np.sum(self.quantiles <= limit[..., None], axis=-1)
        right = np.clip(above, 1, len(LEVELS) - 1)
        low, high = (np.take_along_axis(self.quantiles, (right + d)[..., None], -1)[..., 0] for d in (-1, 0))
        part = (limit - low) / np.maximum(high - low, 1e-12)
        share = LEVELS[right - 1] + part * (LEVELS[right] - LEVELS[right - 1])
        return np.asarray(np.where(above == 0, 0.0, np.where(above == len(LEVELS), 1.0, np.clip(share, 0.0, 1.0))))


@dataclass(frozen=True, slots=True)
class SojournCurves:
    """Quantiles of the sojourn over offered load, float64 of shape (kinds, configurations, loads, levels), and the
    mean execution time and batch size (kinds, configurations, loads)."""

    quantiles: Floats
    service: Floats
    batch: Floats

    def at(self, kind: Indices, configuration: Indices, one_ms: Floats, rate_rps: Floats) -> Stay:
        """The stay where one request alone takes ``one_ms`` and ``rate_rps`` arrive; all arguments broadcast."""
        load = np.clip(rate_rps * one_ms / 1000.0, LOADS[0], LOADS[-1])
        place = (np.log(load) - np.log(LOADS[0])) / np.log(LOADS[1] / LOADS[0])
        left = np.minimum(place.astype(np.intp), len(LOADS) - 2)
        part = place - left
        rows = (kind * self.service.shape[1] + configuration) * len(LOADS) + left
        flat = self.quantiles.reshape(-1, len(LEVELS))
        share, unit = part[..., None], one_ms[..., None]
        quantiles = (flat[rows] * (1 - share) + flat[rows + 1] * share) * unit
        service, batch = (
            values[rows] * (1 - part) + values[rows + 1] * part for values in (self.service.ravel(), self.batch.ravel())
        )
        return Stay(quantiles, service * one_ms, batch)


def play_requests(
    source: ExecutionTimes, configurations: Sequence[tuple[int, int]], seed: int, requests: int = REQUESTS
) -> SojournCurves:
    """Curves for each kind and each (largest batch, callers): a free caller takes what waits, oldest first.

    Every curve starts empty and sees the same Poisson arrivals, stretched to its load.
    """
    rng = np.random.default_rng([seed, 90_001])
    shape = source.kinds, len(configurations), len(LOADS)
    kind, configuration, level = (each.ravel() for each in np.indices(shape))
    largest, callers = (np.array([each[side] for each in configurations])[configuration] for side in (0, 1))
    load = LOADS[level]
    arrivals = np.cumsum(rng.exponential(1.0, requests))
    free = np.where(np.arange(callers.max()) < callers[:, None], 0.0, np.inf)
    head = np.zeros(len(kind), dtype=np.intp)
    done = np.full((len(kind), requests), np.nan)
    executed, busy_time = np.zeros(len(kind)), np.zeros(len(kind))
    rows = np.arange(len(kind))
    while len(rows):
        position, pace = head[rows], load[rows]
        caller = np.argmin(free[rows], axis=1)
        start = np.maximum(free[rows, caller], arrivals[position] / pace)
        waiting = np.searchsorted(arrivals, start * pace, side="right") - position
        size = np.clip(waiting, 1, largest[rows])
        shared = np.sum((free[rows] > start[:, None]) & np.isfinite(free[rows]), axis=1) > 0
        service = source.times(kind[rows], size, shared, rng.random(len(rows)))
        free[rows, caller] = start + service
        done[rows, position + size - 1] = start + service
        executed[rows] += 1
        busy_time[rows] += service
        head[rows] += size
        rows = rows[head[rows] < requests]
    sojourns = np.sort(_filled(done) - arrivals / load[:, None], axis=1)
    picked = sojourns[:, np.minimum((LEVELS * requests).astype(np.intp), requests - 1)]
    return SojournCurves(
        picked.reshape(*shape, len(LEVELS)),
        (busy_time / executed).reshape(shape),
        (requests / executed).reshape(shape),
    )


def _filled(done: Floats) -> Floats:
    """The end of every request: that of the last one of its batch."""
    count = done.shape[1]
    ends = np.where(np.isnan(done), count - 1, np.arange(count))
    last = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    return np.take_along_axis(done, last, axis=1)


@dataclass(frozen=True)
class FormulaTimes:
    """Execution times by kind: ``(1 - fixed) n + fixed``, slower by ``cliff`` from ``cliff_from`` on, times lognormal
    noise, and rarely a hiccup."""

    fixed: Floats
    cliff: Floats
    cliff_from: Floats
    noise_sd: float = 0.1
    hiccup_share: float = 0.01
    hiccup: float = 2.5

    @property
    def kinds(self) -> int:
        """How many kinds there are."""
        return len(self.fixed)

    def times(self, kind: Indices, size: Indices, shared: Mask, uniform: Floats) -> Floats:
        """One execution time each; another execution beside it is charged elsewhere."""
        del shared
        fixed = self.fixed[kind]
        cliff = np.where(size >= self.cliff_from[kind], self.cliff[kind], 1.0)
        # A logistic variable stands in for a normal one: it needs no inverse error function.
        share = np.clip(uniform, 1e-4, 1 - 1e-4)
        noise = np.exp(self.noise_sd * 0.5513 * np.log(share / (1 - share)))
        hiccup = np.where(uniform > 1 - self.hiccup_share, self.hiccup, 1.0)
        return np.asarray(((1 - fixed) * size + fixed) * cliff * noise * hiccup)


@dataclass(frozen=True)
class ReplayedTimes:
    """Raw samples of real executions, never a fitted line. A batch runs at the smallest measured size that holds it.

    ``samples`` (kinds, 2, sizes, most) in units of the median of one request alone: alone and beside another;
    ``counts`` (kinds, 2, sizes) says how many there are; ``sizes`` ascends and its last one holds any batch.
    """

    samples: Floats
    counts: Indices
    sizes: Indices

    @property
    def kinds(self) -> int:
        """How many kinds there are."""
        return len(self.samples)

    def times(self, kind: Indices, size: Indices, shared: Mask, uniform: Floats) -> Floats:
        """One raw sample each."""
        measured = np.searchsorted(self.sizes, size)
        beside = shared.astype(np.intp)
        drawn = (uniform * self.counts[kind, beside, measured]).astype(np.intp)
        return np.asarray(self.samples[kind, beside, measured, drawn])
