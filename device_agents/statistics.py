"""Cumulative counts of one model since the agent started, as the /stats and /metrics endpoints show them."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from device_agents.control import utility
from device_agents.lease import FOLD_EVERY, Answered

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


class _Ended(NamedTuple):
    pieces: Sequence[tuple[int, float]]
    answers: Sequence[Answered]
    cpu_ms: float
    slo_ms: float
    now_s: float


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
    _unfolded: deque[_Ended] = field(default_factory=deque)
    _seconds: deque[_Second] = field(default_factory=lambda: deque(maxlen=WINDOW_S + 2))

    def ended(
        self,
        pieces: Sequence[tuple[int, float]],
        answers: Sequence[Answered],
        *,
        cpu_ms: float,
        slo_ms: float,
        now_s: float,
    ) -> None:
        """Counts one run that ended at ``now_s`` of the monotonic clock: (rows, milliseconds) of each piece that the
        runtime ran, and the answers that came of it."""
        self._unfolded.append(_Ended(pieces, answers, cpu_ms, slo_ms, now_s))
        if len(self._unfolded) >= FOLD_EVERY:
            self.fold()

    def fold(self) -> None:
        """Counts what has ended so far: to be called before the counts are read."""
        with self.lock:
            epoch_s = time.time() - time.monotonic()
            while self._unfolded:
                ended = self._unfolded.popleft()
                self._count(ended)
                self.last_inference_ms = round((epoch_s + ended.now_s) * 1000)

    def _count(self, ended: _Ended) -> None:
        self.runs += len(ended.pieces)
        self.cpu_ms += ended.cpu_ms
        for rows, service_ms in ended.pieces:
            self.inferences += rows
            self.batches[rows].add(service_ms)
        second = self._second(ended.now_s)
        second.answered += len(ended.answers)
        for answer in ended.answers:
            self.success.add(answer.latency_ms)
            self.queue.add(answer.queue_ms)
            self.infer.add(answer.service_ms)
            second.latency_ms += answer.latency_ms
            if answer.latency_ms <= ended.slo_ms:
                self.in_time += 1
                second.in_time += 1
            else:
                self.late += 1
                second.missed += 1

    def shed(self, now_s: float) -> None:
        """Counts one request that was refused rather than answered too late."""
        self.fold()
        with self.lock:
            self.failures["REJECTED"] += 1
            self.shed_requests += 1
            self._second(now_s).missed += 1

    def lately(self, now_s: float) -> Lately:
        """The last ten full seconds."""
        self.fold()
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
