"""Swaps under load: an open-loop Poisson stream of requests against a real agent that gets decision after decision.

The generator has one core to itself and the agent the other. A request's latency counts from when it should have been
sent, so that a server that stalls cannot hide it by slowing the generator down.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.delivery_device import ROOT, App, Device
from benchmarks.delivery_service import APPLICATION, Model, RigService, decision
from device_agents.wire import UpdateState

MODELS = ROOT / "demo" / "models"
SETTLED_S = 0.8
CALLERS = 8
SHARE_OF_CAPACITY = 0.3


@dataclass(frozen=True)
class Swaps:
    """Latencies in ms, over all swaps together. A swap lasts from the wake-up to the commit."""

    swaps: int
    committed: int
    requests: int
    failed: int
    steady_p50_ms: float
    steady_p99_ms: float
    swap_p50_ms: float
    swap_p99_ms: float
    swap_requests: int
    rate_rps: float

    @property
    def p99_ratio(self) -> float:
        """p99 while swapping by p99 otherwise."""
        return self.swap_p99_ms / self.steady_p99_ms


@dataclass(frozen=True)
class _Sample:
    due_s: float
    latency_ms: float
    is_right: bool


class _Load:
    """Poisson arrivals at a rate, sent by a few callers over connections of their own."""

    def __init__(self, port: int, body: bytes, *, seed: int) -> None:
        self.samples: list[_Sample] = []
        self._port = port
        self._body = body
        self._random = random.Random(seed)
        self._due: queue.SimpleQueue[float | None] = queue.SimpleQueue()

    def ask_once(self, connection: http.client.HTTPConnection) -> bool:
        """Whether a request was answered as it should."""
        connection.request("POST", f"/v2/models/{APPLICATION}/infer", body=self._body)
        response = connection.getresponse()
        response.read()
        return response.status == 200

    def capacity_rps(self, seconds: float) -> float:
        """Requests per second of one caller that asks again and again."""
        connection = self._connect()
        started_s, count = time.monotonic(), 0
        while time.monotonic() - started_s < seconds:
            self.ask_once(connection)
            count += 1
        connection.close()
        return count / (time.monotonic() - started_s)

    @contextmanager
    def running(self, rate_rps: float) -> Iterator[None]:
        """Requests at that rate while the context lasts, and all of their answers after it."""
        is_over = threading.Event()
        callers = [threading.Thread(target=self._call, daemon=True) for _ in range(CALLERS)]
        pacer = threading.Thread(target=self._pace, args=(rate_rps, is_over), daemon=True)
        for thread in (*callers, pacer):
            thread.start()
        try:
            yield
        finally:
            is_over.set()
            pacer.join()
            for _ in callers:
                self._due.put(None)
            for caller in callers:
                caller.join(30)

    def _pace(self, rate_rps: float, is_over: threading.Event) -> None:
        due_s = time.monotonic()
        while not is_over.is_set():
            due_s += self._random.expovariate(rate_rps)
            if (wait_s := due_s - time.monotonic()) > 0:
                time.sleep(wait_s)
            self._due.put(due_s)

    def _call(self) -> None:
        connection = self._connect()
        while (due_s := self._due.get()) is not None:
            try:
                is_right = self.ask_once(connection)
            except (OSError, http.client.HTTPException):
                is_right = False
                connection.close()
                connection = self._connect()
            self.samples.append(_Sample(due_s, (time.monotonic() - due_s) * 1000, is_right))
        connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)


def swaps(folder: Path, *, count: int) -> Swaps:
    """Swaps between the demo's models while requests come at a share of what the slowest of them can take."""
    cores = sorted(os.sched_getaffinity(0))
    models = [Model((MODELS / f"digits-{size}.onnx").read_bytes()) for size in ("small", "medium", "large")]
    with RigService() as service, Device(folder / "swaps", service, core=cores[-1]) as device:
        service.artifacts |= {model.digest: model.content for model in models}
        os.sched_setaffinity(0, {cores[0]})
        try:
            return _swap(service, device, models, count)
        finally:
            os.sched_setaffinity(0, cores)


def _swap(service: RigService, device: Device, models: list[Model], count: int) -> Swaps:
    device.start()
    service.want(decision(models[2], "first"))
    if not device.wait_for_state(UpdateState.COMMITTED, "first"):
        raise TimeoutError("the first variant was not committed")
    load = _Load(device.port, _digit(), seed=1)
    App(device.port, body=_digit()).first_answer()
    rate_rps = SHARE_OF_CAPACITY * load.capacity_rps(1.0)
    spans, committed = [], 0
    with load.running(rate_rps):
        time.sleep(2 * SETTLED_S)
        for number in range(count):
            # By turns another variant, and the same one with other bounds, which needs no reload.
            model, started_s = models[number % len(models)], time.monotonic()
            service.want(decision(model, f"swap{number}", soak_s=0.5, min_requests=5))
            committed += device.wait_for_state(UpdateState.COMMITTED, f"swap{number}")
            spans.append((started_s, time.monotonic()))
            time.sleep(SETTLED_S)
    return _judge(load.samples, spans, committed, rate_rps)


def _judge(samples: list[_Sample], spans: list[tuple[float, float]], committed: int, rate_rps: float) -> Swaps:
    def is_within(sample: _Sample) -> bool:
        return any(start <= sample.due_s <= end for start, end in spans)

    swapping = [each.latency_ms for each in samples if is_within(each)]
    steady = [each.latency_ms for each in samples if not is_within(each)]
    return Swaps(
        swaps=len(spans),
        committed=committed,
        requests=len(samples),
        failed=sum(not each.is_right for each in samples),
        steady_p50_ms=float(np.quantile(steady, 0.5)),
        steady_p99_ms=float(np.quantile(steady, 0.99)),
        swap_p50_ms=float(np.quantile(swapping, 0.5)),
        swap_p99_ms=float(np.quantile(swapping, 0.99)),
        swap_requests=len(swapping),
        rate_rps=rate_rps,
    )


def _digit() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, 32 * 32).tolist()
    inputs = [{"name": "image", "shape": [1, 1, 32, 32], "datatype": "UINT8", "data": pixels}]
    return json.dumps({"inputs": inputs}).encode()
