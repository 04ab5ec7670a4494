"""The app beside a device: asks its local server about real images, open loop, and reports how content its user is.

Requests come as a Poisson process whether or not earlier ones were answered, and latency counts from the moment at
which a request should have been sent: a slow device cannot hide behind a patient client (no coordinated omission).
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demo.inference import Failed, InferenceConnection, Refused
from demo.processes import stopping_on
from demo.ratings import RatingDesk, feedback_sender
from demo.users import PERSONAS, REFUSED, Experience

CALLERS = 24
READY_PAUSE_S = 0.25
REPORT_EVERY_S = 2.0
RECENT = 500


@dataclass(frozen=True)
class Traffic:
    """Who asks what, how often."""

    device_url: str
    application: str
    rate_rps: float
    inputs: NDArray[np.uint8]
    labels: NDArray[np.int64]
    seed: int = 0


class Tally:
    """Counts since the start. `failed` must stay zero, swaps or not; `refused` is the device shedding load."""

    def __init__(self) -> None:
        self.requests = self.failed = self.refused = self.correct = 0
        self.reasons: dict[str, int] = {}
        self.decisions: set[str] = set()
        self.recent_ms: deque[float] = deque(maxlen=RECENT)
        self._lock = threading.Lock()

    def answered(self, latency_ms: float, is_correct: bool, decision_id: str | None) -> None:
        with self._lock:
            self.requests += 1
            self.correct += is_correct
            self.recent_ms.append(latency_ms)
            if decision_id:
                self.decisions.add(decision_id)

    def unanswered(self, error: Refused | Failed) -> None:
        with self._lock:
            self.requests += 1
            self.refused += isinstance(error, Refused)
            self.failed += isinstance(error, Failed)
            reason = str(error)[:120]
            if reason in self.reasons or len(self.reasons) < 20:
                self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def summary(self) -> dict[str, Any]:
        with self._lock:
            answered = self.requests - self.failed - self.refused
            p50, p95 = np.percentile(self.recent_ms, (50, 95)) if self.recent_ms else (None, None)
            return {
                "requests": self.requests,
                "failed": self.failed,
                "refused": self.refused,
                "accuracy": self.correct / answered if answered else None,
                "recent_p50_ms": p50,
                "recent_p95_ms": p95,
                "decisions": len(self.decisions),
                "reasons": dict(self.reasons),
            }


class App:
    """Sends one application's traffic to one device until told to stop."""

    def __init__(self, traffic: Traffic, desk: RatingDesk) -> None:
        self.tally = Tally()
        self._traffic, self._desk = traffic, desk
        self._is_over = False
        self._waiting: queue.SimpleQueue[tuple[float, int] | None] = queue.SimpleQueue()
        # Last in, first out: few connections stay warm instead of all of them going stale in turn.
        self._connections: queue.LifoQueue[InferenceConnection] = queue.LifoQueue()
        for _ in range(CALLERS):
            self._connections.put(InferenceConnection(traffic.device_url, traffic.application))
        self._callers = [threading.Thread(target=self._call, daemon=True) for _ in range(CALLERS)]

    def run(self, stop: threading.Event) -> None:
        """Send requests at their times. Falls behind by nothing but the sleep's resolution."""
        for caller in self._callers:
            caller.start()
        rng = np.random.default_rng(self._traffic.seed)
        due = time.perf_counter()
        while not stop.is_set():
            due += rng.exponential(1 / self._traffic.rate_rps)
            if stop.wait(max(0.0, due - time.perf_counter())):
                break
            self._waiting.put((due, int(rng.integers(len(self._traffic.labels)))))
        self._is_over = True
        for _ in self._callers:
            self._waiting.put(None)
        for caller in self._callers:
            caller.join(timeout=5)
        while not self._connections.empty():
            self._connections.get().close()

    def _call(self) -> None:
        while (request := self._waiting.get()) is not None and not self._is_over:
            connection = self._connections.get()
            try:
                self._ask(connection, *request)
            finally:
                self._connections.put(connection)

    def _ask(self, connection: InferenceConnection, due: float, index: int) -> None:
        try:
            answer = connection.classify(self._traffic.inputs[index : index + 1])
        except (Refused, Failed) as error:
            self.tally.unanswered(error)
            self._desk.note_refusal(REFUSED)
            return
        latency_ms = (time.perf_counter() - due) * 1000
        is_correct = bool(answer.classes[0] == self._traffic.labels[index])
        self.tally.answered(latency_ms, is_correct, answer.decision_id)
        if answer.decision_id:
            self._desk.note(answer.decision_id, Experience(latency_ms, is_correct))


def report_until(stop: threading.Event, app: App, desk: RatingDesk, stats: Path | None) -> None:
    """Rate at every change of decision and about every two seconds, and write the counts beside."""
    while not stop.is_set():
        desk.decision_changed.wait(REPORT_EVERY_S)
        desk.flush()
        if stats:
            write_stats(stats, {**app.tally.summary(), "ratings": dict(desk.sent), "last_rating": desk.last_rating})


def write_stats(path: Path, values: dict[str, Any]) -> None:
    """Atomically, so that a reader never sees half of it."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps({**values, "at": time.time()}))
    os.replace(partial, path)


def main(arguments: Sequence[str]) -> int:
    """One app process: `python -m demo app`."""
    parser = argparse.ArgumentParser(prog="python -m demo app", description="Ask a device about images, and rate it.")
    parser.add_argument("--device-url", required=True, help="the device's local inference server")
    parser.add_argument("--application", required=True, help="also the name of the model that the device serves")
    parser.add_argument("--data", type=Path, required=True, help="npz file with heldout_inputs and heldout_labels")
    parser.add_argument("--rate", type=float, required=True, help="requests per second, Poisson")
    parser.add_argument("--persona", required=True, choices=tuple(PERSONAS), help="simulated user, see docs/demo.md")
    parser.add_argument("--service-url", help="where ratings go, together with --key-file; without, nothing is rated")
    parser.add_argument("--key-file", type=Path, help="file with the application key")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and choice of images")
    parser.add_argument("--stats", type=Path, help="file for counts, rewritten about every two seconds")
    return run(parser.parse_args(arguments), stopping_on(signal.SIGINT, signal.SIGTERM))


def run(chosen: argparse.Namespace, stop: threading.Event) -> int:
    """Wait until the device serves the application, then ask and rate until told to stop."""
    with np.load(chosen.data) as arrays:
        inputs, labels = arrays["heldout_inputs"], arrays["heldout_labels"]
    traffic = Traffic(chosen.device_url, chosen.application, chosen.rate, inputs, labels, chosen.seed)
    key = chosen.key_file.read_text().strip() if chosen.key_file else ""
    desk = RatingDesk(PERSONAS[chosen.persona], feedback_sender(chosen.service_url, key) if key else None)
    app = App(traffic, desk)
    connection = InferenceConnection(traffic.device_url, traffic.application)
    while not connection.is_ready():
        if stop.wait(READY_PAUSE_S):
            return 0
    connection.close()
    print(f"{chosen.application} is served; asking {chosen.rate:g} times a second as {chosen.persona}", flush=True)
    reporter = threading.Thread(target=report_until, args=(stop, app, desk, chosen.stats), daemon=True)
    reporter.start()
    app.run(stop)
    reporter.join(timeout=2 * REPORT_EVERY_S)
    print(json.dumps(app.tally.summary()), flush=True)
    return 0
