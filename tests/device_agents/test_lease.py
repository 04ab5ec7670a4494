"""The account of one lease, against what was put in."""

from __future__ import annotations

import numpy as np
import pytest

from device_agents.lease import Answered, ArrivalMeter, Histogram, LeaseAccount


def answered(latency_ms: float, cpu_ms: float = 2) -> Answered:
    return Answered(latency_ms=latency_ms, queue_ms=0, service_ms=latency_ms, batch_rows=1, cpu_ms=cpu_ms)


def test_quantiles_are_within_one_per_cent() -> None:
    values = np.random.default_rng(5).lognormal(2, 1, 5000)
    histogram = Histogram()
    for value in values:
        histogram.add(float(value))
    for share in (0.5, 0.95, 0.99):
        exact = float(np.quantile(values, share, method="inverted_cdf"))
        assert histogram.quantile(share) == pytest.approx(exact, rel=0.011)


def test_a_lease_adds_up() -> None:
    account = LeaseAccount(slo_p95_ms=50, started_s=100)
    for latency_ms in (10, 20, 30, 100):
        account.ended([], [answered(latency_ms)], concurrency=1)
    account.failed()
    account.ended([(3, 12)], [], concurrency=2)
    account.ended([(1, 8)], [], concurrency=1)
    components = account.components(108)
    assert (components.requests, components.errors) == (5, 1)
    assert components.slo_hit_share == pytest.approx(3 / 5)
    assert components.throughput_rps == pytest.approx(4 / 8)
    assert components.cpu_ms_per_request == pytest.approx(2)
    assert components.service_ms == pytest.approx(10)
    assert components.batch_mean == pytest.approx(2)
    assert components.batch_histogram == {"1": 1, "3": 1}
    assert components.concurrency_histogram == {"1": 1, "2": 1}
    assert components.p50_ms == pytest.approx(20, rel=0.02)
    assert components.p99_ms == pytest.approx(100, rel=0.02)


def test_a_lease_without_requests_invents_nothing() -> None:
    components = LeaseAccount(slo_p95_ms=50, started_s=0).components(8)
    assert components.requests == 0
    assert components.p95_ms is None
    assert components.slo_hit_share is None
    assert components.cpu_ms_per_request is None
    assert components.throughput_rps == 0


def test_a_closed_lease_counts_no_more_and_closes_once() -> None:
    account = LeaseAccount(slo_p95_ms=50, started_s=0)
    account.ended([], [answered(1)], concurrency=1)
    assert account.close(8)
    assert not account.close(9)
    account.ended([], [answered(1)], concurrency=1)
    account.failed()
    account.ended([(1, 1)], [], concurrency=1)
    assert account.components(100).requests == 1
    assert account.components(100).throughput_rps == pytest.approx(1 / 8)
    assert account.active_s(100) == 8


def test_the_arrival_rate_follows_the_last_ten_seconds() -> None:
    meter = ArrivalMeter(100.5)
    assert meter.rate_rps(101) == 0
    for step in range(400):
        meter.arrived(100.5 + step / 20)
    assert meter.rate_rps(120.5) == pytest.approx(20, rel=0.06)
    assert meter.rate_rps(140) == 0


def test_the_arrival_rate_of_the_first_seconds_is_not_diluted() -> None:
    meter = ArrivalMeter(0.25)
    for step in range(60):
        meter.arrived(0.25 + step / 20)
    assert meter.rate_rps(3.25) == pytest.approx(20, rel=0.1)
