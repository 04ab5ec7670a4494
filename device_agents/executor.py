"""Runs one model's requests: a bounded queue, callers that batch, and a served variant that can be exchanged.

One executor per application. What to serve is decided elsewhere; which requests go next is the scheduler's business,
how requests arrive the server's.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np

from device_agents.admission import check_inputs
from device_agents.batching import Shape, chunks, join, join_key, part, rows_of
from device_agents.budget import ThreadBudget
from device_agents.control import CONTROLLER_VERSION
from device_agents.errors import BadRequest, Overloaded, RunFailed
from device_agents.lease import Answered, ArrivalMeter, LeaseAccount
from device_agents.runtime import Array, RunCost, Session
from device_agents.scheduling import Scheduler, scheduler_for
from device_agents.statistics import Statistics
from device_agents.wire import ServingConfiguration

logger = logging.getLogger("qoe_agent.executor")


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A loaded variant under one decision: what a request is answered by, and whom it is accounted to."""

    session: Session
    configuration: ServingConfiguration
    digest: str
    decision_id: str | None
    account: LeaseAccount
    started_s: float
    lease_s: float = math.inf

    @property
    def controller_version(self) -> str:
        """Which controller moves inside the configuration's bounds; empty where it is off."""
        return CONTROLLER_VERSION if self.configuration.controller else ""


@dataclass(frozen=True)
class Answer:
    """Outputs of one request, the model that made them, and what it cost."""

    outputs: dict[str, Array]
    served: ServedModel
    cost: Answered


@dataclass(frozen=True, eq=False)
class _Waiting:
    inputs: Mapping[str, Array]
    session: Session
    rows: int
    key: Shape
    arrived_s: float
    deadline_s: float
    future: Future[Answer] = field(default_factory=Future)


@dataclass(frozen=True, eq=False)
class _Run:
    """Requests that run together; ``concurrency`` counts the runs under way when it began, itself included."""

    served: ServedModel
    requests: list[_Waiting]
    concurrency: int
    ends_s: float


class Executor:
    """Serves one model name. Thread-safe; idle callers sleep on a condition and cost nothing.

    ``budget`` is the device's, shared by all executors that must not oversubscribe it; without one, the executor has
    the device for itself.
    """

    def __init__(self, model_name: str, *, queue_requests: int, budget: ThreadBudget | None = None) -> None:
        self.model_name = model_name
        self.statistics = Statistics()
        self.budget = budget or ThreadBudget()
        self._queue_requests = queue_requests
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._served: ServedModel | None = None
        self._scheduler: Scheduler | None = None
        self._runs: dict[ServedModel, list[_Run]] = {}
        self._busy = 0  # runs under way, and callers that wait for threads
        self._callers: dict[int, threading.Thread] = {}
        self._is_closed = False
        self._arrivals = ArrivalMeter(time.monotonic())

    # -- for apps ----------------------------------------------------------------------------------------------

    @property
    def served(self) -> ServedModel | None:
        """What answers requests now."""
        return self._served

    @property
    def scheduler(self) -> Scheduler | None:
        """What chooses the runs of the served model."""
        return self._scheduler

    def submit(
        self, inputs: Mapping[str, Array], *, within_ms: float = math.inf, own_thread_ms: float = 0.0
    ) -> Future[Answer]:
        """Queues one request. ``within_ms`` is the caller's patience, beside the SLO of the decision.

        A run that is expected to take at most ``own_thread_ms`` is done in the calling thread if nothing stands in its
        way, which saves two changes of threads; the future is done then. Raises BadRequest, or Overloaded at once
        rather than letting it wait in vain. A request that can no longer be answered in time is shed later too: its
        future then raises Overloaded.
        """
        run = None
        with self._changed:
            waiting = self._admitted(inputs, within_ms)
            if own_thread_ms and not self._queue:
                run = self._begin_at_once(waiting, own_thread_ms)
            if run is None:
                self._enqueue(waiting)
                self._changed.notify()
        if run is not None:
            self._work(run)
        return waiting.future

    def infer(
        self, inputs: Mapping[str, Array], *, timeout_s: float | None = None, within_ms: float = math.inf
    ) -> Answer:
        """Answers one request: the Python interface for apps in this process. Raises what ``submit`` does.

        With a ``timeout_s`` it never runs in the calling thread, which could not be called back from it.
        """
        own_thread_ms = math.inf if timeout_s is None else 0.0
        return self.submit(inputs, within_ms=within_ms, own_thread_ms=own_thread_ms).result(timeout_s)

    def arrival_rate_rps(self) -> float:
        """Requests per second lately, shed ones included."""
        with self._changed:
            return self._arrivals.rate_rps(time.monotonic())

    @property
    def pending(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def unanswered(self) -> int:
        """Requests that wait, or that the served model runs."""
        with self._changed:
            runs = self._runs.get(self._served, []) if self._served else []
            return len(self._queue) + sum(len(run.requests) for run in runs)

    def _admitted(self, inputs: Mapping[str, Array], within_ms: float) -> _Waiting:
        now_s = time.monotonic()
        self._arrivals.arrived(now_s)
        served, scheduler = self._served, self._scheduler
        if served is None or scheduler is None or self._is_closed:
            self.statistics.failed("REJECTED")
            raise Overloaded(f"model {self.model_name} is not ready")
        rows = check_inputs(inputs, served.session)
        deadline_s = min(scheduler.deadline_s(now_s), now_s + within_ms / 1000.0)
        if self._queue or self._busy:
            self._refuse_in_vain(served, scheduler, rows=rows, now_s=now_s, deadline_s=deadline_s)
        return _Waiting(
            inputs=inputs,
            session=served.session,
            rows=rows,
            key=_key(inputs, served.session),
            arrived_s=now_s,
            deadline_s=deadline_s,
        )

    def _refuse_in_vain(
        self, served: ServedModel, scheduler: Scheduler, *, rows: int, now_s: float, deadline_s: float
    ) -> None:
        waits = len(self._queue)
        if deadline_s == math.inf and waits < self._queue_requests:
            return
        expected_ms = scheduler.expected_ms(
            rows_ahead=sum(waiting.rows for waiting in self._queue),
            rows=rows,
            running_ms=self._running_ms(now_s),
        )
        if waits >= self._queue_requests:
            self._shed(served)
            raise Overloaded(f"{waits} requests are waiting", retry_after_s=max(1.0, expected_ms / 1000))
        if now_s + expected_ms / 1000 > deadline_s:
            self._shed(served)
            late = f"{waits} requests are waiting: an answer would take about {expected_ms:.0f} ms"
            raise Overloaded(f"{late}, {(deadline_s - now_s) * 1000:.0f} ms are left", retry_after_s=1.0)

    def _running_ms(self, now_s: float) -> float:
        """What the first of the runs under way still needs; nothing while a caller is free."""
        assert self._scheduler is not None
        if self._busy < self._scheduler.concurrency():
            return 0.0
        ends = [run.ends_s for runs in self._runs.values() for run in runs]
        return max(0.0, min(ends, default=now_s) - now_s) * 1000

    def _enqueue(self, waiting: _Waiting) -> None:
        """In the order of deadlines; equal ones in the order of arrival."""
        if not self._queue or self._queue[-1].deadline_s <= waiting.deadline_s:
            self._queue.append(waiting)
        else:
            self._queue.insert(bisect.bisect_right(self._queue, waiting.deadline_s, key=_deadline_s), waiting)

    def _shed(self, served: ServedModel) -> None:
        self.statistics.shed(time.monotonic())
        served.account.failed()

    # -- for the follower ----------------------------------------------------------------------------------------

    def swap(
        self, served: ServedModel, *, gives_up_old: bool = False, scheduler: Scheduler | None = None
    ) -> ServedModel | None:
        """Exchanges one reference. Runs under way end on the old model; every later run is the new one's.

        Requests that wait are the new model's: those that do not fit it fail with BadRequest. ``gives_up_old`` is for a
        model that hangs: its runs fail at once, and callers that are stuck in it are replaced. ``scheduler`` replaces
        the one that the configuration asks for.
        """
        with self._changed:
            old, self._served = self._served, served
            self._scheduler = scheduler or self._scheduler_for(served, old)
            given_up = self._give_up(old) if gives_up_old and old is not None else []
            misfits = self._refit(served.session)
            for index in range(served.configuration.max_concurrency):
                if index not in self._callers:
                    self._callers[index] = threading.Thread(
                        target=self._call, args=(index,), name=f"{self.model_name}-{index}", daemon=True
                    )
                    self._callers[index].start()
            self._changed.notify_all()
        for waiting, error in misfits:
            served.account.failed()
            self.statistics.failed("OTHER")
            waiting.future.set_exception(error)
        self._fail(given_up, RunFailed("the model hung and was replaced"))
        return old

    def _scheduler_for(self, served: ServedModel, old: ServedModel | None) -> Scheduler:
        return scheduler_for(
            served.session,
            served.configuration,
            slo_ms=served.account.slo_ms,
            runs_at_once=self.budget.runs_at_once(served.session.threads),
            before=self._scheduler if old is not None and old.session is served.session else None,
        )

    def _refit(self, session: Session) -> list[tuple[_Waiting, BadRequest]]:
        """Counts the rows of what waits by the session that will run it; returns what does not fit."""
        fitting: deque[_Waiting] = deque()
        misfits: list[tuple[_Waiting, BadRequest]] = []
        for waiting in self._queue:
            try:
                fitting.append(_fitted(waiting, session))
            except BadRequest as error:
                if waiting.future.set_running_or_notify_cancel():
                    misfits.append((waiting, BadRequest(f"the model changed while this request waited: {error}")))
        self._queue = fitting
        return misfits

    def _give_up(self, served: ServedModel) -> list[_Waiting]:
        runs = self._runs.pop(served, [])
        if runs:
            self._callers.clear()  # those that are not stuck see that they were replaced, and end
        for _ in runs:
            self._end_run(served)
        return [waiting for run in runs for waiting in run.requests]

    def wait_until_idle(self, served: ServedModel, *, timeout_s: float) -> bool:
        """Waits for the runs of a replaced model to end."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._runs.get(served), timeout_s)

    def close(self, *, timeout_s: float = 10.0) -> None:
        """Takes no more requests, answers those that wait, and ends."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            callers = list(self._callers.values())
        for caller in callers:
            caller.join(timeout_s)

    # -- callers -------------------------------------------------------------------------------------------------

    def _call(self, index: int) -> None:
        while self._wait_for_work(index):
            run, shed = self._next_run()
            for waiting in shed:
                self._fail_late(waiting)
            if run is not None:
                self._work(run)

    def _wait_for_work(self, index: int) -> bool:
        """Sleeps until there is a run to begin, and takes the threads for it; False when this caller is to end."""
        with self._changed:
            while not self._is_over(index):
                served, scheduler = self._served, self._scheduler
                assert served is not None
                assert scheduler is not None
                if self._queue and self._busy < scheduler.concurrency():
                    self._busy += 1
                    threads, urgent_s = served.session.threads, self._urgent_s(served)
                    break
                self._changed.wait()
            else:
                if self._callers.get(index) is threading.current_thread():
                    del self._callers[index]
                self._changed.notify()  # a surplus caller may have been the one that a new request woke
                return False
        self.budget.take(threads, deadline_s=urgent_s)
        return True

    def _urgent_s(self, served: ServedModel) -> float:
        """By when the first request should be answered, also where nothing is shed for being late."""
        first = self._queue[0]
        return min(first.deadline_s, first.arrived_s + served.account.slo_ms / 1000)

    def _is_over(self, index: int) -> bool:
        return self._is_surplus(index) or (self._is_closed and not self._queue)

    def _next_run(self) -> tuple[_Run | None, list[_Waiting]]:
        """What to run with the threads that were taken, and what it is too late for. Gives them back for nothing."""
        with self._changed:
            served, scheduler = self._served, self._scheduler
            assert served is not None
            assert scheduler is not None
            now_s = time.monotonic()
            front = list(itertools.islice(self._queue, scheduler.look_ahead()))
            waiting = [((each.deadline_s - now_s) * 1000, each.rows) for each in front]
            choice = scheduler.choose(waiting, running=self._busy - 1) if waiting else None
            shed = [self._queue.popleft() for _ in range(choice.shed)] if choice else []
            requests = self._joinable(choice.count, served) if choice else []
            if requests:
                return self._begun(served, requests, now_s), shed
            self._end_run(served)
            if choice is not None and not choice.count and not shed:
                self._changed.wait(scheduler.hold_s())
            return None, shed

    def _joinable(self, count: int, served: ServedModel) -> list[_Waiting]:
        """Up to ``count`` requests from the front that can run together; what was given up is left out."""
        taken: list[_Waiting] = []
        for _ in range(min(count, len(self._queue)) if served.session.is_batchable else min(count, 1)):
            if taken and self._queue[0].key != taken[0].key:
                break
            taken.append(self._queue.popleft())
        return [waiting for waiting in taken if waiting.future.set_running_or_notify_cancel()]

    def _begin_at_once(self, waiting: _Waiting, own_thread_ms: float) -> _Run | None:
        """A run for the calling thread, if it is known to be short enough and a caller's place and threads are free."""
        served, scheduler = self._served, self._scheduler
        assert served is not None
        assert scheduler is not None
        expected_ms = scheduler.predict_ms(waiting.rows, self._busy + 1)
        if own_thread_ms < math.inf and not 0 < expected_ms <= own_thread_ms:
            return None
        if self._busy >= scheduler.concurrency() or not self.budget.try_take(served.session.threads):
            return None
        self._busy += 1
        waiting.future.set_running_or_notify_cancel()
        return self._begun(served, [waiting], waiting.arrived_s)

    def _begun(self, served: ServedModel, requests: list[_Waiting], now_s: float) -> _Run:
        assert self._scheduler is not None
        rows = sum(waiting.rows for waiting in requests)
        ends_s = now_s + self._scheduler.predict_ms(rows, self._busy) / 1000
        run = _Run(served=served, requests=requests, concurrency=self._busy, ends_s=ends_s)
        self._runs.setdefault(served, []).append(run)
        return run

    def _end_run(self, served: ServedModel) -> None:
        self._busy -= 1
        self.budget.give_back(served.session.threads)

    def _work(self, run: _Run) -> None:
        try:
            self._serve(run, run.requests)
        except Exception as error:
            # The top of a caller's loop: it must live on, and nobody may wait for ever.
            logger.exception("run failed model=%s digest=%.12s", self.model_name, run.served.digest)
            failed = self._fail(run.requests, RunFailed(f"internal error: {type(error).__name__}"))
            for _ in range(failed):
                run.served.account.failed()
        finally:
            self._finish(run)

    def _finish(self, run: _Run) -> None:
        with self._changed:
            runs = self._runs.get(run.served, [])
            if run not in runs:  # it was given up, and its threads with it
                return
            runs.remove(run)
            self._end_run(run.served)
            if not runs:
                del self._runs[run.served]
                if run.served is not self._served:
                    self._changed.notify_all()
                    return
            if self._queue and threading.current_thread() not in self._callers.values():
                self._changed.notify()  # a caller would go on by itself

    def _is_surplus(self, index: int) -> bool:
        if self._callers.get(index) is not threading.current_thread():
            return True
        return self._served is None or index >= self._served.configuration.max_concurrency

    def _fail(self, requests: Sequence[_Waiting], error: RunFailed) -> int:
        unanswered = [waiting for waiting in requests if not waiting.future.done()]
        for waiting in unanswered:
            self.statistics.failed("BACKEND")
            waiting.future.set_exception(error)
        return len(unanswered)

    def _fail_late(self, waiting: _Waiting) -> None:
        if waiting.future.set_running_or_notify_cancel():
            if self._served is not None:
                self._shed(self._served)
            waiting.future.set_exception(Overloaded("no run could end in time for this request"))

    def _serve(self, run: _Run, requests: list[_Waiting]) -> None:
        served = run.served
        started_s = time.monotonic()
        try:
            outputs, cost = self._run(run, requests)
        except RunFailed as error:
            self._recover(run, requests, error)
            return
        finished_s, wall_s = time.monotonic(), time.time()
        rows = sum(waiting.rows for waiting in requests)
        for waiting, own in zip(requests, outputs, strict=True):
            answered = Answered(
                latency_ms=(finished_s - waiting.arrived_s) * 1000,
                queue_ms=(started_s - waiting.arrived_s) * 1000,
                service_ms=cost.service_ms,
                batch_rows=rows,
                cpu_ms=cost.cpu_ms * waiting.rows / rows,
            )
            served.account.answered(answered)
            self.statistics.answered(
                latency_ms=answered.latency_ms,
                queue_ms=answered.queue_ms,
                service_ms=answered.service_ms,
                is_in_time=answered.latency_ms <= served.account.slo_ms,
                now_s=finished_s,
                wall_clock_s=wall_s,
            )
            waiting.future.set_result(Answer(outputs=own, served=served, cost=answered))

    def _run(self, run: _Run, requests: list[_Waiting]) -> tuple[list[dict[str, Array]], RunCost]:
        served, scheduler = run.served, self._scheduler
        joined = join([waiting.inputs for waiting in requests])
        rows = sum(waiting.rows for waiting in requests)
        max_batch = served.configuration.max_batch if served.session.is_batchable else rows
        collected, service_ms, cpu_ms = [], 0.0, 0.0
        for inputs in chunks(joined, rows=rows, max_batch=max_batch):
            outputs, cost = served.session.run(inputs)
            size = rows_of(inputs) if served.session.is_batchable else 1
            served.account.ran(rows=size, concurrency=run.concurrency, service_ms=cost.service_ms)
            self.statistics.ran(rows=size, cost=cost)
            if scheduler is not None and served is self._served:
                scheduler.observed(rows=size, service_ms=cost.service_ms, concurrency=run.concurrency)
            collected.append(outputs)
            service_ms, cpu_ms = service_ms + cost.service_ms, cpu_ms + cost.cpu_ms
        whole = collected[0] if len(collected) == 1 else _concatenated(collected)
        return part(whole, [waiting.rows for waiting in requests]), RunCost(service_ms=service_ms, cpu_ms=cpu_ms)

    def _recover(self, run: _Run, requests: list[_Waiting], error: RunFailed) -> None:
        """One bad request must not fail those it was joined with: each gets a run of its own."""
        if len(requests) > 1:
            for waiting in requests:
                self._serve(run, [waiting])
            return
        run.served.account.failed()
        self.statistics.failed("BACKEND")
        requests[0].future.set_exception(error)


def _deadline_s(waiting: _Waiting) -> float:
    return waiting.deadline_s


def _key(inputs: Mapping[str, Array], session: Session) -> Shape:
    return join_key(inputs) if session.is_batchable else ()


def _fitted(waiting: _Waiting, session: Session) -> _Waiting:
    if waiting.session is session:
        return waiting
    rows = check_inputs(waiting.inputs, session)
    return replace(waiting, session=session, rows=rows, key=_key(waiting.inputs, session))


def _concatenated(collected: list[dict[str, Array]]) -> dict[str, Array]:
    return {name: np.concatenate([outputs[name] for outputs in collected]) for name in collected[0]}
