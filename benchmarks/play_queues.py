"""Plays batching servers request by request and keeps how long requests stay: ``python -m benchmarks.play_queues``.

Writes `selector/queues.npz`, from which `selector/queueing.py` interpolates; two to three minutes on one core, the same
bytes every time on one machine. Requests arrive by a Poisson process; a caller that is free takes what waits, oldest
first, up to the largest batch; a batch of n takes ``(1 - f) n + f`` times the mean time of one request alone, times
lognormal noise. Every queue runs until it no longer knows how it began: its first requests are left out.

All queues see the same arrivals, so their chance would be in every number. Of many samples that one is played whose
queue with one caller and constant service times comes nearest to what theory gives exactly (Pollaczek and
Khinchine's mean wait, and the exponential decay of long ones).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from selector.queueing import BATCHES, CALLERS, FIXED_SHARES, PLAYED, POSITIONS, SCALE, load_at

Floats = NDArray[np.float64]

REQUESTS, LEFT_OUT_SHARE = 60_000, 0.1
# Squared coefficient of variation of one execution.
SERVICE_SCV = 0.02
SEEDS = range(50)
CHECKED_AT = (0.5, 0.7, 0.8, 0.9, 0.95)


def main() -> None:
    """Play all queues and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PLAYED)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    arguments = parser.parse_args()
    fixed, batch, position = (each.ravel() for each in np.meshgrid(FIXED_SHARES, BATCHES, POSITIONS, indexing="ij"))
    shape = len(FIXED_SHARES), len(BATCHES), len(CALLERS), len(POSITIONS), 3
    logs = np.zeros(shape)
    sample = Sample.of(truest_seed(arguments.requests), arguments.requests)
    for place, callers in enumerate(CALLERS):
        found = played(fixed, batch, int(callers), callers * load_at(fixed, batch, position), sample)
        logs[:, :, place] = np.log(found).reshape(len(FIXED_SHARES), len(BATCHES), len(POSITIONS), 3)
        print(f"{callers:g} callers: played {len(fixed)} queues of {arguments.requests} requests", flush=True)
    # Stays of finite samples fall with load by chance; those of queues do not.
    logs = np.maximum.accumulate(logs, axis=3)
    np.savez_compressed(arguments.output, logs=np.round(logs * SCALE).astype(np.int16))


@dataclass(frozen=True, slots=True)
class Sample:
    """When requests arrive, in mean times between them, and what their execution takes more or less, of mean 1."""

    arrivals: Floats
    noise: Floats

    @classmethod
    def of(cls, seed: int, requests: int) -> Sample:
        """So many requests."""
        rng, spread = np.random.default_rng(seed), np.sqrt(np.log1p(SERVICE_SCV))
        arrivals = np.cumsum(rng.exponential(1.0, requests))
        return cls(arrivals, np.exp(spread * rng.standard_normal(requests) - spread**2 / 2.0))


def truest_seed(requests: int) -> int:
    """The seed whose arrivals make a queue that theory knows come out right."""
    gaps = np.array([np.random.default_rng(seed).exponential(1.0, requests) for seed in SEEDS])
    error = np.zeros(len(SEEDS))
    for rho in CHECKED_AT:
        steps = np.cumsum(rho - gaps[:, 1:], axis=1)
        waits = steps - np.minimum(np.minimum.accumulate(steps, axis=1), 0.0)
        waits = waits[:, round(LEFT_OUT_SHARE * requests) :] / rho
        error += np.log(waits.mean(axis=1) / (rho / (2.0 * (1.0 - rho)))) ** 2
        error += np.log(np.quantile(waits, 0.95, axis=1) / long_wait(rho)) ** 2
    return SEEDS[int(error.argmin())]


def long_wait(rho: float) -> float:
    """Wait in services that one request in twenty exceeds, one caller with constant service times (M/D/1).

    The chance of a wait above t decays like ``exp(-s t)`` with ``rho (e^s - 1) = s``.

    >>> round(long_wait(0.8), 1)
    6.6
    """
    # Beyond its lowest point, at -log rho, the difference rises through 0.
    decays = np.linspace(-np.log(rho), 20.0, 100_000)
    decay = float(np.interp(0.0, rho * np.expm1(decays) - decays, decays))
    return float(np.log((1.0 - rho) / (rho * np.exp(decay) - 1.0) / 0.05) / decay)


def played(fixed: Floats, largest: Floats, callers: int, load: Floats, sample: Sample) -> Floats:
    """Median and 95th percentile of the stay in times of one request alone, and mean batch; shape (queues, 3).

    ``load`` is how many requests arrive in the time of one alone; all arrays have the shape (queues,).
    """
    arrivals, noise, requests = sample.arrivals, sample.noise, len(sample.arrivals)
    load = np.maximum(load, 1e-6)
    free = np.zeros((len(load), callers))
    ends = np.full((len(load), requests), np.nan, dtype=np.float32)
    head, rows = np.zeros(len(load), dtype=np.intp), np.arange(len(load))
    while len(rows):
        first = head[rows]
        caller = free[rows].argmin(axis=1)
        # In units of the mean time between arrivals: float32 differences stay exact enough.
        start = np.maximum(free[rows, caller], arrivals[first])
        waiting = np.searchsorted(arrivals, start, side="right") - first
        size = np.clip(waiting, 1, largest[rows]).astype(np.intp)
        took = ((1.0 - fixed[rows]) * size + fixed[rows]) * noise[first] * load[rows]
        free[rows, caller] = start + took
        last = first + size - 1
        ends[rows, last] = start + took - arrivals[first]
        head[rows] = last + 1
        rows = rows[head[rows] < requests]
    return np.array([_summary(row, arrivals, pace) for row, pace in zip(ends, load, strict=True)])


def _summary(ends: NDArray[np.float32], arrivals: Floats, load: float) -> tuple[float, float, float]:
    """``ends`` holds, where a batch's last request stands, its end less the arrival of its first."""
    last = np.flatnonzero(np.isfinite(ends))
    size = np.diff(last, prepend=-1)
    first = last - size + 1
    stay = np.repeat(ends[last] + arrivals[first], size) - arrivals[: last[-1] + 1]
    left_out = round(LEFT_OUT_SHARE * len(arrivals))
    kept = stay[left_out:] / load
    settled = size[first >= left_out]
    p50, p95 = np.quantile(kept, (0.5, 0.95))
    return float(p50), float(p95), float(settled.mean())


if __name__ == "__main__":
    main()
