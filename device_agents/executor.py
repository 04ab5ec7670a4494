"""Runs one model's requests: a bounded queue, callers that batch, and a served variant that can be exchanged.

One executor per application. What to serve is decided elsewhere; how requests arrive is the server's business.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np

from device_agents.batching import (
    Shape,
    chunks,
    count_to_join,
    join,
    join_key,
    part,
    rows_of,
    share_of_queue,
)
from device_agents.errors import BadRequest, Overloaded, RunFailed
from device_agents.lease import Answered, ArrivalMeter, LeaseAccount
from device_agents.runtime import Array, RunCost, Session
from device_agents.statistics import Statistics
from device_agents.wire import ServingConfiguration

logger = logging.getLogger("qoe_agent.executor")

LARGEST_REQUEST_ROWS = 1024


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
    future: Future[Answer] = field(default_factory=Future)


class Executor:
    """Serves one model name. Thread-safe; idle callers sleep on a condition and cost nothing."""

    def __init__(self, model_name: str, *, queue_requests: int) -> None:
        self.model_name = model_name
        self.statistics = Statistics()
        self._queue_requests = queue_requests
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._served: ServedModel | None = None
        self._in_flight: dict[ServedModel, list[list[_Waiting]]] = {}
        self._callers: dict[int, threading.Thread] = {}
        self._is_closed = False
        self._run_ms = 1.0
        self._arrivals = ArrivalMeter(time.monotonic())

    # -- for apps ----------------------------------------------------------------------------------------------

    @property
    def served(self) -> ServedModel | None:
        """What answers requests now."""
        return self._served

    def submit(self, inputs: Mapping[str, Array]) -> Future[Answer]:
        """Queues one request. Raises BadRequest, or Overloaded at once rather than letting it wait in vain."""
        now_s = time.monotonic()
        with self._changed:
            self._arrivals.arrived(now_s)
            served = self._served
            if served is None or self._is_closed:
                self.statistics.failed("REJECTED")
                raise Overloaded(f"model {self.model_name} is not ready")
            rows = check_inputs(inputs, served.session)
            if len(self._queue) >= self._queue_requests:
                self.statistics.failed("REJECTED")
                served.account.failed()
                raise Overloaded(f"{len(self._queue)} requests are waiting", retry_after_s=self._drained_in_s(served))
            waiting = _Waiting(
                inputs=inputs, session=served.session, rows=rows, key=_key(inputs, served.session), arrived_s=now_s
            )
            self._queue.append(waiting)
            self._changed.notify()
        return waiting.future

    def infer(self, inputs: Mapping[str, Array], *, timeout_s: float | None = None) -> Answer:
        """Answers one request in the calling thread's time: the Python interface for apps in this process."""
        return self.submit(inputs).result(timeout_s)

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
            batches = self._in_flight.get(self._served, []) if self._served else []
            return len(self._queue) + sum(len(batch) for batch in batches)

    # -- for the follower ----------------------------------------------------------------------------------------

    def swap(self, served: ServedModel, *, gives_up_old: bool = False) -> ServedModel | None:
        """Exchanges one reference. Runs under way end on the old model; every later run is the new one's.

        Requests that wait are the new model's: those that do not fit it fail with BadRequest. ``gives_up_old`` is for a
        model that hangs: its runs fail at once, and callers that are stuck in it are replaced.
        """
        with self._changed:
            old, self._served = self._served, served
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
        batches = self._in_flight.pop(served, [])
        if batches:
            self._callers.clear()  # those that are not stuck see that they were replaced, and end
        return [waiting for batch in batches for waiting in batch]

    def wait_until_idle(self, served: ServedModel, *, timeout_s: float) -> bool:
        """Waits for the runs of a replaced model to end."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._in_flight.get(served), timeout_s)

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
        while (taken := self._take(index)) is not None:
            served, requests, concurrency = taken
            try:
                self._serve(served, requests, concurrency)
            except Exception as error:
                # The top of a caller's loop: it must live on, and nobody may wait for ever.
                logger.exception("run failed model=%s digest=%.12s", self.model_name, served.digest)
                failed = self._fail(requests, RunFailed(f"internal error: {type(error).__name__}"))
                for _ in range(failed):
                    served.account.failed()
            finally:
                self._give_back(served, requests)

    def _take(self, index: int) -> tuple[ServedModel, list[_Waiting], int] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_closed or self._is_surplus(index))
            served = self._served
            if served is None or self._is_surplus(index) or not self._queue:
                if self._callers.get(index) is threading.current_thread():
                    del self._callers[index]
                self._changed.notify()  # a surplus caller may have been the one that a new request woke
                return None
            requests = self._next_requests(served)
            self._in_flight.setdefault(served, []).append(requests)
            return served, requests, self._busy

    def _next_requests(self, served: ServedModel) -> list[_Waiting]:
        configuration = served.configuration
        limit_rows = 1
        if served.session.is_batchable:
            limit_rows = share_of_queue(
                waiting_rows=sum(waiting.rows for waiting in self._queue),
                free_callers=configuration.max_concurrency - self._busy,
                max_batch=configuration.max_batch,
            )
        count = count_to_join(((waiting.key, waiting.rows) for waiting in self._queue), limit_rows=limit_rows)
        taken = [self._queue.popleft() for _ in range(count if served.session.is_batchable else 1)]
        return [waiting for waiting in taken if waiting.future.set_running_or_notify_cancel()]

    @property
    def _busy(self) -> int:
        return sum(len(batches) for batches in self._in_flight.values())

    def _give_back(self, served: ServedModel, requests: list[_Waiting]) -> None:
        with self._changed:
            batches = self._in_flight.get(served, [])
            batches[:] = [batch for batch in batches if batch is not requests]
            if served in self._in_flight and not batches:
                del self._in_flight[served]
                if served is not self._served:
                    self._changed.notify_all()

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

    def _serve(self, served: ServedModel, requests: list[_Waiting], concurrency: int) -> None:
        if not requests:
            return
        started_s = time.monotonic()
        try:
            outputs, cost = self._run(served, requests, concurrency)
        except RunFailed as error:
            self._recover(served, requests, concurrency, error)
            return
        finished_s = time.monotonic()
        self._run_ms += 0.1 * (cost.service_ms - self._run_ms)
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
                wall_clock_s=time.time(),
            )
            waiting.future.set_result(Answer(outputs=own, served=served, cost=answered))

    def _run(
        self, served: ServedModel, requests: list[_Waiting], concurrency: int
    ) -> tuple[list[dict[str, Array]], RunCost]:
        joined = join([waiting.inputs for waiting in requests])
        rows = sum(waiting.rows for waiting in requests)
        max_batch = served.configuration.max_batch if served.session.is_batchable else rows
        collected, service_ms, cpu_ms = [], 0.0, 0.0
        for inputs in chunks(joined, rows=rows, max_batch=max_batch):
            outputs, cost = served.session.run(inputs)
            size = rows_of(inputs) if served.session.is_batchable else 1
            served.account.ran(rows=size, concurrency=concurrency, service_ms=cost.service_ms)
            self.statistics.ran(rows=size, cost=cost)
            collected.append(outputs)
            service_ms, cpu_ms = service_ms + cost.service_ms, cpu_ms + cost.cpu_ms
        whole = collected[0] if len(collected) == 1 else _concatenated(collected)
        return part(whole, [waiting.rows for waiting in requests]), RunCost(service_ms=service_ms, cpu_ms=cpu_ms)

    def _recover(self, served: ServedModel, requests: list[_Waiting], concurrency: int, error: RunFailed) -> None:
        """One bad request must not fail those it was joined with: each gets a run of its own."""
        if len(requests) > 1:
            for waiting in requests:
                self._serve(served, [waiting], concurrency)
            return
        served.account.failed()
        self.statistics.failed("BACKEND")
        requests[0].future.set_exception(error)

    def _drained_in_s(self, served: ServedModel) -> float:
        configuration = served.configuration
        runs = len(self._queue) / (configuration.max_batch * configuration.max_concurrency)
        return max(1.0, math.ceil(runs * self._run_ms / 1000))


def _key(inputs: Mapping[str, Array], session: Session) -> Shape:
    return join_key(inputs) if session.is_batchable else ()


def _fitted(waiting: _Waiting, session: Session) -> _Waiting:
    if waiting.session is session:
        return waiting
    rows = check_inputs(waiting.inputs, session)
    return replace(waiting, session=session, rows=rows, key=_key(waiting.inputs, session))


def check_inputs(inputs: Mapping[str, Array], session: Session) -> int:
    """Rows of a request that fits the model; raises BadRequest saying what does not fit."""
    for tensor in session.inputs:
        if tensor.name not in inputs:
            raise BadRequest(f"input {tensor.name} is missing")
        array = inputs[tensor.name]
        fits = array.ndim == len(tensor.shape) and all(
            size in (-1, actual) for size, actual in zip(tensor.shape, array.shape, strict=True)
        )
        if array.dtype != tensor.dtype:
            raise BadRequest(f"input {tensor.name} must be {tensor.datatype}")
        if not fits or not array.size:
            raise BadRequest(f"input {tensor.name} has shape {list(array.shape)}, the model takes {list(tensor.shape)}")
    if unknown := set(inputs) - {tensor.name for tensor in session.inputs}:
        raise BadRequest(f"the model has no input {sorted(unknown)[0]}")
    if not session.is_batchable:
        return 1
    if len({array.shape[0] for array in inputs.values()}) > 1:
        raise BadRequest("inputs differ in their first size")
    if (rows := rows_of(inputs)) > LARGEST_REQUEST_ROWS:
        raise BadRequest(f"{rows} rows in one request, at most {LARGEST_REQUEST_ROWS} are served")
    return rows


def _concatenated(collected: list[dict[str, Array]]) -> dict[str, Array]:
    return {name: np.concatenate([outputs[name] for outputs in collected]) for name in collected[0]}
