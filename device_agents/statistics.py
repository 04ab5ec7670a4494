"""Cumulative counts of one model since the agent started, as the /stats and /metrics endpoints show them."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from device_agents.runtime import RunCost


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

    def ran(self, *, rows: int, cost: RunCost) -> None:
        """Counts one run."""
        with self.lock:
            self.runs += 1
            self.inferences += rows
            self.batches[rows].add(cost.service_ms)
            self.cpu_ms += cost.cpu_ms

    def answered(self, *, latency_ms: float, queue_ms: float, service_ms: float, wall_clock_s: float) -> None:
        """Counts one answered request."""
        with self.lock:
            self.success.add(latency_ms)
            self.queue.add(queue_ms)
            self.infer.add(service_ms)
            self.last_inference_ms = round(wall_clock_s * 1000)

    def failed(self, reason: str) -> None:
        """Counts one failed request under one of Triton's reasons: REJECTED, CANCELED, BACKEND or OTHER."""
        with self.lock:
            self.failures[reason] += 1
