"""What an executor asks before each run: who goes next, and how many at once. One scheduler per served model.

``PlainScheduler`` does exactly what the configuration says; ``SloScheduler`` holds the state around ``control``'s
arithmetic and moves inside the configuration's bounds. Executors call both under their lock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from device_agents.batching import count_to_join, share_of_queue
from device_agents.control import (
    CONTROLLER_VERSION,
    ArrivalRate,
    Choice,
    Plan,
    choose,
    deadline_s,
    expected_ms,
    plan,
)
from device_agents.runtime import SAMPLED, SHORT_MS, Session
from device_agents.service_times import ServiceTimes, start
from device_agents.wire import ServingConfiguration

PLAN_EVERY_S = 0.2
LOOK_AHEAD = 4  # batches of the queue that a choice looks at


class Scheduler(Protocol):
    """Times are monotonic seconds. ``waiting`` is (slack in ms, rows) of the requests in front, the first first."""

    version: str

    def deadline_s(self, now_s: float) -> float:
        """By when a request that comes now should be answered."""

    def expected_ms(self, *, rows_ahead: int, rows: int, running_ms: float) -> float:
        """When it would be answered, from now; a request that would come too late is shed at once."""

    def concurrency(self) -> int:
        """How many runs may be under way."""

    def look_ahead(self) -> int:
        """How many waiting requests a choice wants to see."""

    def choose(self, waiting: Sequence[tuple[float, int]], *, running: int) -> Choice:
        """The next run; a count of zero looks again when something changed, or after ``hold_s``."""

    def hold_s(self) -> float | None:
        """After what time a scheduler that chose nothing wants to be asked again."""

    def predict_ms(self, rows: int, concurrency: int) -> float:
        """How long a run is expected to take; zero when nothing is known."""

    def observed(self, *, rows: int, service_ms: float, concurrency: float) -> None:
        """One run has ended, beside which ``concurrency - 1`` others were under way on the mean."""


class PlainScheduler:
    """The configuration as it stands: in order of arrival, an even share for each free caller, no deadlines but those
    that callers bring."""

    version = ""

    def __init__(self, configuration: ServingConfiguration, *, runs_at_once: int, times: ServiceTimes) -> None:
        self._most_at_once = min(configuration.max_concurrency, runs_at_once)
        self._bounds = Plan(configuration.max_batch, self._most_at_once)
        self._learner = _Learner(times)

    @property
    def times(self) -> ServiceTimes:
        """What was learnt of the session."""
        return self._learner.times

    def deadline_s(self, now_s: float) -> float:
        """None but the caller's own."""
        del now_s
        return math.inf

    def expected_ms(self, *, rows_ahead: int, rows: int, running_ms: float) -> float:
        """By the lines that were learnt."""
        return expected_ms(self.times, self._bounds, rows_ahead=rows_ahead, rows=rows, running_ms=running_ms)

    def concurrency(self) -> int:
        """As configured, as far as the device has threads."""
        return self._most_at_once

    def look_ahead(self) -> int:
        """Enough for all callers."""
        return self._bounds.batch * self._most_at_once

    def choose(self, waiting: Sequence[tuple[float, int]], *, running: int) -> Choice:
        """An even share of what can still be answered in time, and no more than lets the most urgent be in time.

        One that waits alone is given up when its time is over, not when that is expected: so what to expect is learnt.
        """
        late = 0
        while late < len(waiting):
            slack_ms, rows = waiting[late]
            if slack_ms > 0 and (len(waiting) == 1 or slack_ms >= self.predict_ms(rows, running + 1)):
                break
            late += 1
        sizes = [rows for _, rows in waiting[late:]]
        free_callers = self._most_at_once - running
        room = share_of_queue(waiting_rows=sum(sizes), free_callers=free_callers, max_batch=self._bounds.batch)
        count = count_to_join(sizes, limit_rows=room)
        while count > 1 and waiting[late][0] < self.predict_ms(sum(sizes[:count]), running + 1):
            count -= 1
        return Choice(late, count)

    def hold_s(self) -> float | None:
        """It never waits for more."""
        return None

    def predict_ms(self, rows: int, concurrency: int) -> float:
        """By the lines that were learnt."""
        return self.times.predict_ms(rows, concurrency)

    def observed(self, *, rows: int, service_ms: float, concurrency: float) -> None:
        """Learns from one run."""
        self._learner.observed(rows=rows, service_ms=service_ms, concurrency=concurrency)


class _Learner:
    """Service times that follow the runs: one in ``SAMPLED`` where learning would cost more than the run."""

    def __init__(self, times: ServiceTimes) -> None:
        self.times = times
        self._runs = 0

    def observed(self, *, rows: int, service_ms: float, concurrency: float) -> None:
        self._runs += 1
        if service_ms < SHORT_MS and self._runs % SAMPLED:
            return
        self.times = self.times.observed(rows=rows, service_ms=service_ms, concurrency=concurrency)


class SloScheduler:
    """Batch and concurrency by what is learnt of this device, the arrival rate, and the SLO."""

    version = CONTROLLER_VERSION

    def __init__(
        self,
        configuration: ServingConfiguration,
        *,
        slo_ms: float,
        runs_at_once: int,
        times: ServiceTimes,
    ) -> None:
        self._configuration = configuration
        self._slo_ms = slo_ms
        self._most_at_once = min(configuration.max_concurrency, runs_at_once)
        self._rate = ArrivalRate()
        self._planned_s = -math.inf
        self._learner = _Learner(times)
        self.bounds = Plan(configuration.max_batch, self._most_at_once)

    @property
    def times(self) -> ServiceTimes:
        """What was learnt of the session."""
        return self._learner.times

    def deadline_s(self, now_s: float) -> float:
        """The SLO; also where the arrival rate is counted and, a few times a second, the bounds are planned anew."""
        self._rate = self._rate.arrived(now_s)
        if now_s - self._planned_s > PLAN_EVERY_S:
            self._planned_s = now_s
            self.bounds = plan(
                self.times,
                rate_rps=self._rate.rps(now_s),
                slo_ms=self._slo_ms,
                max_batch=self._configuration.max_batch,
                max_concurrency=self._most_at_once,
            )
        return deadline_s(self.times, arrived_s=now_s, slo_ms=self._slo_ms)

    def expected_ms(self, *, rows_ahead: int, rows: int, running_ms: float) -> float:
        """By the lines that were learnt."""
        return expected_ms(self.times, self.bounds, rows_ahead=rows_ahead, rows=rows, running_ms=running_ms)

    def concurrency(self) -> int:
        """As planned."""
        return self.bounds.concurrency

    def look_ahead(self) -> int:
        """A few batches for each caller."""
        return LOOK_AHEAD * self.bounds.batch * self.bounds.concurrency

    def choose(self, waiting: Sequence[tuple[float, int]], *, running: int) -> Choice:
        """What ``control.choose`` says."""
        free = max(1, self.bounds.concurrency - running)
        return choose(waiting, times=self.times, bounds=self.bounds, running=running, free_callers=free)

    def hold_s(self) -> float | None:
        """It never waits for more."""
        return None

    def predict_ms(self, rows: int, concurrency: int) -> float:
        """By the lines that were learnt."""
        return self.times.predict_ms(rows, concurrency)

    def observed(self, *, rows: int, service_ms: float, concurrency: float) -> None:
        """Learns from one run."""
        self._learner.observed(rows=rows, service_ms=service_ms, concurrency=concurrency)


def scheduler_for(
    session: Session,
    configuration: ServingConfiguration,
    *,
    slo_ms: float,
    runs_at_once: int,
    before: Scheduler | None = None,
) -> Scheduler:
    """The scheduler that a configuration asks for. ``before`` ran the same session: what it learnt stays known."""
    if (
        isinstance(before, PlainScheduler | SloScheduler)
        and len(before.times.cores_slowdown) == configuration.max_concurrency
    ):
        times = before.times
    else:
        a_ms, b_ms = session.line
        times = start(
            a_ms,
            b_ms,
            max_concurrency=configuration.max_concurrency,
            cores=runs_at_once * session.threads,
            threads=session.threads,
        )
    if not configuration.controller:
        return PlainScheduler(configuration, runs_at_once=runs_at_once, times=times)
    return SloScheduler(configuration, slo_ms=slo_ms, runs_at_once=runs_at_once, times=times)
