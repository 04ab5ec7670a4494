"""Queueing formulas against exact results and against a simulated queue."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from selector.queueing import share_within, sojourn

Times = NDArray[np.float64]


def simulated_ms(service: tuple[float, float], max_batch: int, servers: int, rate_rps: float, count: int) -> Times:
    """Sojourn times of Poisson requests at greedy batch servers."""
    rng, (a_ms, b_ms) = np.random.default_rng(7), service
    arrivals = np.cumsum(rng.exponential(1000.0 / rate_rps, count))
    free = [0.0] * servers
    done, at = [], 0
    while at < count:
        start = max(heapq.heappop(free), arrivals[at])
        size = min(max_batch, int(np.searchsorted(arrivals, start, side="right")) - at)
        end = start + a_ms * size + b_ms
        done.extend(end - arrivals[at : at + size])
        heapq.heappush(free, end)
        at += size
    return np.array(done)


@pytest.mark.parametrize("rho", [0.1, 0.5, 0.8, 0.9])
def test_one_server_without_batches_waits_as_pollaczek_and_khinchine_say(rho: float) -> None:
    queue = sojourn(0.0, 10.0, 1, 1, rho * 100.0, service_scv=0.0)
    assert float(queue.mean_ms) == pytest.approx(10.0 + rho * 10.0 / (2 * (1 - rho)))


@pytest.mark.parametrize(
    ("a_ms", "b_ms", "max_batch", "servers", "rate_rps"),
    [(0, 10, 1, 1, 50), (0, 10, 1, 1, 85), (2, 8, 8, 1, 60), (2, 8, 8, 1, 200), (2, 8, 4, 2, 300), (5, 5, 1, 4, 250)],
)
def test_percentiles_agree_with_a_simulated_queue_within_a_quarter(
    a_ms: float, b_ms: float, max_batch: int, servers: int, rate_rps: float
) -> None:
    times = simulated_ms((a_ms, b_ms), max_batch, servers, rate_rps, 15_000)
    queue = sojourn(a_ms, b_ms, max_batch, servers, rate_rps)
    assert float(queue.p50_ms) == pytest.approx(np.quantile(times, 0.5), rel=0.25)
    assert float(queue.p95_ms) == pytest.approx(np.quantile(times, 0.95), rel=0.25)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1e3), st.floats(1e-3, 1e3), st.integers(1, 64), st.integers(1, 16), st.floats(0, 1e6))
def test_any_load_gives_finite_ordered_percentiles(
    a_ms: float, b_ms: float, max_batch: int, servers: int, rate_rps: float
) -> None:
    queue = sojourn(a_ms, b_ms, max_batch, servers, rate_rps)
    numbers = [queue.p50_ms, queue.p95_ms, queue.mean_ms, queue.utilisation, queue.batch, queue.service_ms]
    assert all(np.isfinite(number) for number in numbers)
    assert 0 < queue.p50_ms <= queue.p95_ms
    assert 1 <= queue.batch <= max_batch


def test_latency_grows_smoothly_into_overload() -> None:
    rates = np.linspace(1.0, 200.0, 400)
    p95_ms = sojourn(0.0, 10.0, 1, 1, rates).p95_ms
    steps = np.diff(p95_ms)
    assert (steps >= 0).all()
    assert steps.max() < 50.0
    assert p95_ms[-1] > 20 * p95_ms[0]


def test_batches_fill_with_load_and_never_exceed_the_bound() -> None:
    sizes = sojourn(1.0, 9.0, 8, 1, [1.0, 200.0, 400.0, 5000.0]).batch
    assert sizes.tolist() == sorted(sizes.tolist())
    assert (sizes[0], sizes[-1]) == (1.0, 8.0)


def test_uncertainty_pulls_a_share_towards_one_half() -> None:
    sure, unsure = float(share_within(100.0, 50.0, 90.0)), float(share_within(100.0, 50.0, 90.0, 1.0))
    assert 0.5 < unsure < sure < 1.0
