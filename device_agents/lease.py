"""Accounting of one lease: every request that a decision served, folded into Components. Also the arrival rate."""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

from device_agents.wire import Components

BUCKET_GROWTH = 1.02
LOG_GROWTH = math.log(BUCKET_GROWTH)
SMALLEST_MS = 0.01
LEASE_ID_PREFIX = "lease-"
FOLD_EVERY = 64  # runs: their cost is counted together, when the code for it is in the processor's cache


class Answered(NamedTuple):
    """What one request cost. All times in milliseconds; ``cpu_ms`` is its share of the run it was part of."""

    latency_ms: float
    queue_ms: float
    service_ms: float
    batch_rows: int
    cpu_ms: float


class Histogram:
    """Latencies in buckets that are 2 % wide: constant memory, quantiles within 1 %."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self.count = 0

    def add(self, value_ms: float) -> None:
        """Counts one value."""
        self._counts[round(math.log(max(value_ms, SMALLEST_MS) / SMALLEST_MS) / LOG_GROWTH)] += 1
        self.count += 1

    def quantile(self, share: float) -> float | None:
        """The value that ``share`` of all values do not exceed; None when there are none."""
        rank = math.ceil(share * self.count)
        for bucket in sorted(self._counts):
            rank -= self._counts[bucket]
            if rank <= 0:
                return float(SMALLEST_MS * BUCKET_GROWTH**bucket)
        return None


class _Ended(NamedTuple):
    pieces: Sequence[tuple[int, float]]
    answers: Sequence[Answered]
    concurrency: int


class LeaseAccount:
    """Requests served under one decision, from its first moment of serving until it is closed.

    ``clock_s`` values are monotonic seconds and come in as arguments. A closed account counts nothing more.
    """

    def __init__(self, *, slo_p95_ms: float, started_s: float) -> None:
        self._lock = threading.Lock()
        self._slo_ms = slo_p95_ms
        self._started_s = started_s
        self._closed_s: float | None = None
        self._latencies = Histogram()
        self._hits = 0
        self._errors = 0
        self._cpu_ms = 0.0
        self._service_ms = 0.0
        self._rows = 0
        self._batches: Counter[int] = Counter()
        self._concurrency: Counter[int] = Counter()
        self._unfolded: deque[_Ended] = deque()

    def ended(self, pieces: Sequence[tuple[int, float]], answers: Sequence[Answered], *, concurrency: int) -> None:
        """Counts one run, (rows, milliseconds) of each piece that the runtime ran, and the answers that came of it.

        ``concurrency`` runs were under way when it began.
        """
        self._unfolded.append(_Ended(pieces, answers, concurrency))
        if len(self._unfolded) >= FOLD_EVERY:
            with self._lock:
                self._fold()

    def _fold(self) -> None:
        while self._unfolded:
            ended = self._unfolded.popleft()
            if self._closed_s is not None:
                continue
            for rows, service_ms in ended.pieces:
                self._batches[rows] += 1
                self._concurrency[ended.concurrency] += 1
                self._rows += rows
                self._service_ms += service_ms
            for answer in ended.answers:
                self._latencies.add(answer.latency_ms)
                self._hits += answer.latency_ms <= self._slo_ms
                self._cpu_ms += answer.cpu_ms

    def failed(self) -> None:
        """Counts a request that was shed or failed through no fault of its sender. It missed the SLO."""
        with self._lock:
            if self._closed_s is None:
                self._errors += 1

    def close(self, clock_s: float) -> bool:
        """Ends the lease; False when it was already over."""
        with self._lock:
            self._fold()
            if self._closed_s is not None:
                return False
            self._closed_s = clock_s
            return True

    @property
    def slo_ms(self) -> float:
        """The latency that 95 of 100 requests should stay below."""
        return self._slo_ms

    @property
    def is_closed(self) -> bool:
        """Whether the lease is over."""
        return self._closed_s is not None

    def active_s(self, clock_s: float) -> float:
        """Seconds of serving so far."""
        return max(0.0, (clock_s if self._closed_s is None else self._closed_s) - self._started_s)

    def health(self) -> tuple[int, int, float | None]:
        """Requests, errors among them, and the p95 latency: what a health gate judges."""
        with self._lock:
            self._fold()
            return self._latencies.count + self._errors, self._errors, self._latencies.quantile(0.95)

    def components(self, clock_s: float) -> Components:
        """The lease in the words of the wire. A lease without requests has counts only."""
        active_s = self.active_s(clock_s)
        with self._lock:
            self._fold()
            answered, runs = self._latencies.count, self._batches.total()
            requests = answered + self._errors
            return Components(
                requests=requests,
                errors=self._errors,
                p50_ms=self._latencies.quantile(0.5),
                p95_ms=self._latencies.quantile(0.95),
                p99_ms=self._latencies.quantile(0.99),
                slo_hit_share=self._hits / requests if requests else None,
                throughput_rps=answered / active_s if active_s > 0 else None,
                cpu_ms_per_request=self._cpu_ms / answered if answered else None,
                service_ms=self._service_ms / runs if runs else None,
                batch_mean=self._rows / runs if runs else None,
                batch_histogram=_top(self._batches),
                concurrency_histogram=_top(self._concurrency),
            )


class ArrivalMeter:
    """Requests per second over the last ten seconds, shed ones included."""

    WINDOW_S = 10

    def __init__(self, started_s: float) -> None:
        self._seconds: deque[tuple[int, int]] = deque(maxlen=self.WINDOW_S + 1)
        self._started_s = started_s

    def arrived(self, clock_s: float) -> None:
        """Counts one arrival. Callers hold the executor's lock."""
        second = int(clock_s)
        if self._seconds and self._seconds[-1][0] == second:
            self._seconds[-1] = (second, self._seconds[-1][1] + 1)
        else:
            self._seconds.append((second, 1))

    def rate_rps(self, clock_s: float) -> float:
        """The rate now; before the first ten seconds are over, the rate since the start."""
        since_s = max(float(math.ceil(clock_s - self.WINDOW_S)), self._started_s)
        count = sum(count for second, count in list(self._seconds) if second >= math.floor(since_s))
        return count / max(1.0, clock_s - since_s)


def _top(counts: Counter[int]) -> dict[str, int]:
    """The wire carries at most 64 bars; the rarest go."""
    return {str(size): count for size, count in sorted(counts.most_common(64))}
