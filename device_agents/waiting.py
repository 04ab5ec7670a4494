"""Requests that wait, the most urgent first. No locks: the executor that owns a queue has one."""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from device_agents.admission import Admission
from device_agents.batching import Shape, join_key
from device_agents.errors import BadRequest
from device_agents.runtime import Array
from device_agents.served import Answer


@dataclass(eq=False, slots=True)
class Waiting:
    """One request of ``rows`` rows, as ``admission``'s session counts them; ``key`` tells what it can be joined with.

    One that is run at once by the thread that brings it needs no future: ``result`` is its answer or error.
    """

    inputs: Mapping[str, Array]
    admission: Admission
    rows: int
    arrived_s: float
    deadline_s: float
    key: Shape = ()
    future: Future[Answer] | None = None
    result: Answer | Exception | None = None

    def refit(self, admission: Admission) -> None:
        """Counts rows as another session does; raises BadRequest where it does not fit."""
        if self.admission is not admission:
            self.rows, self.admission, self.key = admission.rows(self.inputs), admission, ()

    def end(self, result: Answer | Exception) -> None:
        """Tells whoever waits for it."""
        self.result = result
        if self.future is None:
            return
        if isinstance(result, Exception):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)

    def is_given_up(self) -> bool:
        """Whether its sender cancelled it; otherwise it no longer can."""
        return self.future is not None and not self.future.set_running_or_notify_cancel()


class WaitingQueue:
    """In the order of deadlines; equal ones in the order of arrival."""

    def __init__(self) -> None:
        self._queue: deque[Waiting] = deque()
        self.rows = 0

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def first(self) -> Waiting:
        """The most urgent one."""
        return self._queue[0]

    def add(self, waiting: Waiting) -> Future[Answer]:
        """Behind all that are as urgent."""
        if waiting.admission.session.is_batchable and not waiting.key:
            waiting.key = join_key(waiting.inputs)
        if waiting.future is None:
            waiting.future = Future()
        self.rows += waiting.rows
        if not self._queue or self._queue[-1].deadline_s <= waiting.deadline_s:
            self._queue.append(waiting)
        else:
            self._queue.insert(bisect.bisect_right(self._queue, waiting.deadline_s, key=_deadline_s), waiting)
        return waiting.future

    def front(self, count: int, *, now_s: float) -> list[tuple[float, int]]:
        """(slack in ms, rows) of the first ``count``."""
        return [((each.deadline_s - now_s) * 1000, each.rows) for each in itertools.islice(self._queue, count)]

    def take(self, count: int) -> list[Waiting]:
        """The first ``count``."""
        return [self._pop() for _ in range(count)]

    def take_joinable(self, count: int) -> list[Waiting]:
        """Up to ``count`` from the front that can run together; what was given up is left out."""
        taken: list[Waiting] = []
        while self._queue and len(taken) < count:
            first = self._queue[0]
            if taken and not (first.admission.session.is_batchable and first.key == taken[0].key):
                break
            taken.append(self._pop())
        return [waiting for waiting in taken if not waiting.is_given_up()]

    def refit(self, admission: Admission) -> list[tuple[Waiting, BadRequest]]:
        """Counts rows by the session that will run what waits; gives back, and forgets, what does not fit it."""
        queue, self._queue, self.rows = self._queue, deque(), 0
        misfits: list[tuple[Waiting, BadRequest]] = []
        for waiting in queue:
            try:
                waiting.refit(admission)
            except BadRequest as error:
                if not waiting.is_given_up():
                    misfits.append((waiting, BadRequest(f"the model changed while this request waited: {error}")))
            else:
                self.add(waiting)
        return misfits

    def _pop(self) -> Waiting:
        waiting = self._queue.popleft()
        self.rows -= waiting.rows
        return waiting


def _deadline_s(waiting: Waiting) -> float:
    return waiting.deadline_s
