"""What the latency model expects before anything is learnt: borrowed profiles, contention, CPU quotas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from selector.actions import action_table
from selector.interactions import Profile
from selector.latency import LatencyModel, Predicted
from selector.profiles import ProfileBook
from tests.selector.builders import action, context, profiles, variant


def one_ms(some: tuple[Profile, ...], threads: int = 1) -> tuple[float, float, str]:
    time = ProfileBook(some).service_times([variant(0)], [(0, threads)], cores=4)[0]
    unsure = LatencyModel(some).predict(context(arrival_rate_rps=0.1), action_table((action(0, threads=threads),)))
    return time.a_ms + time.b_ms, float(unsure.log_sd[0]), time.source


def test_unmeasured_pairs_borrow_from_the_nearest_measurement_and_are_less_sure() -> None:
    own, other = Profile(variant(0).digest, 1, 8.0, 2.0), Profile(variant(1).digest, 1, 4.0, 2.0)
    server = replace(own, a_ms=2.0, b_ms=0.5, source="server"), replace(other, a_ms=1.0, b_ms=0.5, source="server")
    measured, sure, source = one_ms((own, *server))
    assert (measured, source) == (10.0, "device")
    threaded, sd, source = one_ms((own, *server), threads=4)
    assert (source, sd > sure, 2.5 < threaded < 10.0) == ("device_scaled", True, True)
    borrowed, sd, source = one_ms((other, *server))
    assert source == "server"
    assert borrowed == pytest.approx(2.5 * 4.0)
    assert sure < sd < one_ms(())[1]
    assert one_ms(server)[0] == 2.5
    assert one_ms((replace(own, source="class"), *server))[2] == "class"


def test_an_unmeasured_variant_is_guessed_from_its_size_at_the_speed_of_the_others() -> None:
    slow = ProfileBook(profiles(2, factor=10.0)).service_times([variant(0), variant(5)], [(1, 1)], cores=4)[0]
    fast = ProfileBook(profiles(2)).service_times([variant(0), variant(5)], [(1, 1)], cores=4)[0]
    assert (slow.source, fast.source) == ("size", "size")
    assert slow.a_ms == pytest.approx(10 * fast.a_ms)


@pytest.mark.parametrize(("isa", "slower"), [("avx2", 2.0), ("avx2+vnni", 1.0), ("neon-dot", 1.0), ("", 1.0)])
def test_an_unmeasured_int8_variant_is_guessed_slower_where_no_instruction_helps(isa: str, slower: float) -> None:
    def guessed(precision: str, features: dict[str, float | str]) -> float:
        table = action_table((action(0, precision=precision, size_bytes=10_000_000),))
        return float(LatencyModel(()).predict(context(features=features), table).service_ms[0])

    assert guessed("int8", {"isa": isa}) == pytest.approx(slower * guessed("int8", {}), rel=0.03)
    assert guessed("fp32", {"isa": isa}) == guessed("fp32", {})


def test_competing_load_and_too_many_threads_slow_every_run_down() -> None:
    some = (action(0), action(0, concurrency=4))
    quiet = LatencyModel(profiles()).predict(context(), action_table(some))
    crowded = LatencyModel(profiles()).predict(context(cpu_load_share=1.0), action_table(some))
    assert (crowded.service_ms > quiet.service_ms).all()
    busy = LatencyModel(profiles()).predict(context(cores=1, arrival_rate_rps=300.0), action_table(some))
    assert busy.raw_b_ms[1] > 2 * busy.raw_b_ms[0]


def throttled(some: tuple[Profile, ...], quota: float | None, rate_rps: float = 0.01, **told: float) -> Predicted:
    features = told | ({} if quota is None else {"cpu_quota": quota})
    situation = context(cores=1, arrival_rate_rps=rate_rps, features=features)
    return LatencyModel(some).predict(situation, action_table((action(0),)))


def test_a_run_within_one_grant_of_a_cpu_quota_is_not_slowed_down() -> None:
    short = (Profile(variant(0).digest, 1, 0.0, 10.0),)
    free, limited = throttled(short, None), throttled(short, 0.2)
    assert limited.p50_ms == pytest.approx(free.p50_ms, rel=2e-3)
    assert limited.held_back == pytest.approx([5.0])


def test_a_longer_run_stalls_until_the_next_grant() -> None:
    """40 ms of work at 20 ms per 100 ms: 20 ms, 80 ms of waiting, 20 ms."""
    assert throttled((Profile(variant(0).digest, 1, 0.0, 40.0),), 0.2).p50_ms == pytest.approx([120.0], rel=0.01)


def test_a_short_period_stalls_sooner_and_for_less() -> None:
    """2 ms of work at 1 ms per 20 ms: 1 ms, 19 ms of waiting, 1 ms."""
    some = (Profile(variant(0).digest, 1, 0.0, 2.0),)
    assert throttled(some, 0.05).p50_ms == pytest.approx([2.0], rel=0.01)
    assert throttled(some, 0.05, cpu_quota_period=0.02).p50_ms == pytest.approx([21.0], rel=0.01)


@pytest.mark.parametrize("rate_rps", [19.0, 20.0, 21.0, 40.0])
def test_predictions_stay_numbers_where_a_quota_overloads_large_batches(rate_rps: float) -> None:
    features = {"cpu_quota": 0.2}
    situation = context(cores=1, arrival_rate_rps=rate_rps, features=features)
    some = tuple(action(batch=batch) for batch in (1, 8, 64))
    found = LatencyModel((Profile(variant(0).digest, 1, 10.0, 0.0),)).predict(situation, action_table(some))
    for column in (found.p50_ms, found.p95_ms, found.slo_hit_share, found.hopeful_hit_share):
        assert np.isfinite(column).all()
    assert (found.p50_ms > 0).all()


def test_a_quota_bounds_what_a_device_sustains() -> None:
    some = (Profile(variant(0).digest, 1, 0.0, 10.0),)
    assert throttled(some, None, rate_rps=30.0).p95_ms[0] < 30
    assert throttled(some, 0.2, rate_rps=30.0).p95_ms[0] > 200
