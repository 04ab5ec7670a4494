"""Which requests run next, and how many at once, so that most of them meet the SLO. Pure arithmetic on frozen values.

Two loops. The fast one (``choose``) looks at what waits whenever a caller is free: it takes the batch that answers most
requests in time and, among those, answers soonest. The slow one (``plan``) looks at the arrival rate a few times a
second: it bounds batch and concurrency by what the SLO allows, and knows when there is more to do than can be done.
Both predict a run of n rows as ``a*n + b``, learnt from every run. Dropping the head of the queue where it would make
every batch small follows Nexus (SOSP 2019); the bounds inside which all this moves are the service's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from device_agents.batching import count_to_join
from device_agents.service_times import ServiceTimes

CONTROLLER_VERSION = "slo-2"

WORTHWHILE_GAIN = 1.05  # of throughput, for one more run at once
BUSY_SHARE = 0.85  # of its capacity, up to which a plan is called enough
HOPELESS_RUNS = 1.0  # an SLO below this many runs of one row cannot be planned for: the device does what it can
RATE_WINDOW_S = 1.0


@dataclass(frozen=True, slots=True)
class ArrivalRate:
    """Arrivals per second, of which each counts less by e with every second that passed since."""

    weight: float = 0.0
    at_s: float = 0.0

    def arrived(self, now_s: float, rows: int = 1) -> ArrivalRate:
        """With one more arrival of ``rows`` rows."""
        return ArrivalRate(self.weight * math.exp((self.at_s - now_s) / RATE_WINDOW_S) + rows, now_s)

    def rps(self, now_s: float) -> float:
        """The rate now."""
        return self.weight * math.exp((self.at_s - now_s) / RATE_WINDOW_S) / RATE_WINDOW_S


@dataclass(frozen=True, slots=True)
class Plan:
    """Bounds that the controller sets itself: never above the service's. ``rate_rps`` is the most it can serve."""

    batch: int
    concurrency: int
    capacity_rps: float = math.inf
    is_overloaded: bool = False


def plan(times: ServiceTimes, *, rate_rps: float, slo_ms: float, max_batch: int, max_concurrency: int) -> Plan:
    """The bounds for the next moments at ``rate_rps`` rows per second.

    A concurrency is good for what full batches of the best size answer, times how likely they end within the SLO. Taken
    is the one that answers most of what arrives, and among equals the one that answers soonest. It goes by the typical
    pace: by the time that a momentary one has changed the plan, the moment is over. The batch is the fast loop's alone.

    >>> from device_agents.service_times import start
    >>> dense = start(0.2, 4.0, max_concurrency=2, cores=2)
    >>> plan(dense, rate_rps=900, slo_ms=20, max_batch=16, max_concurrency=2)
    Plan(batch=16, concurrency=2, capacity_rps=4444.4..., is_overloaded=False)
    """
    typical, found = replace(times, pace=1.0), []
    for concurrency in range(1, _worthwhile_concurrency(typical, max_concurrency) + 1):
        capacity_rps = max(_useful_rps(typical, batch, concurrency, slo_ms) for batch in batch_sizes(max_batch))
        load = min(1.0, rate_rps / max(capacity_rps, 1e-6))
        answered = min(rate_rps, BUSY_SHARE * capacity_rps)
        # A wait grows with the load and shrinks with the callers; runs slow each other only as often as they meet.
        slower = 1.0 + load * (typical.slowdown(concurrency) - 1.0)
        found.append((answered, -slower * (1.0 + load / concurrency), Plan(max_batch, concurrency, capacity_rps)))
    _, _, best = max(found, key=lambda each: each[:2])
    return replace(best, is_overloaded=rate_rps > BUSY_SHARE * best.capacity_rps)


def _useful_rps(times: ServiceTimes, batch: int, concurrency: int, slo_ms: float) -> float:
    """Rows per second that full batches answer in time, by how likely a run of uncertain length is to."""
    run_ms = max(times.predict_ms(batch, concurrency), 1e-6)
    return 1000.0 * concurrency * batch / run_ms * max(_likelihood(slo_ms, run_ms, times.spread), 1e-6 / batch)


def _likelihood(left_ms: float, run_ms: float, spread: float) -> float:
    """That a run ends within ``left_ms`` when the logarithm of its time is normal around the prediction's."""
    return 0.5 * math.erfc(math.log(run_ms / left_ms) / (spread * math.sqrt(2.0))) if left_ms > 0 else 0.0


def batch_sizes(largest: int) -> list[int]:
    """Batches worth looking at: the powers of two, and the largest.

    >>> batch_sizes(12)
    [1, 2, 4, 8, 12]
    """
    return [*(1 << power for power in range((largest - 1).bit_length())), largest]


def deadline_s(times: ServiceTimes, *, arrived_s: float, slo_ms: float) -> float:
    """By when a request should be answered: an SLO that no run can meet gives way to what the device can do."""
    return arrived_s + max(slo_ms, HOPELESS_RUNS * times.typical_ms(1)) / 1000.0


def expected_ms(times: ServiceTimes, bounds: Plan, *, rows_ahead: int, rows: int, running_ms: float) -> float:
    """When a request of ``rows`` that comes now would be answered, by the rows that wait before it.

    ``running_ms`` is what the runs under way still need, the first of them to end. Batches are of the best size.
    """
    slower = times.predict_ms(1, bounds.concurrency) / max(times.predict_ms(1), 1e-9)
    soonest = math.inf
    for batch in batch_sizes(min(bounds.batch, rows_ahead + rows)):
        run_ms = times.predict_ms(batch) * slower
        soonest = min(soonest, run_ms * (rows_ahead // batch / bounds.concurrency + 1.0))
    return running_ms + soonest


@dataclass(frozen=True, slots=True)
class Choice:
    """Of the requests that wait, in order: how many to shed, and how many of the next to run together."""

    shed: int
    count: int


def choose(
    waiting: Sequence[tuple[float, int]], *, times: ServiceTimes, bounds: Plan, running: int, free_callers: int
) -> Choice:
    """The next run of a free caller. ``waiting`` holds (slack in ms, rows) of each request, the most urgent first.

    ``running`` runs are under way elsewhere; ``free_callers`` (this one included) may begin one now. Nothing is held
    back in order to fill a batch. Where all can be answered in time, the batch is the one that answers soonest on the
    mean: all at once for a model that gains by batching, one by one for a model that does not.

    >>> from device_agents.service_times import start
    >>> conv, dense = (start(a, b, max_concurrency=1, cores=1) for a, b in ((4.0, 0.1), (0.2, 4.0)))
    >>> bounds = Plan(batch=8, concurrency=1)
    >>> choose([(50.0, 1)] * 4, times=conv, bounds=bounds, running=0, free_callers=1)
    Choice(shed=0, count=1)
    >>> choose([(50.0, 1)] * 4, times=dense, bounds=bounds, running=0, free_callers=1)
    Choice(shed=0, count=4)
    >>> choose([(4.3, 1)] + [(6.0, 1)] * 8, times=dense, bounds=bounds, running=0, free_callers=1)
    Choice(shed=1, count=8)
    """
    if len(waiting) == 1:
        return Choice(0, 1)
    rows = sum(size for _, size in waiting)
    concurrency = min(running + free_callers, bounds.concurrency)
    spread = max(1, free_callers)
    options = []
    for batch in batch_sizes(min(bounds.batch, -(-rows // spread))):
        run_ms = times.predict_ms(batch, concurrency)
        rounds = -(-rows // (batch * spread))
        options.append((run_ms * (rounds + 1) / 2, batch, run_ms))
    _, batch, run_ms = min(options)
    if not _all_in_time(waiting, batch * spread, run_ms, times.tail):
        _, _, batch, run_ms = max((_in_time(waiting, b * spread, ms), -mean, b, ms) for mean, b, ms in options)
    return _taken(waiting, batch=batch, run_ms=run_ms, is_overloaded=bounds.is_overloaded)


def _all_in_time(waiting: Sequence[tuple[float, int]], rows_per_round: int, run_ms: float, tail: float) -> bool:
    """Whether rounds of that many rows answer everything in time, the most urgent first."""
    ends_ms, room = run_ms, rows_per_round
    for slack_ms, rows in waiting:
        if rows > room and room < rows_per_round:
            ends_ms, room = ends_ms + run_ms, rows_per_round
        room -= rows
        if slack_ms < ends_ms * tail:
            return False
    return True


def _in_time(waiting: Sequence[tuple[float, int]], rows_per_round: int, run_ms: float) -> int:
    """How many rows such rounds answer in time when what cannot be is left out."""
    ends_ms, room, answered = run_ms, rows_per_round, 0
    for slack_ms, rows in waiting:
        if slack_ms < ends_ms:
            continue
        if rows > room and room < rows_per_round:
            ends_ms, room = ends_ms + run_ms, rows_per_round
            if slack_ms < ends_ms:
                continue
        room -= rows
        answered += rows
    return answered


def _taken(waiting: Sequence[tuple[float, int]], *, batch: int, run_ms: float, is_overloaded: bool) -> Choice:
    """The first requests that fit the batch. The head is shed only where what comes behind it is answered instead."""
    sizes = [rows for _, rows in waiting]
    whole = count_to_join(sizes, limit_rows=batch)
    late = next((index for index, (slack_ms, _) in enumerate(waiting) if slack_ms >= run_ms), None)
    if late is None:  # late is better than never, unless there is more to do than can be done
        late = next((i for i, (slack_ms, _) in enumerate(waiting) if slack_ms > -run_ms), 0) if is_overloaded else 0
    elif whole == len(waiting) or (waiting[late][0] >= 2 * run_ms and not is_overloaded):
        late = 0
    return Choice(late, count_to_join(sizes[late:], limit_rows=batch))


def _worthwhile_concurrency(times: ServiceTimes, max_concurrency: int) -> int:
    """As many runs at once as throughput grows by."""
    concurrency = 1
    for more in range(2, max_concurrency + 1):
        if more / times.slowdown(more) < WORTHWHILE_GAIN * concurrency / times.slowdown(concurrency):
            break
        concurrency = more
    return concurrency


def utility(*, answered_rps: float, latency_ms: float) -> float | None:
    """BCEdge's utility ``ln(T / L)``: T in requests per second, L the mean latency in seconds; None without traffic.

    >>> utility(answered_rps=100.0, latency_ms=10.0) == math.log(100.0 / 0.010)
    True
    """
    return math.log(answered_rps * 1000.0 / latency_ms) if answered_rps > 0 and latency_ms > 0 else None
