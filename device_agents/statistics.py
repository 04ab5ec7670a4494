"""Cumulative counts of one model since the agent started, as the /stats and /metrics endpoints show them."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

from device_agents.control import utility
from device_agents.runtime import RunCost

WINDOW_S = 10


@dataclass
class Duration:
    """How often, and how long in all, in nanoseconds: the pair that Triton's statistics are made of."""

    count: int = 0
    ns: int = 0

    def add(self, milliseconds: float, count: int = 1) -> None:
        """Counts ``count`` events that took ``milliseconds`` together."""
        self.count += count
        self.ns += round(milliseconds * 1e6)


@dataclass
class _Second:
    """What ended in one second of the monotonic clock."""

    second: int
    answered: int = 0
    in_time: int = 0
    missed: int = 0
    latency_ms: float = 0.0


@dataclass(frozen=True)
class Lately:
    """The last ten full seconds: what the controller is for. Rates per second; no utility without traffic."""

    goodput_rps: float
    throughput_rps: float
    miss_share: float
    utility: float | None


@dataclass
class Statistics:
    """Counts of one model. Only ever grow, over all variants that it had."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    inferences: int = 0
    runs: int = 0
    success: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    infer: Duration = field(default_factory=Duration)
    failures: Counter[str] = field(default_factory=Counter)
    batches: defaultdict[int, Duration] = field(default_factory=lambda: defaultdict(Duration))
    last_inference_ms: int = 0
    cpu_ms: float = 0.0
    in_time: int = 0
    late: int = 0
    shed_requests: int = 0
    _seconds: deque[_Second] = field(default_factory=lambda: deque(maxlen=WINDOW_S + 2))

    def ran(self, *, rows: int, cost: RunCost) -> None:
        """Counts one run."""
        with self.lock:
            self.runs += 1
            self.inferences += rows
            self.batches[rows].add(cost.service_ms)
            self.cpu_ms += cost.cpu_ms

    def answered(
        self,
        *,
        latency_ms: float,
        queue_ms: float,
        service_ms: float,
        is_in_time: bool,
        now_s: float,
        wall_clock_s: float,
    ) -> None:
        """Counts one answered request."""
        with self.lock:
            self.success.add(latency_ms)
            self.queue.add(queue_ms)
            self.infer.add(service_ms)
            self.last_inference_ms = round(wall_clock_s * 1000)
            second = self._second(now_s)
            second.answered += 1
            second.latency_ms += latency_ms
            if is_in_time:
                self.in_time += 1
                second.in_time += 1
            else:
                self.late += 1
                second.missed += 1

    def shed(self, now_s: float) -> None:
        """Counts one request that was refused rather than answered too late."""
        with self.lock:
            self.failures["REJECTED"] += 1
            self.shed_requests += 1
            self._second(now_s).missed += 1

    def lately(self, now_s: float) -> Lately:
        """The last ten full seconds."""
        with self.lock:
            seconds = [each for each in self._seconds if int(now_s) - WINDOW_S <= each.second < int(now_s)]
        answered, in_time = sum(each.answered for each in seconds), sum(each.in_time for each in seconds)
        missed = sum(each.missed for each in seconds)
        mean_ms = sum(each.latency_ms for each in seconds) / answered if answered else 0.0
        return Lately(
            goodput_rps=in_time / WINDOW_S,
            throughput_rps=answered / WINDOW_S,
            miss_share=missed / (in_time + missed) if in_time + missed else 0.0,
            utility=utility(answered_rps=answered / WINDOW_S, latency_ms=mean_ms),
        )

    def _second(self, now_s: float) -> _Second:
        if not self._seconds or self._seconds[-1].second < int(now_s):
            self._seconds.append(_Second(int(now_s)))
        return self._seconds[-1]

    def failed(self, reason: str) -> None:
        """Counts one failed request under one of Triton's reasons: REJECTED, CANCELED, BACKEND or OTHER."""
        with self.lock:
            self.failures[reason] += 1
