"""Serves one model name: admits requests, gives waiting ones to callers, and exchanges what answers them.

One executor per application. What to serve is decided elsewhere; which requests go next is the scheduler's business,
how requests arrive the server's, how a run answers them that of ``runs``.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial

from device_agents.admission import Admission, refusal
from device_agents.budget import ThreadBudget
from device_agents.errors import Overloaded, RunFailed
from device_agents.lease import ArrivalMeter
from device_agents.runs import Run
from device_agents.runtime import Array
from device_agents.scheduling import Scheduler, scheduler_for
from device_agents.served import Answer, ServedModel
from device_agents.statistics import Statistics
from device_agents.waiting import Waiting, WaitingQueue

logger = logging.getLogger("qoe_agent.executor")


class Executor:
    """Serves one model name. Thread-safe; idle callers sleep on a condition and cost nothing.

    ``budget`` is the device's, shared by all executors that must not oversubscribe it; without one, the executor has
    the device for itself.
    """

    def __init__(self, model_name: str, *, queue_requests: int, budget: ThreadBudget | None = None) -> None:
        self.model_name = model_name
        self._statistics = Statistics()
        self.budget = budget or ThreadBudget()
        self._queue_requests = queue_requests
        self._queue = WaitingQueue()
        self._lock = threading.RLock()  # entered by itself, which runs no Python code, unlike by its condition
        self._changed = threading.Condition(self._lock)
        self._served: ServedModel | None = None
        self._scheduler: Scheduler | None = None
        self._admission: Admission | None = None
        self._runs: dict[ServedModel, list[Run]] = {}
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

    def submit(self, inputs: Mapping[str, Array], *, within_ms: float = math.inf) -> Future[Answer]:
        """Queues one request. ``within_ms`` is the caller's patience, beside the SLO of the decision.

        Raises BadRequest, or Overloaded at once rather than letting it wait in vain. A request that can no longer be
        answered in time is shed later too: its future then raises Overloaded.
        """
        waiting = self._checked(inputs, within_ms)
        with self._lock:
            self._admit(waiting)
            future = self._queue.add(waiting)
            self._changed.notify()
        return future

    def answer_or_submit(
        self, inputs: Mapping[str, Array], *, within_ms: float = math.inf, own_thread_ms: float = math.inf
    ) -> Answer | Future[Answer]:
        """Answers in the calling thread if nothing stands in the way, which saves two changes of threads.

        A run that is expected to take longer than ``own_thread_ms`` is queued as ``submit`` does. Raises what it does,
        and RunFailed.
        """
        waiting = self._checked(inputs, within_ms)
        with self._lock:
            self._admit(waiting)
            run = None if self._queue else self._begin_at_once(waiting, own_thread_ms)
            if run is None:
                future = self._queue.add(waiting)
                self._changed.notify()
                return future
        self._work(run)
        if isinstance(waiting.result, Exception):
            raise waiting.result
        assert waiting.result is not None
        return waiting.result

    def infer(
        self, inputs: Mapping[str, Array], *, timeout_s: float | None = None, within_ms: float = math.inf
    ) -> Answer:
        """Answers one request: the Python interface for apps in this process. Raises what ``submit`` does.

        With a ``timeout_s`` it never runs in the calling thread, which could not be called back from it.
        """
        if timeout_s is not None:
            return self.submit(inputs, within_ms=within_ms).result(timeout_s)
        answer = self.answer_or_submit(inputs, within_ms=within_ms)
        return answer.result() if isinstance(answer, Future) else answer

    @property
    def statistics(self) -> Statistics:
        """Counts so far."""
        self._statistics.fold()
        return self._statistics

    def arrival_rate_rps(self) -> float:
        """Requests per second lately, shed ones included."""
        with self._lock:
            return self._arrivals.rate_rps(time.monotonic())

    @property
    def pending(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def unanswered(self) -> int:
        """Requests that wait, or that the served model runs."""
        with self._lock:
            runs = self._runs.get(self._served, []) if self._served else []
            return len(self._queue) + sum(len(run.requests) for run in runs)

    def _checked(self, inputs: Mapping[str, Array], within_ms: float) -> Waiting:
        """The request, as what is served now counts its rows."""
        admission, now_s = self._admission, time.monotonic()
        if admission is None:
            raise self._not_ready()
        return Waiting(inputs, admission, admission.rows(inputs), now_s, now_s + within_ms / 1000.0)

    def _admit(self, waiting: Waiting) -> None:
        """Gives it its deadline, or refuses it."""
        now_s = waiting.arrived_s
        self._arrivals.arrived(now_s)
        served, scheduler, admission = self._served, self._scheduler, self._admission
        if served is None or scheduler is None or admission is None or self._is_closed:
            raise self._not_ready()
        waiting.refit(admission)  # which may have changed just now
        waiting.deadline_s = min(scheduler.deadline_s(now_s), waiting.deadline_s)
        if self._queue or self._busy:
            refused = refusal(
                scheduler,
                waits=len(self._queue),
                most=self._queue_requests,
                rows_ahead=self._queue.rows,
                rows=waiting.rows,
                left_ms=(waiting.deadline_s - now_s) * 1000,
                running_ms=partial(self._running_ms, scheduler, now_s),
            )
            if refused is not None:
                self._shed(served)
                raise refused

    def _not_ready(self) -> Overloaded:
        self._statistics.failed("REJECTED")
        return Overloaded(f"model {self.model_name} is not ready")

    def _running_ms(self, scheduler: Scheduler, now_s: float) -> float:
        """What the first of the runs under way still needs; nothing while a caller is free."""
        if self._busy < scheduler.concurrency():
            return 0.0
        ends = [run.ends_s for runs in self._runs.values() for run in runs]
        return max(0.0, min(ends, default=now_s) - now_s) * 1000

    def _shed(self, served: ServedModel) -> None:
        self._statistics.shed(time.monotonic())
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
        with self._lock:
            old, self._served = self._served, served
            self._scheduler = scheduler or self._scheduler_for(served, old)
            given_up = self._give_up(old) if gives_up_old and old is not None else []
            if self._admission is None or self._admission.session is not served.session:
                self._admission = Admission(served.session)
            misfits = self._queue.refit(self._admission)
            for index in range(served.configuration.max_concurrency):
                if index not in self._callers:
                    self._callers[index] = threading.Thread(
                        target=self._call, args=(index,), name=f"{self.model_name}-{index}", daemon=True
                    )
                    self._callers[index].start()
            self._changed.notify_all()
        for waiting, error in misfits:
            served.account.failed()
            self._statistics.failed("OTHER")
            waiting.end(error)
        for run in given_up:
            run.fail(RunFailed("the model hung and was replaced"), self._statistics)
        return old

    def _scheduler_for(self, served: ServedModel, old: ServedModel | None) -> Scheduler:
        return scheduler_for(
            served.session,
            served.configuration,
            slo_ms=served.account.slo_ms,
            runs_at_once=self.budget.runs_at_once(served.session.threads),
            before=self._scheduler if old is not None and old.session is served.session else None,
        )

    def _give_up(self, served: ServedModel) -> list[Run]:
        runs = self._runs.pop(served, [])
        if runs:
            self._callers.clear()  # those that are not stuck see that they were replaced, and end
        for _ in runs:
            self._end_run(served.session.threads)
        return runs

    def wait_until_idle(self, served: ServedModel, *, timeout_s: float) -> bool:
        """Waits for the runs of a replaced model to end."""
        with self._lock:
            return self._changed.wait_for(lambda: not self._runs.get(served), timeout_s)

    def close(self, *, timeout_s: float = 10.0) -> None:
        """Takes no more requests, answers those that wait, and ends."""
        with self._lock:
            self._is_closed = True
            self._changed.notify_all()
            callers = list(self._callers.values())
        for caller in callers:
            caller.join(timeout_s)

    # -- callers -------------------------------------------------------------------------------------------------

    def _call(self, index: int) -> None:
        while threads := self._wait_for_work(index):
            run, shed = self._next_run(threads)
            for waiting in shed:
                self._fail_late(waiting)
            if run is not None:
                self._work(run)

    def _wait_for_work(self, index: int) -> int:
        """Sleeps until there is a run to begin and takes the threads for it: how many; 0 when this caller is to end."""
        with self._lock:
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
                return 0
        self.budget.take(threads, deadline_s=urgent_s)
        return threads

    def _urgent_s(self, served: ServedModel) -> float:
        """By when the first request should be answered, also where nothing is shed for being late."""
        first = self._queue.first
        return min(first.deadline_s, first.arrived_s + served.account.slo_ms / 1000)

    def _is_over(self, index: int) -> bool:
        return self._is_surplus(index) or (self._is_closed and not self._queue)

    def _next_run(self, threads: int) -> tuple[Run | None, list[Waiting]]:
        """What to run with the threads that were taken, and what it is too late for. Gives them back for nothing."""
        with self._lock:
            served, scheduler = self._served, self._scheduler
            assert served is not None
            assert scheduler is not None
            if served.session.threads != threads:  # exchanged while this caller waited for them
                self._end_run(threads)
                return None, []
            now_s = time.monotonic()
            waiting = self._queue.front(scheduler.look_ahead(), now_s=now_s)
            choice = scheduler.choose(waiting, running=self._busy - 1) if waiting else None
            shed = self._queue.take(choice.shed) if choice else []
            requests = self._queue.take_joinable(choice.count) if choice else []
            if requests:
                return self._begun(served, scheduler, requests, now_s), shed
            self._end_run(threads)
            if choice is not None and not choice.count and not shed:
                self._changed.wait(scheduler.hold_s())
            return None, shed

    def _begin_at_once(self, waiting: Waiting, own_thread_ms: float) -> Run | None:
        """A run for the calling thread, if it is known to be short enough and a caller's place and threads are free."""
        served, scheduler = self._served, self._scheduler
        assert served is not None
        assert scheduler is not None
        if own_thread_ms < math.inf and not 0 < scheduler.predict_ms(waiting.rows, self._busy + 1) <= own_thread_ms:
            return None
        if self._busy >= scheduler.concurrency() or not self.budget.try_take(served.session.threads):
            return None
        self._busy += 1
        return self._begun(served, scheduler, (waiting,), waiting.arrived_s)

    def _begun(self, served: ServedModel, scheduler: Scheduler, requests: Sequence[Waiting], now_s: float) -> Run:
        rows = sum([waiting.rows for waiting in requests])
        ends_s = now_s + scheduler.predict_ms(rows, self._busy) / 1000
        run = Run(served=served, requests=requests, concurrency=self._busy, ends_s=ends_s)
        self._runs.setdefault(served, []).append(run)
        return run

    def _end_run(self, threads: int) -> None:
        self._busy -= 1
        self.budget.give_back(threads)

    def _work(self, run: Run) -> None:
        try:
            run.serve(self._statistics, self._observed)
        except Exception as error:
            # The top of a caller's loop: it must live on, and nobody may wait for ever.
            logger.exception("run failed model=%s digest=%.12s", self.model_name, run.served.digest)
            failed = run.fail(RunFailed(f"internal error: {type(error).__name__}"), self._statistics)
            for _ in range(failed):
                run.served.account.failed()
        finally:
            self._finish(run)

    def _observed(self, run: Run, rows: int, service_ms: float) -> None:
        """The scheduler learns from what the runtime ran, beside how many others on the mean."""
        scheduler = self._scheduler
        if scheduler is not None and run.served is self._served:
            concurrency = (run.concurrency + max(1, self._busy)) / 2
            scheduler.observed(rows=rows, service_ms=service_ms, concurrency=concurrency)

    def _finish(self, run: Run) -> None:
        with self._lock:
            runs = self._runs.get(run.served, [])
            if run not in runs:  # it was given up, and its threads with it
                return
            runs.remove(run)
            self._end_run(run.served.session.threads)
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

    def _fail_late(self, waiting: Waiting) -> None:
        if not waiting.is_given_up():
            if self._served is not None:
                self._shed(self._served)
            waiting.end(Overloaded("no run could end in time for this request"))
