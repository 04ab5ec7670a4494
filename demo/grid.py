"""Measures every action on every device for real: the agent alone (`serve`) under the device's limit, asked by the app.

What the numbers must show is judged in `check.py`.
"""

from __future__ import annotations

import itertools
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from demo.app import App, Tally, Traffic
from demo.devices import CpuLimit, Device, is_serving, one_thread
from demo.inference import InferenceConnection
from demo.processes import Household, Program, usable
from demo.ratings import RatingDesk
from demo.service import Stopped
from demo.users import PERSONAS, Persona
from selector.interactions import Measurement
from selector.reward import QoeFormula

SETTLE_S, SERVING_WITHIN_S = 1.5, 60.0


@dataclass(frozen=True)
class Model:
    """One variant as the catalogue made and judged it."""

    name: str
    path: Path
    accuracy: float


@dataclass(frozen=True)
class Choice:
    """One action: a variant under a serving configuration."""

    model: Model
    max_batch: int
    max_concurrency: int
    threads: int

    @property
    def key(self) -> str:
        return f"{self.model.name} b{self.max_batch}c{self.max_concurrency}t{self.threads}"


@dataclass(frozen=True)
class Cell:
    """What one action gave on one device."""

    requests: int
    failed: int
    p50_ms: float
    p95_ms: float
    cpu_ms: float
    rating: float
    qoe: float


@dataclass(frozen=True)
class Bench:
    """What all cells have in common."""

    application: str
    data: Path
    slo_ms: float
    formula: QoeFormula
    folder: Path
    seconds: float
    stop: threading.Event


def choices(models: Sequence[Model], configurations: Sequence[Mapping[str, Any]]) -> list[Choice]:
    """Every variant under every configuration of the application's definition."""
    pairs = itertools.product(models, configurations)
    return [Choice(model, each["max_batch"], each["max_concurrency"], each["threads"]) for model, each in pairs]


@dataclass(frozen=True)
class Stand:
    """One device on the bench: its limit, its processes, its port."""

    device: Device
    bench: Bench
    limit: CpuLimit
    household: Household
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def measure_device(index: int, device: Device, actions: Sequence[Choice], bench: Bench, port: int) -> dict[str, Cell]:
    """Every action in turn on one device; each device begins elsewhere, so that they are not heavy all at once."""
    shift = index * len(actions) // 6
    stand = Stand(device, bench, CpuLimit(device, "edge-qoe-check"), Household(bench.folder / device.name), port)
    try:
        return {action.key: measure_action(stand, action) for action in [*actions[shift:], *actions[:shift]]}
    finally:
        stand.household.stop(grace_s=2)
        stand.limit.remove()


def measure_action(stand: Stand, action: Choice) -> Cell:
    """Serve one action, send the device's traffic to it, and value what its user would have met."""
    child = stand.household.start(serve_program(stand, action))
    deadline = time.monotonic() + SERVING_WITHIN_S
    while not is_serving(stand.port):
        if stand.bench.stop.is_set():
            raise Stopped
        if time.monotonic() > deadline or not child.is_running:
            raise RuntimeError(f"no agent of {stand.device.name} serves {action.key}; see {child.log_path}")
        time.sleep(0.05)
    if stand.limit.group and child.pid:
        stand.limit.group.add(child.pid)
    try:
        return measure_traffic(stand, action)
    finally:
        stand.household.stop(grace_s=2)


def serve_program(stand: Stand, action: Choice) -> Program:
    device, bench = stand.device, stand.bench
    quota = [] if stand.limit.group else ["--cpu-quota-emulated", f"{device.cpu_quota:g}"]
    threads = min(action.threads, len(usable(device.cores)))  # more are refused; a fixed choice would get these
    return Program(
        name="agent",
        arguments=[
            *(sys.executable, "-m", "device_agents", "serve"),
            *("--model", str(action.model.path), "--model-name", bench.application, "--port", str(stand.port)),
            *("--max-batch", str(action.max_batch), "--concurrency", str(action.max_concurrency)),
            *("--threads", str(threads), "--state-dir", str(bench.folder / device.name / "state"), *quota),
        ],
        environment=one_thread(),
        cores=device.cores,
    )


def measure_traffic(stand: Stand, action: Choice) -> Cell:
    """Traffic for a while; the first requests only warm up."""
    application, rate_rps = stand.bench.application, stand.device.rates_rps[stand.bench.application]
    with np.load(stand.bench.data) as arrays:
        inputs, labels = arrays["heldout_inputs"], arrays["heldout_labels"]
    connection = InferenceConnection(stand.url, application)
    for row in range(3):
        connection.classify(inputs[row : row + 1])
    connection.close()
    before = cpu_and_count(stand.url)
    # What has just begun, and answering for its metrics, costs a small device all its CPU time for a while.
    stand.bench.stop.wait(SETTLE_S)
    persona = PERSONAS[stand.device.persona]
    app = App(Traffic(stand.url, application, rate_rps, inputs, labels), RatingDesk(persona, None))
    stop = threading.Event()
    threading.Thread(target=stop_later, args=(stand.bench, stop), daemon=True).start()
    app.run(stop)
    if stand.bench.stop.is_set():
        raise Stopped
    after = cpu_and_count(stand.url)
    cpu_ms = 1000 * (after[0] - before[0]) / max(1.0, after[1] - before[1])
    return value(app.tally, cpu_ms, persona, action.model.accuracy, stand.bench)


def stop_later(bench: Bench, stop: threading.Event) -> None:
    """Ends one action's traffic in time, or at once when the whole check is stopped."""
    bench.stop.wait(bench.seconds)
    stop.set()


def value(tally: Tally, cpu_ms: float, persona: Persona, accuracy: float, bench: Bench) -> Cell:
    """What was measured, with its QoE by the application's own formula.

    Accuracy is the variant's over all held-out data: a few seconds of answers would only add noise.
    """
    latencies_ms = list(tally.recent_ms) or [bench.seconds * 1000]
    rating = persona.expect(latencies_ms, 1 - accuracy)
    unanswered = tally.failed + tally.refused
    measurement = Measurement(
        requests=tally.requests,
        errors=unanswered,
        slo_hit_share=sum(latency_ms <= bench.slo_ms for latency_ms in latencies_ms) / len(latencies_ms),
        cpu_ms_per_request=cpu_ms,
        accuracy=accuracy,
        rating=rating,
        ratings=1,
    )
    p50_ms, p95_ms = (float(each) for each in np.percentile(latencies_ms, (50, 95)))
    return Cell(tally.requests, unanswered, p50_ms, p95_ms, cpu_ms, rating, bench.formula.reward(measurement))


def cpu_and_count(url: str) -> tuple[float, float]:
    """CPU seconds spent in runs and requests answered so far, as the agent tells Prometheus."""
    text = httpx.get(f"{url}/metrics", timeout=10, trust_env=False).text
    return metric(text, "qoe_inference_cpu_seconds_total"), metric(text, "nv_inference_count")


def metric(text: str, name: str) -> float:
    """The sum of a metric over its labels."""
    return sum(float(found) for found in re.findall(rf"^{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE))
