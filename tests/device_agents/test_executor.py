"""The executor: batches that are right, bounds that hold, accounts that add up."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from device_agents.batching import chunks, join, part, share_of_queue
from device_agents.errors import BadRequest, Overloaded, RunFailed
from device_agents.executor import Executor
from device_agents.metrics import prometheus_text
from device_agents.runtime import EmulatedQuota, Session
from device_agents.scheduling import PlainScheduler
from device_agents.served import Answer
from device_agents.service_times import start
from device_agents.wire import ServingConfiguration
from tests.device_agents.models import adding, dense, picky, scaling
from tests.device_agents.serving import served


@pytest.fixture
def executor() -> Iterator[Executor]:
    executor = Executor("digits", queue_requests=64)
    yield executor
    executor.close()


def rows(*values: float) -> dict[str, np.ndarray]:
    return {"x": np.repeat(np.array(values, dtype=np.float32)[:, None], 4, axis=1)}


def ask_many(executor: Executor, count: int, size: int = 1) -> list[Future[Answer]]:
    return [executor.submit(rows(*[index] * size)) for index in range(count)]


def blocked(executor: Executor, seconds: float = 0.3, *, request: dict[str, np.ndarray] | None = None) -> None:
    """Keeps the single caller busy, so that what follows has to wait."""
    served_now = executor.served
    assert served_now is not None
    quota = EmulatedQuota(1e-9, sleep=lambda _: time.sleep(seconds))
    served_now.session._quota = quota  # the seam of the emulation, used to stretch one run
    executor.submit(request or rows(0))
    time.sleep(seconds / 3)
    served_now.session._quota = None


def assert_opened(gate: threading.Event) -> None:
    assert gate.wait(5)


class Listening(PlainScheduler):
    """Keeps what it is told of runs, as (rows, ms)."""

    def __init__(self, configuration: ServingConfiguration) -> None:
        times = start(0.1, 0.1, max_concurrency=configuration.max_concurrency, cores=1)
        super().__init__(configuration, runs_at_once=1, times=times)
        self.heard: list[tuple[int, float]] = []

    def observed(self, *, rows: int, service_ms: float, concurrency: float) -> None:
        self.heard.append((rows, service_ms))
        super().observed(rows=rows, service_ms=service_ms, concurrency=concurrency)


def test_what_is_learnt_of_a_run_includes_joining_and_parting_of_its_requests(
    executor: Executor, tmp_path: Path
) -> None:
    model = served(scaling(2), tmp_path, max_batch=1000)
    scheduler = Listening(model.configuration)
    executor.swap(model, scheduler=scheduler)
    blocked(executor)
    answers = [future.result(5) for future in ask_many(executor, 4, size=250)]
    assert {answer.cost.batch_rows for answer in answers} == {1000}
    rows_run, heard_ms = scheduler.heard[-1]
    assert rows_run == 1000
    assert heard_ms > answers[0].cost.service_ms


def test_requests_that_wait_are_joined_up_to_the_largest_batch_and_answered_each_with_its_own(
    executor: Executor, tmp_path: Path
) -> None:
    executor.swap(served(scaling(2), tmp_path, max_batch=4))
    blocked(executor)
    answers = [future.result(5) for future in ask_many(executor, 10)]
    assert [answer.outputs["y"][0, 0] for answer in answers] == [2 * index for index in range(10)]
    assert all(answer.outputs["y"].shape == (1, 4) for answer in answers)
    assert [answer.cost.batch_rows for answer in answers] == [4] * 8 + [2] * 2


def test_free_callers_share_the_queue_instead_of_one_taking_all() -> None:
    assert share_of_queue(waiting_rows=8, free_callers=4, max_batch=8) == 2
    assert share_of_queue(waiting_rows=100, free_callers=1, max_batch=8) == 8
    assert share_of_queue(waiting_rows=0, free_callers=0, max_batch=8) == 1


def test_requests_of_other_shapes_wait_for_a_run_of_their_own_and_keep_their_order(
    executor: Executor, tmp_path: Path
) -> None:
    executor.swap(served(adding(), tmp_path, max_batch=8))
    one, other = ({"x": np.ones((1, width), dtype=np.float32)} for width in (2, 3))
    blocked(executor, request=one)
    answers = [future.result(5) for future in [executor.submit(each) for each in (one, one, other, one)]]
    assert [answer.cost.batch_rows for answer in answers] == [2, 2, 1, 1]


def test_parts_put_together_are_the_whole() -> None:
    requests = [rows(1), rows(2, 3), rows(4, 5, 6)]
    joined = join(requests)
    parts = part({"y": joined["x"]}, [1, 2, 3])
    for request, own in zip(requests, parts, strict=True):
        np.testing.assert_array_equal(request["x"], own["y"])
    again = np.concatenate([chunk["x"] for chunk in chunks(joined, rows=6, max_batch=4)])
    np.testing.assert_array_equal(again, joined["x"])


def test_a_request_above_the_largest_batch_runs_in_pieces(executor: Executor, tmp_path: Path) -> None:
    executor.swap(served(scaling(2), tmp_path, max_batch=4))
    answer = executor.infer(rows(*range(10)), timeout_s=5)
    assert answer.outputs["y"][:, 0].tolist() == [2 * index for index in range(10)]
    assert answer.served.account.components(time.monotonic()).batch_histogram == {"2": 1, "4": 2}


def test_a_model_with_a_fixed_batch_runs_one_request_at_a_time(executor: Executor, tmp_path: Path) -> None:
    executor.swap(served(scaling(2, rows=1), tmp_path, max_batch=4))
    blocked(executor)
    assert [future.result(5).cost.batch_rows for future in ask_many(executor, 4)] == [1] * 4
    with pytest.raises(BadRequest, match="shape"):
        executor.submit(rows(1, 2))


def test_one_bad_request_does_not_fail_those_it_was_joined_with(executor: Executor, tmp_path: Path) -> None:
    executor.swap(served(picky(), tmp_path, max_batch=8))
    gate = threading.Event()
    served_now = executor.served
    assert served_now is not None
    served_now.session._quota = EmulatedQuota(1e-9, sleep=lambda _: assert_opened(gate))
    first = executor.submit({"index": np.array([0])})
    time.sleep(0.05)
    futures = [executor.submit({"index": np.array([index])}) for index in (0, 7, 1)]
    served_now.session._quota = None
    gate.set()
    assert first.result(5).outputs["y"][0, 0] == 1
    assert futures[0].result(5).outputs["y"][0, 0] == 1
    assert futures[2].result(5).outputs["y"][0, 0] == 2
    with pytest.raises(RunFailed):
        futures[1].result(5)
    assert served_now.account.health()[:2] == (4, 1)


def test_a_full_queue_sheds_at_once_and_counts_it_as_an_error_of_the_decision(tmp_path: Path) -> None:
    executor = Executor("digits", queue_requests=3)
    executor.swap(served(scaling(2), tmp_path))
    blocked(executor)
    ask_many(executor, 3)
    with pytest.raises(Overloaded) as shed:
        executor.submit(rows(1))
    assert shed.value.retry_after_s >= 1
    executor.close()
    assert executor.served is not None
    components = executor.served.account.components(time.monotonic())
    assert (components.requests, components.errors) == (5, 1)
    assert components.slo_hit_share == pytest.approx(0.8)


def test_never_more_runs_at_once_than_the_configuration_allows(executor: Executor, tmp_path: Path) -> None:
    executor.swap(served(dense(), tmp_path, max_batch=1, max_concurrency=2))
    for future in ask_many(executor, 30):
        future.result(30)
    assert executor.served is not None
    histogram = executor.served.account.components(time.monotonic()).concurrency_histogram
    assert set(histogram) <= {"1", "2"}
    assert sum(histogram.values()) == 30


def test_concurrency_follows_a_new_configuration_without_a_new_session(executor: Executor, tmp_path: Path) -> None:
    first = served(dense(), tmp_path, max_batch=1, max_concurrency=1)
    executor.swap(first)
    for concurrency in (3, 1, 2):
        configuration = ServingConfiguration(max_batch=1, max_concurrency=concurrency)
        now = replace(first, configuration=configuration, account=served(scaling(1), tmp_path).account)
        executor.swap(now)
        for future in ask_many(executor, 20):
            future.result(30)
        histogram = now.account.components(time.monotonic()).concurrency_histogram
        assert max(map(int, histogram)) <= concurrency


def test_requests_belong_to_the_decision_that_served_them(executor: Executor, tmp_path: Path) -> None:
    old, new = served(scaling(2), tmp_path, decision_id="d1"), served(scaling(3), tmp_path, decision_id="d2")
    executor.swap(old)
    blocked(executor)
    waiting = ask_many(executor, 4)
    executor.swap(new)
    assert {future.result(5).served.decision_id for future in waiting} == {"d2"}
    assert executor.wait_until_idle(old, timeout_s=5)
    assert old.account.health()[0] == 1
    assert new.account.health()[0] == 4


def test_requests_that_wait_are_run_as_the_new_model_counts_rows(executor: Executor, tmp_path: Path) -> None:
    executor.swap(served(scaling(2, rows=2), tmp_path))
    blocked(executor, request=rows(0, 0))
    waiting = [executor.submit(rows(index, index + 10)) for index in range(3)]
    executor.swap(served(scaling(3), tmp_path, max_batch=8))
    answers = [future.result(5).outputs["y"][:, 0].tolist() for future in waiting]
    assert answers == [[3 * index, 3 * index + 30] for index in range(3)]


def test_a_request_that_the_new_model_cannot_take_fails_and_says_why(executor: Executor, tmp_path: Path) -> None:
    executor.swap(served(scaling(2), tmp_path))
    blocked(executor)
    fitting, misfit = executor.submit(rows(1)), executor.submit(rows(1, 2))
    executor.swap(served(scaling(3, rows=1), tmp_path))
    assert fitting.result(5).outputs["y"][0, 0] == 3
    with pytest.raises(BadRequest, match="changed while this request waited"):
        misfit.result(5)
    assert 'nv_inference_request_failure{model="digits",version="1",reason="OTHER"} 1' in prometheus_text([executor])


def test_a_caller_survives_whatever_a_run_raises(executor: Executor, tmp_path: Path) -> None:
    def explode(_: float) -> None:
        raise MemoryError

    now = served(scaling(2), tmp_path)
    executor.swap(now)
    now.session._quota = EmulatedQuota(1e-9, sleep=explode)
    for _ in range(3):
        with pytest.raises(RunFailed, match="MemoryError"):
            executor.infer(rows(1), timeout_s=5)
    now.session._quota = None
    assert executor.infer(rows(1), timeout_s=5).outputs["y"][0, 0] == 2
    assert now.account.health()[:2] == (4, 3)


def test_a_model_that_hangs_can_be_replaced(executor: Executor, tmp_path: Path) -> None:
    hangs, gate = served(scaling(2), tmp_path), threading.Event()
    executor.swap(hangs)
    hangs.session._quota = EmulatedQuota(1e-9, sleep=lambda _: assert_opened(gate))
    stuck = executor.submit(rows(1))
    time.sleep(0.05)
    waiting = executor.submit(rows(2))
    assert executor.unanswered == 2
    executor.swap(served(scaling(3), tmp_path), gives_up_old=True)
    with pytest.raises(RunFailed, match="hung"):
        stuck.result(1)
    assert waiting.result(5).outputs["y"][0, 0] == 6
    assert executor.wait_until_idle(hangs, timeout_s=0)
    gate.set()
    assert executor.infer(rows(2), timeout_s=5).outputs["y"][0, 0] == 6
    assert executor.unanswered == 0


def test_nothing_is_answered_before_there_is_a_model_or_after_the_end(tmp_path: Path) -> None:
    executor = Executor("digits", queue_requests=4)
    with pytest.raises(Overloaded, match="not ready"):
        executor.submit(rows(1))
    executor.swap(served(scaling(2), tmp_path))
    future = executor.submit(rows(1))
    executor.close()
    assert future.result(0).outputs["y"][0, 0] == 2
    with pytest.raises(Overloaded):
        executor.submit(rows(1))


def test_a_request_that_was_given_up_is_not_run(executor: Executor, tmp_path: Path) -> None:
    executor.swap(served(scaling(2), tmp_path, max_batch=1))
    blocked(executor)
    given_up, kept = executor.submit(rows(1)), executor.submit(rows(2))
    assert given_up.cancel()
    assert kept.result(5).outputs["y"][0, 0] == 4
    assert executor.statistics.runs == 2


def test_costs_add_up(executor: Executor, tmp_path: Path) -> None:
    executor.swap(served(dense(), tmp_path))
    cost = executor.infer(rows(*[1] * 4), timeout_s=30).cost
    assert 0 < cost.cpu_ms <= cost.service_ms * 1.5 + 1
    assert cost.latency_ms >= cost.queue_ms + cost.service_ms - 1


def test_the_emulated_quota_holds_cpu_time_by_wall_time(tmp_path: Path) -> None:
    model = dense()
    session = Session(model.write(tmp_path / "m.onnx"), threads=1, quota=EmulatedQuota(0.25))
    started_s, cpu_ms = time.monotonic(), 0.0
    for _ in range(10):
        _, cost = session.run(rows(*[1] * 32))
        cpu_ms += cost.cpu_ms
    share = cpu_ms / 1000 / (time.monotonic() - started_s)
    assert share <= 0.26


def test_the_emulated_quota_is_one_processor_for_all_callers() -> None:
    slept: list[float] = []
    quota = EmulatedQuota(0.5, sleep=slept.append)
    now_s = time.monotonic()
    quota.pay(started_s=now_s, cpu_s=0.1)
    quota.pay(started_s=now_s, cpu_s=0.1)
    assert slept == [pytest.approx(0.2, abs=0.05), pytest.approx(0.4, abs=0.05)]


GIVES_BACK = """
import sys, numpy, psutil, device_agents.runtime as runtime
from pathlib import Path
session, small = runtime.Session(Path(sys.argv[1]), threads=1), {"x": numpy.ones((1, 4), dtype=numpy.float32)}
session.run(small)
session.run({"x": numpy.ones((4_000_000, 4), dtype=numpy.float32)})
session.run(small)
swollen = psutil.Process().memory_info().rss
runtime.SHRINK_AFTER_S = 0.0
session.run(small)
print(swollen - psutil.Process().memory_info().rss)
"""


def test_memory_of_a_large_run_is_given_back_some_time_after_it(tmp_path: Path) -> None:
    """In a process of its own: what the allocator of this one gives back depends on the tests before."""
    path = scaling(2).write(tmp_path / "m.onnx")
    done = subprocess.run([sys.executable, "-c", GIVES_BACK, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 40_000_000
