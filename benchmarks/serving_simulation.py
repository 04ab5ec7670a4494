"""The control experiment in virtual time: the same contenders and oracle, on devices that no neighbour disturbs.

What differs from ``serving_control``: time is computed, runs take what a device says, and the machine's slow moments
are part of the experiment, the same for every contender. So it tells what the decisions are worth, not what they cost.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.serving_control import MAX_BATCH, MAX_CONCURRENCY, Contender, contenders, oracle_settings
from device_agents.scheduling import Scheduler
from device_agents.service_times import start

SLO_RUNS = 3.0
QUEUE_REQUESTS = 512
LOADS = (0.5, 0.7, 0.9, 1.0, 1.1)


@dataclass(frozen=True)
class Device:
    """A run of n rows takes ``a_ms * n + b_ms``, and ``slowdown`` times that beside another; times lognormal noise."""

    name: str
    a_ms: float
    b_ms: float
    slowdown: float
    noise: float = 0.05

    @property
    def slo_ms(self) -> float:
        """Three runs of one row."""
        return SLO_RUNS * (self.a_ms + self.b_ms)

    @property
    def capacity_rps(self) -> float:
        """The most that full batches answer."""
        return max(
            1000 * runs * rows / (self.a_ms * rows + self.b_ms) / (self.slowdown if runs > 1 else 1.0)
            for rows in (1, 4, MAX_BATCH)
            for runs in (1, MAX_CONCURRENCY)
        )


@dataclass(frozen=True)
class Weather:
    """The machine is 2 or 4 times slower for a ``share`` of the time, for ``mean_s`` each time."""

    name: str
    share: float
    mean_s: float

    def course(self, seed: int, *, seconds: float) -> tuple[list[float], list[float]]:
        """(since, factor) over time."""
        rng, now_s = random.Random(seed), 0.0
        since_s, factors = [], []
        while now_s < seconds:
            since_s.append(now_s)
            factors.append(rng.choices((1.0, 2.0, 4.0), (1 - self.share, 0.6 * self.share, 0.4 * self.share))[0])
            now_s += rng.expovariate(1 / self.mean_s)
        return since_s, factors


DEVICES = (
    Device("dense", 0.25, 2.0, 1.15),
    Device("conv", 2.2, 0.05, 1.05),
    Device("hindering", 0.25, 2.0, 1.9),
    Device("serial", 0.5, 1.0, 2.2),
    Device("jittery", 0.25, 2.0, 1.15, noise=0.4),
)
WEATHERS = (
    Weather("calm", 0.0, 1.0),
    Weather("gusty", 0.4, 0.08),
    Weather("changing", 0.4, 0.5),
    Weather("slow", 1.0, 0.08),
)


@dataclass
class _Simulation:
    """One contender on one device; follows the executor's rules."""

    device: Device
    scheduler: Scheduler
    weather: tuple[list[float], list[float]]
    rng: random.Random
    now_s: float = 0.0
    queue: list[tuple[float, int, float]] = field(default_factory=list)
    runs: list[tuple[float, int, float, float, int, list[float]]] = field(default_factory=list)
    hold_until_s: float = math.inf
    in_time: int = 0
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    def arrive(self) -> None:
        deadline_s = self.scheduler.deadline_s(self.now_s)
        if self.queue or self.runs:
            is_free = len(self.runs) < self.scheduler.concurrency()
            running_s = 0.0 if is_free else max(0.0, min(run[3] for run in self.runs) - self.now_s)
            expected_ms = self.scheduler.expected_ms(rows_ahead=len(self.queue), rows=1, running_ms=running_s * 1000)
            if self.now_s + expected_ms / 1000 > deadline_s or len(self.queue) >= QUEUE_REQUESTS:
                return
        bisect.insort(self.queue, (deadline_s, next(self.numbers), self.now_s))
        self.begin()

    def begin(self) -> None:
        """Free callers begin what the scheduler chooses."""
        self.hold_until_s = math.inf
        while self.queue and len(self.runs) < self.scheduler.concurrency():
            front = [
                ((deadline - self.now_s) * 1000, 1) for deadline, _, _ in self.queue[: self.scheduler.look_ahead()]
            ]
            choice = self.scheduler.choose(front, running=len(self.runs))
            taken = self.queue[choice.shed : choice.shed + choice.count]
            self.queue = self.queue[choice.shed + choice.count :]
            if taken:
                self._run([arrived_s for _, _, arrived_s in taken])
            elif not choice.shed:
                self.hold_until_s = self.now_s + (self.scheduler.hold_s() or math.inf)
                return

    def _run(self, arrived_s: list[float]) -> None:
        rows, concurrency = len(arrived_s), len(self.runs) + 1
        since_s, factors = self.weather
        factor = factors[bisect.bisect_right(since_s, self.now_s) - 1] * math.exp(self.rng.gauss(0, self.device.noise))
        took_ms = (self.device.a_ms * rows + self.device.b_ms) * factor * (self.device.slowdown if self.runs else 1.0)
        foretold_s = self.now_s + self.scheduler.predict_ms(rows, concurrency) / 1000
        ends_s = self.now_s + took_ms / 1000
        heapq.heappush(self.runs, (ends_s, next(self.numbers), self.now_s, foretold_s, concurrency, arrived_s))

    def end(self) -> None:
        """The first run under way ends."""
        ends_s, _, began_s, _, concurrency, arrived_s = heapq.heappop(self.runs)
        service_ms = (ends_s - began_s) * 1000
        self.scheduler.observed(rows=len(arrived_s), service_ms=service_ms, concurrency=concurrency)
        self.in_time += sum((ends_s - each) * 1000 <= self.device.slo_ms for each in arrived_s)
        self.begin()


def goodput_rps(
    device: Device, weather: Weather, contender: Contender, *, load: float, seconds: float, seed: int
) -> float:
    """Answers within the SLO per second, under Poisson arrivals at ``load`` times the calm device's capacity."""
    times = start(device.a_ms, device.b_ms, max_concurrency=MAX_CONCURRENCY, cores=MAX_CONCURRENCY)
    course, rng = weather.course(seed, seconds=2 * seconds), random.Random(seed)
    simulation = _Simulation(device, contender(times, device.slo_ms), course, random.Random(seed + 1))
    arrives_s = rng.expovariate(device.capacity_rps * load)
    while True:
        ends_s = simulation.runs[0][0] if simulation.runs else math.inf
        simulation.now_s = min(arrives_s, ends_s, simulation.hold_until_s)
        if simulation.now_s == math.inf or simulation.now_s > 2 * seconds:
            return simulation.in_time / seconds
        if simulation.now_s == ends_s:
            simulation.end()
        elif simulation.now_s == arrives_s:
            simulation.arrive()
            arrives_s += rng.expovariate(device.capacity_rps * load)
            arrives_s = arrives_s if arrives_s < seconds else math.inf
        else:
            simulation.begin()


def compare(devices: Sequence[Device], weathers: Sequence[Weather], *, seconds: float) -> dict[str, float | None]:
    """Shares of the oracle's goodput: the worst and the mean over devices, weathers and loads."""
    who, shares = {"agent": contenders()["agent"]} | oracle_settings(), []
    for device, weather in itertools.product(devices, weathers):
        found = []
        for load in LOADS:
            goodput = {
                name: goodput_rps(device, weather, contender, load=load, seconds=seconds, seed=1)
                for name, contender in who.items()
            }
            found.append(goodput.pop("agent") / max(goodput.values()))
        shares += found
        print(f"  {device.name:<10} {weather.name:<9}", *(f"{share:.3f}" for share in found), flush=True)
    return {"control_vs_oracle_simulated": min(shares), "control_vs_oracle_simulated_mean": statistics.mean(shares)}
