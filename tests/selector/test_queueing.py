"""Interpolated queues against exact results and against queues that are simulated here."""

from __future__ import annotations

import heapq
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks.play_queues import SERVICE_SCV, Sample, long_wait, played
from selector import queueing
from selector.errors import CorruptTable
from selector.queueing import (
    BATCHES,
    CALLERS,
    FIXED_SHARES,
    LONGEST_MS,
    POSITIONS,
    load_at,
    share_within,
    sojourn,
)

Times = NDArray[np.float64]


def simulated_ms(service: tuple[float, float], max_batch: int, servers: int, rate_rps: float, count: int) -> Times:
    """Sojourn times of Poisson requests at greedy batch servers whose service varies by SERVICE_SCV."""
    rng, (a_ms, b_ms) = np.random.default_rng(7), service
    varied = rng.gamma(1.0 / SERVICE_SCV, SERVICE_SCV, count)
    arrivals = np.cumsum(rng.exponential(1000.0 / rate_rps, count))
    free = [0.0] * servers
    done, at = [], 0
    while at < count:
        start = max(heapq.heappop(free), arrivals[at])
        size = min(max_batch, int(np.searchsorted(arrivals, start, side="right")) - at)
        end = start + (a_ms * size + b_ms) * varied[at]
        done.extend(end - arrivals[at : at + size])
        heapq.heappush(free, end)
        at += size
    return np.array(done)


@pytest.mark.parametrize("rho", [0.1, 0.3])
def test_the_median_request_at_light_load_hardly_waits(rho: float) -> None:
    """Poisson arrivals find one caller as often idle as it is."""
    assert float(sojourn(0.0, 10.0, 1, 1, rho * 100.0).p50_ms) == pytest.approx(10.0, rel=0.08)


@pytest.mark.parametrize("rho", [0.7, 0.8, 0.9])
def test_a_busy_server_has_the_tail_that_theory_gives(rho: float) -> None:
    assert float(sojourn(0.0, 10.0, 1, 1, rho * 100.0).p95_ms) == pytest.approx(10.0 * (1.0 + long_wait(rho)), rel=0.06)


@pytest.mark.parametrize(
    ("a_ms", "b_ms", "max_batch", "servers", "rate_rps"),
    [
        (0, 10, 1, 1, 50),
        (0, 10, 1, 1, 85),
        (2, 8, 8, 1, 60),
        (2, 8, 8, 1, 200),
        (2, 8, 4, 2, 300),
        (5, 5, 1, 4, 250),
        (9, 1, 8, 2, 80),
        (9, 1, 32, 1, 75),
        (6, 4, 12, 3, 350),
        (0.5, 9.5, 32, 2, 900),
    ],
)
def test_percentiles_agree_with_a_simulated_queue(
    a_ms: float, b_ms: float, max_batch: int, servers: int, rate_rps: float
) -> None:
    times = simulated_ms((a_ms, b_ms), max_batch, servers, rate_rps, 30_000)
    queue = sojourn(a_ms, b_ms, max_batch, servers, rate_rps)
    assert float(queue.p50_ms) == pytest.approx(np.quantile(times, 0.5), rel=0.12)
    assert float(queue.p95_ms) == pytest.approx(np.quantile(times, 0.95), rel=0.15)


def test_the_table_is_what_its_command_plays() -> None:
    """A few of its queues, played again at a quarter of the length."""
    fixed, batch, position = np.array([FIXED_SHARES[4], FIXED_SHARES[1]]), BATCHES[[3, 0]], POSITIONS[[12, 6]]
    load = CALLERS[1] * load_at(fixed, batch, position)
    again = played(fixed, batch, int(CALLERS[1]), load, Sample.of(0, 15_000))
    stay = sojourn(1.0 - fixed, fixed, batch, CALLERS[1], load * 1000.0)
    found = np.stack([stay.p50_ms, stay.p95_ms, stay.batch], axis=1)
    assert found == pytest.approx(again, rel=0.1)


def test_what_holds_the_server_back_makes_others_wait_not_those_it_served() -> None:
    idle, held = sojourn(0.0, 10.0, 1, 1, 1e-6), sojourn(0.0, 10.0, 1, 1, 1e-6, held_back=3.0)
    assert float(held.p50_ms) == pytest.approx(float(idle.p50_ms), rel=0.05)
    busy, stalled = sojourn(0.0, 10.0, 1, 1, 20.0), sojourn(0.0, 10.0, 1, 1, 20.0, held_back=3.0)
    assert float(stalled.utilisation) == pytest.approx(3 * float(busy.utilisation))
    assert float(stalled.p95_ms) > 2 * float(busy.p95_ms)


@settings(max_examples=200, deadline=None)
@given(
    fixed=st.floats(0, 1),
    one_ms=st.floats(1e-3, 1e3),
    max_batch=st.integers(1, 300),
    servers=st.integers(1, 32),
    utilisation=st.one_of(st.floats(0, 2), st.floats(0.9, 1.1), st.floats(0, 1e6)),
    held_back=st.floats(1, 20),
)
def test_any_load_gives_finite_ordered_percentiles(
    *, fixed: float, one_ms: float, max_batch: int, servers: int, utilisation: float, held_back: float
) -> None:
    a_ms, b_ms = (1.0 - fixed) * one_ms, fixed * one_ms
    rate_rps = 1000.0 * utilisation * servers / held_back / (a_ms + b_ms / max_batch)
    queue = sojourn(a_ms, b_ms, max_batch, servers, rate_rps, held_back=held_back)
    numbers = [queue.p50_ms, queue.p95_ms, queue.utilisation, queue.batch, queue.service_ms]
    assert all(np.isfinite(number) for number in numbers)
    assert 0 < queue.p50_ms <= queue.p95_ms
    assert 1 <= queue.batch <= max_batch
    assert queue.p50_ms > 0.9 * one_ms or queue.p50_ms == LONGEST_MS


@pytest.mark.parametrize("rate_rps", [19.0, 20.0, 21.0])
def test_a_queue_that_a_quota_overloads_takes_longer_than_one_request(rate_rps: float) -> None:
    """Batches become full all at once there; what is served is taken off what waits, never more."""
    queue = sojourn(10.0, 0.0, 64, 1, rate_rps, held_back=5.0)
    assert 300.0 < float(queue.p50_ms) < float(queue.p95_ms)


@pytest.mark.parametrize("content", [None, b"", b"version https://git-lfs.github.com/spec/v1", b"PK\x03\x04 cut"])
def test_a_table_that_cannot_be_read_is_named(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "queues.npz"
    if content is not None:
        damaged.write_bytes(content)
    monkeypatch.setattr(queueing, "PLAYED", damaged)
    with pytest.raises(CorruptTable, match=r"queues\.npz.*play_queues"):
        queueing._played.__wrapped__()


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
    assert (sizes[0], sizes[-1]) == (pytest.approx(1.0, abs=0.01), 8.0)


def test_uncertainty_pulls_a_share_towards_one_half() -> None:
    sure, unsure = float(share_within(100.0, 50.0, 90.0)), float(share_within(100.0, 50.0, 90.0, 1.0))
    assert 0.5 < unsure < sure < 1.0
