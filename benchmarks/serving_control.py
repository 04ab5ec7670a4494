"""Who chooses batch and concurrency best under an SLO? Every contender drives the agent's own executor and session.

In-process open-loop Poisson load on all cores. Contenders: fixed batch 1, fixed batch max, time-out batching, earliest
deadline first with the largest feasible batch (as in DeepRT), a learned per-model controller (UCB over batch x
concurrency, rewarded with the utility), the agent's controller, and the oracle: the best of all fixed settings of batch
and concurrency, each with and without shedding, found by running them all at each load. What would falsify the claim:
a load where the agent answers less than 0.95 of what the oracle answers in time.

Utility is BCEdge's ln(T / L) with T in answered requests per second and L the mean latency in seconds.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving_models import BenchmarkModel
from device_agents.control import Choice, batch_sizes, utility
from device_agents.errors import Overloaded
from device_agents.executor import Executor
from device_agents.lease import LeaseAccount
from device_agents.profiler import warm_up
from device_agents.scheduling import Scheduler, SloScheduler
from device_agents.served import ServedModel
from device_agents.service_times import ServiceTimes, start
from device_agents.wire import ServingConfiguration

MAX_BATCH, MAX_CONCURRENCY = 16, 2
FEW_MISSES = 0.05
TIMEOUT_BATCHING_MS = 2.0
FAR_S = 1e9


class Fixed:
    """One batch and one concurrency; refuses what would come too late if it ``sheds``."""

    version = "fixed"

    def __init__(self, times: ServiceTimes, *, slo_ms: float, batch: int, concurrency: int, sheds: bool) -> None:
        self.times, self._slo_ms = times, slo_ms
        self._batch, self._concurrency, self._sheds = batch, concurrency, sheds

    def deadline_s(self, now_s: float) -> float:
        return now_s + self._slo_ms / 1000 if self._sheds else now_s + FAR_S

    def expected_ms(self, *, rows_ahead: int, rows: int, running_ms: float) -> float:
        full = self.times.predict_ms(self._batch, self._concurrency)
        own = self.times.predict_ms(min(self._batch, rows_ahead + rows), self._concurrency)
        return running_ms + rows_ahead // self._batch * full / self._concurrency + own

    def concurrency(self) -> int:
        return self._concurrency

    def look_ahead(self) -> int:
        return self._batch * self._concurrency

    def choose(self, waiting: Sequence[tuple[float, int]], *, running: int) -> Choice:
        free = max(1, self._concurrency - running)
        return Choice(0, min(self._batch, math.ceil(len(waiting) / free)))

    def hold_s(self) -> float | None:
        return None

    def predict_ms(self, rows: int, concurrency: int) -> float:
        return self.times.predict_ms(rows, concurrency)

    def observed(self, *, rows: int, service_ms: float, concurrency: float) -> None:
        self.times = self.times.observed(rows=rows, service_ms=service_ms, concurrency=concurrency)


class TimeoutBatching(Fixed):
    """Waits for a full batch, or until the first request waited ``TIMEOUT_BATCHING_MS``, as Triton and MLServer do."""

    version = "time-out"

    def choose(self, waiting: Sequence[tuple[float, int]], *, running: int) -> Choice:
        del running
        waited_ms = FAR_S * 1000 - waiting[0][0]
        is_due = len(waiting) >= self._batch or waited_ms >= TIMEOUT_BATCHING_MS
        return Choice(0, min(self._batch, len(waiting)) if is_due else 0)

    def hold_s(self) -> float | None:
        return TIMEOUT_BATCHING_MS / 1000


class EarliestDeadlineFirst(Fixed):
    """The largest batch that ends before the first deadline; admission refuses what cannot be answered in time."""

    version = "edf"

    def deadline_s(self, now_s: float) -> float:
        return now_s + self._slo_ms / 1000

    def choose(self, waiting: Sequence[tuple[float, int]], *, running: int) -> Choice:
        sizes = range(min(self._batch, len(waiting)), 0, -1)
        feasible = (n for n in sizes if self.times.predict_ms(n, running + 1) <= waiting[0][0])
        return Choice(0, next(feasible, 1))


class Learned(Fixed):
    """UCB1 over all batches and concurrencies, a slot of half a second each, rewarded with the utility and SLO hits."""

    version = "learned"
    SLOT_S = 0.5

    def __init__(self, times: ServiceTimes, *, slo_ms: float) -> None:
        super().__init__(times, slo_ms=slo_ms, batch=1, concurrency=1, sheds=False)
        self._arms = [(b, c) for b in batch_sizes(MAX_BATCH) for c in range(1, MAX_CONCURRENCY + 1)]
        self._pulls: Counter[int] = Counter()
        self._sums: defaultdict[int, float] = defaultdict(float)
        self._arm, self._slot_ends_s = 0, 0.0
        self._answered = self._hits = 0
        self._latency_ms = 0.0

    def deadline_s(self, now_s: float) -> float:
        if now_s > self._slot_ends_s:
            self._next_arm(now_s)
        return super().deadline_s(now_s)

    def look_ahead(self) -> int:
        return MAX_BATCH * MAX_CONCURRENCY

    def choose(self, waiting: Sequence[tuple[float, int]], *, running: int) -> Choice:
        choice = super().choose(waiting, running=running)
        waited = [FAR_S * 1000 - slack_ms for slack_ms, _ in waiting[: choice.count]]
        took_ms = self.times.predict_ms(choice.count, running + 1)
        self._answered += len(waited)
        self._hits += sum(each + took_ms <= self._slo_ms for each in waited)
        self._latency_ms += sum(each + took_ms for each in waited)
        return choice

    def _next_arm(self, now_s: float) -> None:
        if self._answered:
            mean_ms = self._latency_ms / self._answered
            worth = utility(answered_rps=self._answered / self.SLOT_S, latency_ms=mean_ms) or 0.0
            self._pulls[self._arm] += 1
            self._sums[self._arm] += worth / 20 * self._hits / self._answered
        total = sum(self._pulls.values())
        self._arm = max(range(len(self._arms)), key=lambda arm: self._bound(arm, total))
        self._batch, self._concurrency = self._arms[self._arm]
        self._slot_ends_s = now_s + self.SLOT_S
        self._answered = self._hits = 0
        self._latency_ms = 0.0

    def _bound(self, arm: int, total: int) -> float:
        pulls = self._pulls[arm]
        return math.inf if not pulls else self._sums[arm] / pulls + 0.2 * math.sqrt(2 * math.log(total) / pulls)


@dataclass(frozen=True)
class Outcome:
    """One run of one contender."""

    goodput_rps: float
    miss_share: float
    utility: float
    mean_ms: float


Contender = Callable[[ServiceTimes, float], Scheduler]


def contenders() -> dict[str, Contender]:
    """All but the oracle, by name."""

    def fixed(batch: int) -> Contender:
        return lambda times, slo_ms: Fixed(times, slo_ms=slo_ms, batch=batch, concurrency=MAX_CONCURRENCY, sheds=False)

    def agent(times: ServiceTimes, slo_ms: float) -> Scheduler:
        configuration = ServingConfiguration(max_batch=MAX_BATCH, max_concurrency=MAX_CONCURRENCY, controller=True)
        return SloScheduler(configuration, slo_ms=slo_ms, runs_at_once=MAX_CONCURRENCY, times=times)

    bounds = {"batch": MAX_BATCH, "concurrency": MAX_CONCURRENCY}
    return {
        "agent": agent,
        "batch 1": fixed(1),
        "batch max": fixed(MAX_BATCH),
        "time-out": lambda times, slo_ms: TimeoutBatching(times, slo_ms=slo_ms, sheds=False, **bounds),
        "edf": lambda times, slo_ms: EarliestDeadlineFirst(times, slo_ms=slo_ms, sheds=True, **bounds),
        "learned": lambda times, slo_ms: Learned(times, slo_ms=slo_ms),
    }


def oracle_settings() -> dict[str, Contender]:
    """Every fixed setting, by name."""

    def setting(batch: int, concurrency: int, sheds: bool) -> Contender:
        return lambda times, slo_ms: Fixed(times, slo_ms=slo_ms, batch=batch, concurrency=concurrency, sheds=sheds)

    return {
        f"b{batch} c{concurrency}{' sheds' if sheds else ''}": setting(batch, concurrency, sheds)
        for batch in batch_sizes(MAX_BATCH)
        for concurrency in range(1, MAX_CONCURRENCY + 1)
        for sheds in (False, True)
    }


class Bench:
    """One loaded model and its SLO."""

    def __init__(self, model: BenchmarkModel, folder: Path, *, slo_runs: float) -> None:
        self._inputs = model.inputs()
        path = model.write(folder)
        self._session = warm_up(path, digest="0" * 64, threads=1, max_batch=MAX_BATCH, budget_s=0.5).session
        a_ms, b_ms = self._session.line
        self.times = start(a_ms, b_ms, max_concurrency=MAX_CONCURRENCY, cores=MAX_CONCURRENCY)
        self.slo_ms = max(4.0, slo_runs * (a_ms + b_ms))

    def capacity_rps(self) -> float:
        """The most that any fixed setting answers just now through the executor while requests always wait."""
        settings = [(batch, concurrency) for batch in (1, 4, MAX_BATCH) for concurrency in (1, MAX_CONCURRENCY)]
        return max(self._saturated_rps(batch, concurrency) for batch, concurrency in settings)

    def _saturated_rps(self, batch: int, concurrency: int, *, seconds: float = 0.4) -> float:
        executor = Executor("m", queue_requests=512)
        setting = Fixed(self.times, slo_ms=1e6, batch=batch, concurrency=concurrency, sheds=False)
        executor.swap(self._served(), scheduler=setting)
        waiting = deque(executor.submit(self._inputs) for _ in range(3 * MAX_BATCH))
        answered, ends_s = 0, time.monotonic() + seconds
        while time.monotonic() < ends_s:
            waiting.popleft().result(20)
            waiting.append(executor.submit(self._inputs))
            answered += 1
        executor.close()
        return answered / seconds

    def _served(self) -> ServedModel:
        configuration = ServingConfiguration(max_batch=MAX_BATCH, max_concurrency=MAX_CONCURRENCY, controller=True)
        account = LeaseAccount(slo_p95_ms=self.slo_ms, started_s=time.monotonic())
        return ServedModel(self._session, configuration, "0" * 64, None, account, time.monotonic())

    def run(self, contender: Contender, rates: Sequence[tuple[float, float]], *, seed: int) -> Outcome:
        """Runs one contender under (seconds, rate) after (seconds, rate), Poisson arrivals."""
        executor = Executor("m", queue_requests=512)
        executor.swap(self._served(), scheduler=contender(self.times, self.slo_ms))
        latencies, refused = self._offer(executor, rates, seed=seed)
        executor.close()
        seconds = sum(duration for duration, _ in rates)
        hits = sum(latency <= self.slo_ms for latency in latencies)
        mean_ms = statistics.mean(latencies) if latencies else math.inf
        worth = utility(answered_rps=len(latencies) / seconds, latency_ms=mean_ms)
        asked = max(1, len(latencies) + refused)
        return Outcome(hits / seconds, 1 - hits / asked, -math.inf if worth is None else worth, mean_ms)

    def _offer(self, executor: Executor, rates: Sequence[tuple[float, float]], *, seed: int) -> tuple[list[float], int]:
        rng, refused, futures = random.Random(seed), 0, []
        due_s = ends_s = time.monotonic()
        for duration_s, rate_rps in rates:
            ends_s += duration_s
            while (due_s := due_s + rng.expovariate(rate_rps)) < ends_s:
                if (wait_s := due_s - time.monotonic()) > 0:
                    time.sleep(wait_s)
                try:
                    futures.append(executor.submit(self._inputs))
                except Overloaded:
                    refused += 1
            due_s = ends_s
        latencies = []
        for future in futures:
            try:
                latencies.append(future.result(20).cost.latency_ms)
            except Overloaded:
                refused += 1
        return latencies, refused


def _mean(outcomes: Sequence[Outcome]) -> Outcome:
    return Outcome(*(statistics.mean(values) for values in zip(*map(dataclasses.astuple, outcomes), strict=True)))


def compare(
    models: Sequence[BenchmarkModel], folder: Path, *, loads: Sequence[float], seconds: float, rounds: int
) -> dict[str, float | None]:
    """The worst share of the oracle's goodput over loads and models, and the worst against the best baseline's step.

    ``control_miss_share`` is the agent's worst where the oracle misses at most ``FEW_MISSES``; None if it nowhere does.
    """
    at_loads, against_baseline = [], []
    for model in models:
        bench = Bench(model, folder, slo_runs=3.0)
        print(f"{model.name}: SLO {bench.slo_ms:.1f} ms")
        for load in loads:
            at_loads.append(_at_load(bench, load, seconds=seconds, rounds=rounds))
        against_baseline.append(_over_step(bench, seconds=seconds, rounds=rounds))
    return {
        "control_vs_oracle": min((agent.goodput_rps / oracle.goodput_rps for agent, oracle in at_loads), default=None),
        "control_miss_share": worst_miss_share(at_loads),
        "control_vs_best_baseline": min(against_baseline) if against_baseline else None,
    }


def worst_miss_share(at_loads: Sequence[tuple[Outcome, Outcome]]) -> float | None:
    """The agent's largest share of misses at those loads where the oracle, the second of each pair, misses few."""
    return max((agent.miss_share for agent, oracle in at_loads if oracle.miss_share <= FEW_MISSES), default=None)


def _at_load(bench: Bench, load: float, *, seconds: float, rounds: int) -> tuple[Outcome, Outcome]:
    """The agent and the oracle: one pass over its settings, then its best three again beside the contenders, in turns.

    The capacity is measured anew: a load that was a share of what another moment allowed would be another load. Of the
    three, the oracle is who was best in the other rounds than those that count: the best of noisy numbers flatters.
    """
    capacity_rps, settings = bench.capacity_rps(), oracle_settings()
    rate_rps = capacity_rps * load
    first = {name: bench.run(setting, [(seconds / 2, rate_rps)], seed=0) for name, setting in settings.items()}
    best = sorted(first, key=lambda name: first[name].goodput_rps)[-3:]
    turns = _in_turns(bench, contenders() | {name: settings[name] for name in best}, [(seconds, rate_rps)], rounds)
    oracle = _mean([each for part in (0, 1) for each in _best_by_others(turns, best, part)])
    found = {name: _mean(turns[name]) for name in contenders()} | {"oracle": oracle}
    _show(f"load {load:.1f} of {capacity_rps:.0f}/s", found)
    return found["agent"], oracle


def _best_by_others(turns: Mapping[str, Sequence[Outcome]], names: Sequence[str], part: int) -> Sequence[Outcome]:
    """The even or odd rounds of who was best in the others; a single round must tell both."""
    others = {name: turns[name][1 - part :: 2] or turns[name] for name in names}
    return turns[max(names, key=lambda name: _mean(others[name]).goodput_rps)][part::2]


def _over_step(bench: Bench, *, seconds: float, rounds: int) -> float:
    """Low, then just above capacity, then middling: goodput against the best baseline."""
    capacity_rps = bench.capacity_rps()
    rates = [(seconds, capacity_rps * share) for share in (0.3, 1.05, 0.6)]
    found = {name: _mean(each) for name, each in _in_turns(bench, contenders(), rates, rounds).items()}
    _show("rate step", found)
    return found["agent"].goodput_rps / max(each.goodput_rps for name, each in found.items() if name != "agent")


def _show(what: str, found: dict[str, Outcome]) -> None:
    for name, outcome in found.items():
        print(
            f"  {what} {name:<22} goodput {outcome.goodput_rps:8.1f}/s  miss {outcome.miss_share:.3f}"
            f"  utility {outcome.utility:5.2f}  mean {outcome.mean_ms:6.1f} ms",
            flush=True,
        )


def _in_turns(
    bench: Bench, who: dict[str, Contender], rates: Sequence[tuple[float, float]], rounds: int
) -> dict[str, list[Outcome]]:
    """Many short rounds of all contenders, back and forth: slow moments of the machine hit all alike."""
    found: dict[str, list[Outcome]] = {name: [] for name in who}
    for number in range(rounds):
        for name in list(who) if number % 2 else reversed(list(who)):
            found[name].append(bench.run(who[name], rates, seed=1 + number))
    return found
