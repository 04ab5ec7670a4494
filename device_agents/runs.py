"""One run: requests that are answered together, joined, run, parted and accounted. Which ones is decided elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from device_agents.batching import chunks, join, part, rows_of
from device_agents.errors import RunFailed
from device_agents.lease import Answered
from device_agents.runtime import Array
from device_agents.served import Answer, ServedModel
from device_agents.statistics import Statistics
from device_agents.waiting import Waiting

Observe = Callable[["Run", int, float], None]


@dataclass(eq=False, slots=True)
class Run:
    """Requests that run together; ``concurrency`` counts the runs under way when it began, itself included."""

    served: ServedModel
    requests: Sequence[Waiting]
    concurrency: int
    ends_s: float

    def serve(self, statistics: Statistics, observe: Observe) -> None:
        """Answers every request, or fails it. ``observe`` hears rows and milliseconds of each piece that was run.

        These include their shares of joining and parting: a run that is just in time without would be late with them.
        """
        self._serve(self.requests, statistics, observe)

    def fail(self, error: RunFailed, statistics: Statistics) -> int:
        """Fails the requests that have no answer yet, and counts them."""
        unanswered = [waiting for waiting in self.requests if waiting.result is None]
        for waiting in unanswered:
            statistics.failed("BACKEND")
            waiting.end(error)
        return len(unanswered)

    def _serve(self, requests: Sequence[Waiting], statistics: Statistics, observe: Observe) -> None:
        served, started_s = self.served, time.monotonic()
        try:
            outputs, pieces, cpu_ms = self._executed(requests)
        except RunFailed as error:
            self._recover(requests, error, statistics, observe)
            return
        finished_s = time.monotonic()
        rows, service_ms = sum([size for size, _ in pieces]), sum([took_ms for _, took_ms in pieces])
        whole_ms = (finished_s - started_s) * 1000
        for size, took_ms in pieces:
            observe(self, size, took_ms * whole_ms / service_ms if service_ms else whole_ms)
        answers = [
            Answered(
                latency_ms=(finished_s - waiting.arrived_s) * 1000,
                queue_ms=(started_s - waiting.arrived_s) * 1000,
                service_ms=service_ms,
                batch_rows=rows,
                cpu_ms=cpu_ms * waiting.rows / rows,
            )
            for waiting in requests
        ]
        served.account.ended(pieces, answers, concurrency=self.concurrency)
        statistics.ended(pieces, answers, cpu_ms=cpu_ms, slo_ms=served.account.slo_ms, now_s=finished_s)
        for waiting, own, answered in zip(requests, outputs, answers, strict=True):
            waiting.end(Answer(outputs=own, served=served, cost=answered))

    def _executed(
        self, requests: Sequence[Waiting]
    ) -> tuple[Sequence[dict[str, Array]], list[tuple[int, float]], float]:
        """Outputs of each request, (rows, milliseconds) of each piece that was run, and their CPU time."""
        session, first = self.served.session, requests[0]
        max_batch = self.served.configuration.max_batch
        if len(requests) == 1 and (first.rows <= max_batch or not session.is_batchable):
            outputs, cost = session.run(first.inputs)
            return [outputs], [(first.rows, cost.service_ms)], cost.cpu_ms
        sizes = [waiting.rows for waiting in requests]
        joined = join([waiting.inputs for waiting in requests])
        collected, pieces, cpu_ms = [], [], 0.0
        for inputs in chunks(joined, rows=sum(sizes), max_batch=max_batch):
            outputs, cost = session.run(inputs)
            pieces.append((rows_of(inputs), cost.service_ms))
            collected.append(outputs)
            cpu_ms += cost.cpu_ms
        whole = collected[0] if len(collected) == 1 else _concatenated(collected)
        return part(whole, sizes), pieces, cpu_ms

    def _recover(self, requests: Sequence[Waiting], error: RunFailed, statistics: Statistics, observe: Observe) -> None:
        """One bad request must not fail those it was joined with: each gets a run of its own."""
        if len(requests) > 1:
            for waiting in requests:
                self._serve([waiting], statistics, observe)
            return
        self.served.account.failed()
        statistics.failed("BACKEND")
        requests[0].end(error)


def _concatenated(collected: list[dict[str, Array]]) -> dict[str, Array]:
    return {name: np.concatenate([outputs[name] for outputs in collected]) for name in collected[0]}
