"""The controller: what it learns, what it plans, which requests it runs, and that an executor obeys it."""

from __future__ import annotations

import heapq
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.serving_control import contenders, oracle_settings
from benchmarks.serving_simulation import DEVICES, WEATHERS, Device, Weather, goodput_rps
from device_agents.budget import ThreadBudget
from device_agents.control import ArrivalRate, Choice, Plan, choose, plan, utility
from device_agents.errors import Overloaded
from device_agents.executor import Executor
from device_agents.metrics import model_statistics, prometheus_text
from device_agents.runtime import EmulatedQuota
from device_agents.scheduling import PlainScheduler, SloScheduler
from device_agents.served import Answer, ServedModel
from device_agents.service_times import ServiceTimes, start
from device_agents.wire import ServingConfiguration
from tests.device_agents.models import scaling
from tests.device_agents.serving import served

CONV, DENSE = (4.0, 0.1), (0.2, 4.0)
ROW = {"x": np.ones((1, 4), dtype=np.float32)}


def learnt(line: tuple[float, float], truth: tuple[float, float], *, runs: int = 200) -> ServiceTimes:
    """What is believed after runs of one to eight rows that took what ``truth`` says, give or take."""
    rng, times = random.Random(3), start(*line, max_concurrency=2, cores=2)
    for number in range(runs):
        rows = 1 << number % 4
        took_ms = (truth[0] * rows + truth[1]) * math.exp(rng.gauss(0, 0.05))
        times = times.observed(rows=rows, service_ms=took_ms)
    return times


def test_service_times_are_learnt_from_runs_whatever_was_believed_before() -> None:
    for line, truth in ((CONV, DENSE), (DENSE, CONV), (CONV, (8.0, 0.2))):
        times = learnt(line, truth)
        for rows in (1, 4, 8):
            assert times.predict_ms(rows) == pytest.approx(truth[0] * rows + truth[1], rel=0.2)


def test_a_slower_device_keeps_the_shape_of_the_line_when_runs_are_all_of_one_size() -> None:
    times = start(*DENSE, max_concurrency=1, cores=1)
    for _ in range(60):
        times = times.observed(rows=1, service_ms=2 * 4.2)
    assert times.predict_ms(1) == pytest.approx(8.4, rel=0.05)
    assert times.predict_ms(16) == pytest.approx(2 * 7.2, rel=0.25)


def test_runs_that_slow_each_other_are_noticed_and_no_longer_run_together() -> None:
    times = start(*DENSE, max_concurrency=2, cores=2)
    assert plan(times, rate_rps=300, slo_ms=15, max_batch=16, max_concurrency=2).concurrency == 2
    for _ in range(60):
        times = times.observed(rows=2, service_ms=2.2 * 4.4, concurrency=2)
    assert plan(times, rate_rps=300, slo_ms=15, max_batch=16, max_concurrency=2).concurrency == 1


@given(
    line=st.tuples(st.floats(0.01, 50), st.floats(0, 50)),
    rate_rps=st.floats(0, 1e4),
    slo_ms=st.floats(0.1, 1e4),
    max_batch=st.integers(1, 64),
    max_concurrency=st.integers(1, 8),
)
def test_a_plan_stays_inside_the_bounds_that_the_service_chose(
    line: tuple[float, float], rate_rps: float, slo_ms: float, max_batch: int, max_concurrency: int
) -> None:
    times = start(*line, max_concurrency=max_concurrency, cores=2)
    bounds = plan(times, rate_rps=rate_rps, slo_ms=slo_ms, max_batch=max_batch, max_concurrency=max_concurrency)
    assert 1 <= bounds.batch <= max_batch
    assert 1 <= bounds.concurrency <= max_concurrency


@given(st.lists(st.tuples(st.floats(-50, 100), st.integers(1, 4)), min_size=1, max_size=40), st.booleans())
def test_a_choice_takes_something_or_sheds_it_and_never_more_than_the_batch(
    waiting: list[tuple[float, int]], is_overloaded: bool
) -> None:
    waiting.sort()
    times, bounds = start(*DENSE, max_concurrency=1, cores=1), Plan(8, 1, is_overloaded=is_overloaded)
    choice = choose(waiting, times=times, bounds=bounds, running=0, free_callers=1)
    taken = [rows for _, rows in waiting[choice.shed : choice.shed + choice.count]]
    assert choice.shed + choice.count >= 1
    assert sum(taken) <= 8
    if choice.shed:  # only what no run could answer in time
        assert waiting[choice.shed - 1][0] < times.predict_ms(8)


def test_batches_form_only_for_models_that_gain_by_them() -> None:
    waiting = [(100.0, 1)] * 6
    for line, count in ((CONV, 1), (DENSE, 6)):
        times = start(*line, max_concurrency=1, cores=1)
        assert choose(waiting, times=times, bounds=Plan(8, 1), running=0, free_callers=1) == Choice(0, count)


def simulated_goodput(rate_rps: float, *, seconds: float, slo_ms: float, truth: tuple[float, float]) -> float:
    """In-time answers per second of one device that takes what ``truth`` says, under Poisson arrivals."""
    configuration = ServingConfiguration(max_batch=16, max_concurrency=1, controller=True)
    times = start(*truth, max_concurrency=1, cores=1)
    scheduler = SloScheduler(configuration, slo_ms=slo_ms, runs_at_once=1, times=times)
    rng, now_s, answered, ends_s = random.Random(5), 0.0, 0, 0.0
    queue: list[tuple[float, float]] = []
    while now_s < seconds:
        now_s += rng.expovariate(rate_rps)
        while queue and ends_s <= now_s:
            choice = scheduler.choose([((deadline - ends_s) * 1000, 1) for deadline, _ in queue], running=0)
            del queue[: choice.shed]
            taken, queue = queue[: choice.count], queue[choice.count :]
            ends_s += (truth[0] * len(taken) + truth[1]) / 1000 if taken else 0.0
            answered += sum((ends_s - arrived) * 1000 <= slo_ms for _, arrived in taken)
        if not queue:
            ends_s = max(ends_s, now_s)
        deadline = scheduler.deadline_s(now_s)
        running_ms = max(0.0, ends_s - now_s) * 1000
        if now_s + scheduler.expected_ms(rows_ahead=len(queue), rows=1, running_ms=running_ms) / 1000 <= deadline:
            heapq.heappush(queue, (deadline, now_s))
    return answered / seconds


@pytest.mark.parametrize(("line", "slo_ms"), [(CONV, 20.0), (DENSE, 15.0)])
def test_twice_the_load_that_can_be_served_does_not_lower_what_is_served_in_time(
    line: tuple[float, float], slo_ms: float
) -> None:
    capacity_rps = max(
        1000 * n / (line[0] * n + line[1]) for n in (1, 2, 4, 8) if 2 * (line[0] * n + line[1]) <= slo_ms
    )
    at_capacity, above = (
        simulated_goodput(capacity_rps * share, seconds=10, slo_ms=slo_ms, truth=line) for share in (1.0, 2.0)
    )
    assert at_capacity > 0.75 * capacity_rps
    assert above > 0.95 * at_capacity


@pytest.mark.parametrize("weather", [weather for weather in WEATHERS if weather.name in ("gusty", "slow")])
@pytest.mark.parametrize("device", [device for device in DEVICES if device.name in ("dense", "conv")])
def test_on_a_machine_that_is_slow_at_times_it_answers_what_the_best_fixed_setting_answers(
    device: Device, weather: Weather
) -> None:
    settings = oracle_settings()
    agent, *fixed = (
        sum(goodput_rps(device, weather, contender, load=0.7, seconds=0.6, seed=seed) for seed in (1, 2))
        for contender in (contenders()["agent"], *(settings[name] for name in ("b1 c2 sheds", "b8 c2 sheds")))
    )
    assert agent > 0.9 * max(fixed)  # a few hundred answers in virtual time: the same on every machine


def test_stalls_of_the_machine_do_not_make_it_believe_in_slow_runs_or_give_up_runs_at_once() -> None:
    rng, times = random.Random(4), start(*DENSE, max_concurrency=2, cores=2)
    for number in range(600):
        stall = rng.uniform(2, 6) if rng.random() < 0.2 else 1.0
        rows = 1 + number % 4
        times = times.observed(rows=rows, service_ms=stall * (0.2 * rows + 4.0), concurrency=1 + number % 2)
    assert times.predict_ms(4) == pytest.approx(4.8, rel=0.35)
    assert plan(times, rate_rps=300, slo_ms=20, max_batch=16, max_concurrency=2).concurrency == 2


def test_slow_moments_of_the_machine_are_not_blamed_on_runs_at_once() -> None:
    times = start(*DENSE, max_concurrency=2, cores=2)
    for number in range(480):
        machine = 4.0 if number % 120 >= 80 else 1.0
        concurrency = 2 if number % 8 else 1
        times = times.observed(rows=2, service_ms=machine * 4.4, concurrency=concurrency)
        if number % 120 in (79, 119):  # a moment ends: the pace follows it, and two at once stay worth it
            assert times.predict_ms(2) == pytest.approx(machine * 4.4, rel=0.25)
            assert plan(times, rate_rps=900, slo_ms=60, max_batch=16, max_concurrency=2).concurrency == 2


def test_runs_that_slow_each_other_are_told_from_a_slow_machine() -> None:
    times = start(*DENSE, max_concurrency=2, cores=2)
    for number in range(300):
        concurrency = 1 + number // 20 % 2
        times = times.observed(rows=2, service_ms=(1.9 if concurrency == 2 else 1.0) * 4.4, concurrency=concurrency)
    assert times.slowdown(2) == pytest.approx(1.9, rel=0.15)
    assert times.predict_ms(2) == pytest.approx(4.4, rel=0.15)


def test_the_arrival_rate_follows_a_step_within_seconds() -> None:
    rate, now_s = ArrivalRate(), 0.0
    for rps in (20.0, 200.0):
        for _ in range(round(3 * rps)):
            now_s += 1 / rps
            rate = rate.arrived(now_s)
        assert rate.rps(now_s) == pytest.approx(rps, rel=0.15)


def test_the_utility_has_units() -> None:
    assert utility(answered_rps=50, latency_ms=20) == pytest.approx(math.log(50 / 0.020))
    assert utility(answered_rps=0, latency_ms=20) is None


# -- in an executor ----------------------------------------------------------------------------------------------------


def controlled(folder: Path, *, slo_p95_ms: float, factor: float = 2, concurrency: int = 1) -> ServedModel:
    made = served(scaling(factor), folder, max_batch=4, max_concurrency=concurrency, slo_p95_ms=slo_p95_ms)
    return replace(made, configuration=made.configuration.model_copy(update={"controller": True}))


class Gate:
    """Holds a session's runs until it is opened."""

    def __init__(self, model: ServedModel) -> None:
        self._open, self._model = threading.Event(), model
        model.session._quota = EmulatedQuota(1e-9, sleep=lambda _: self._wait())

    def _wait(self) -> None:
        assert self._open.wait(10)

    def open(self) -> None:
        self._model.session._quota = None
        self._open.set()


def wait_until(is_so: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + 5
    while not is_so():
        assert time.monotonic() < ends_s
        time.sleep(0.002)


@pytest.fixture
def executor() -> Iterator[Executor]:
    executor = Executor("digits", queue_requests=64)
    yield executor
    executor.close()


def test_a_request_that_would_come_too_late_is_refused_at_once_and_counted_as_a_miss(
    executor: Executor, tmp_path: Path
) -> None:
    now = controlled(tmp_path, slo_p95_ms=5000)
    now.session.line = (2400.0, 0.0)
    executor.swap(now)
    gate = Gate(now)
    first = executor.submit(ROW)
    wait_until(lambda: not executor.pending)
    second = executor.submit(ROW)
    with pytest.raises(Overloaded, match=r"an answer would take about \d+ ms"):
        executor.submit(ROW)
    gate.open()
    assert [each.result(5).outputs["y"][0, 0] for each in (first, second)] == [2, 2]
    assert executor.statistics.shed_requests == 1
    assert now.account.health()[1] == 1


def test_the_patience_of_a_caller_is_a_deadline_also_without_the_controller(executor: Executor, tmp_path: Path) -> None:
    now = served(scaling(2), tmp_path)
    executor.swap(now)
    gate = Gate(now)
    first = executor.submit(ROW)
    wait_until(lambda: not executor.pending)
    hasty, patient = executor.submit(ROW, within_ms=200), executor.submit(ROW)
    time.sleep(0.25)
    gate.open()
    with pytest.raises(Overloaded):
        hasty.result(5)
    assert [each.result(5).outputs["y"][0, 0] for each in (first, patient)] == [2, 2]


@pytest.mark.parametrize(
    ("waiting", "shed", "count"),
    [
        ([(math.inf, 1)] * 6, 0, 4),  # nobody is in a hurry: the largest batch
        ([(30.0, 1)] * 6, 0, 2),  # a run of two rows takes 25 ms, of three 35 ms
        ([(12.0, 1), (16.0, 1), (100.0, 1)], 1, 1),  # the first would be late, the second in time if alone
        ([(12.0, 1)], 0, 1),  # alone, it is tried
        ([(-1.0, 1)], 1, 0),
    ],
)
def test_deadlines_that_callers_bring_are_kept_without_the_controller(
    waiting: list[tuple[float, int]], shed: int, count: int
) -> None:
    configuration = ServingConfiguration(max_batch=4, max_concurrency=1)
    times = start(10.0, 5.0, max_concurrency=1, cores=1)
    scheduler = PlainScheduler(configuration, runs_at_once=1, times=times)
    assert scheduler.choose(waiting, running=0) == Choice(shed, count)


def test_a_run_of_many_rows_is_foretold_from_runs_of_one_without_the_controller() -> None:
    configuration = ServingConfiguration(max_batch=16, max_concurrency=1)
    scheduler = PlainScheduler(configuration, runs_at_once=1, times=start(1.0, 1.0, max_concurrency=1, cores=1))
    for _ in range(200):
        scheduler.observed(rows=1, service_ms=20.0, concurrency=1)
    assert scheduler.predict_ms(1, 1) == pytest.approx(20, rel=0.2)
    assert scheduler.predict_ms(16, 1) > 100


def test_the_most_urgent_request_goes_first(executor: Executor, tmp_path: Path) -> None:
    now = served(scaling(2), tmp_path, max_batch=1)
    executor.swap(now)
    gate, order = Gate(now), list[str]()
    first = executor.submit(ROW)
    wait_until(lambda: not executor.pending)
    for name, within_ms in (("whenever", math.inf), ("soon", 5000.0)):
        future = executor.submit(ROW, within_ms=within_ms)
        future.add_done_callback(partial(_note, order, name))
    gate.open()
    first.result(5)
    wait_until(lambda: len(order) == 2)
    assert order == ["soon", "whenever"]


def _note(order: list[str], name: str, _: Future[Answer]) -> None:
    order.append(name)


def test_a_lease_tells_what_the_controller_did(executor: Executor, tmp_path: Path) -> None:
    now = controlled(tmp_path, slo_p95_ms=1000)
    executor.swap(now)
    gate = Gate(now)
    futures = [executor.submit(ROW)]
    wait_until(lambda: not executor.pending)
    futures += [executor.submit(ROW) for _ in range(5)]
    gate.open()
    for future in futures:
        future.result(5)
    components = now.account.components(time.monotonic())
    assert now.controller_version.startswith("slo-")
    assert sum(components.batch_histogram.values()) == sum(components.concurrency_histogram.values())
    assert max(map(int, components.batch_histogram)) <= 4
    control = model_statistics(executor)["slo_stats"]
    assert (control["in_time"], control["controller"]) == (6, now.controller_version)
    assert 'qoe_slo_hits_total{model="digits",version="1"} 6' in prometheus_text([executor])


def test_a_new_configuration_keeps_what_was_learnt_of_the_same_session(executor: Executor, tmp_path: Path) -> None:
    first = controlled(tmp_path, slo_p95_ms=1000)
    executor.swap(first)
    for _ in range(20):
        executor.infer(ROW)
    assert isinstance(executor.scheduler, SloScheduler)
    times = executor.scheduler.times
    executor.swap(replace(first, configuration=first.configuration.model_copy(update={"max_batch": 2})))
    assert isinstance(executor.scheduler, SloScheduler)
    assert executor.scheduler.times == times


# -- several applications ----------------------------------------------------------------------------------------------


def test_applications_share_the_threads_of_the_device(tmp_path: Path) -> None:
    budget = ThreadBudget(1)
    one, other = (Executor(name, queue_requests=64, budget=budget) for name in ("one", "other"))
    models = [served(scaling(factor), tmp_path, max_concurrency=2) for factor in (2, 3)]
    for executor, model in zip((one, other), models, strict=True):
        executor.swap(model)
    gate = Gate(models[0])
    held = one.submit(ROW)
    wait_until(lambda: not one.pending)
    waiting = [other.submit(ROW), one.submit(ROW)]
    time.sleep(0.05)
    assert not any(future.done() for future in waiting)
    gate.open()
    answers: list[Answer] = [future.result(5) for future in (held, *waiting)]
    assert [answer.outputs["y"][0, 0] for answer in answers] == [2, 3, 2]
    for executor in (one, other):
        executor.close()
    assert budget.try_take(1)


@pytest.mark.parametrize(("threads", "afterwards"), [(1, 2), (2, 1)])
def test_a_swap_while_a_caller_waits_for_threads_leaves_the_budget_whole(
    tmp_path: Path, threads: int, afterwards: int
) -> None:
    budget = ThreadBudget(2)
    assert budget.try_take(2)
    executor = Executor("digits", queue_requests=64, budget=budget)
    executor.swap(served(scaling(2), tmp_path, threads=threads))
    waiting = executor.submit(ROW)
    wait_until(partial(_are_waiting, budget, 1))
    executor.swap(served(scaling(3), tmp_path, threads=afterwards))
    budget.give_back(2)
    assert waiting.result(5).outputs["y"][0, 0] == 3
    assert executor.infer(ROW, timeout_s=5).outputs["y"][0, 0] == 3
    executor.close()
    assert budget.try_take(2)
    assert not budget.try_take(1)


def _are_waiting(budget: ThreadBudget, count: int) -> bool:
    return len(budget._waiting) == count


def test_threads_go_to_the_earliest_deadline() -> None:
    budget, order = ThreadBudget(1), list[float]()
    assert budget.try_take(1)

    def work(deadline_s: float) -> None:
        budget.take(1, deadline_s=deadline_s)
        order.append(deadline_s)
        budget.give_back(1)

    threads = [threading.Thread(target=work, args=(deadline_s,)) for deadline_s in (3.0, 1.0, 2.0)]
    for count, thread in enumerate(threads, 1):
        thread.start()
        wait_until(partial(_are_waiting, budget, count))
    budget.give_back(1)
    for thread in threads:
        thread.join(5)
    assert order == [1.0, 2.0, 3.0]
