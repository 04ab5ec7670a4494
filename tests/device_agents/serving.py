"""A model served for real: an executor under a uvicorn server on a free port."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import httpx

from device_agents.executor import Executor
from device_agents.lease import LeaseAccount
from device_agents.listening import QuietServer, bind
from device_agents.runtime import Session
from device_agents.served import ServedModel
from device_agents.server import InferenceServer
from device_agents.spool import Kept
from device_agents.wire import Feedback, ServingConfiguration
from tests.device_agents.models import Model


def served(
    model: Model,
    folder: Path,
    *,
    decision_id: str | None = "d1",
    max_batch: int = 4,
    max_concurrency: int = 1,
    threads: int = 1,
    slo_p95_ms: float = 1000,
) -> ServedModel:
    """A model, loaded."""
    path = folder / f"{model.digest}.onnx"
    now_s = time.monotonic()
    return ServedModel(
        session=Session(path if path.exists() else model.write(path), threads=threads),
        configuration=ServingConfiguration(max_batch=max_batch, max_concurrency=max_concurrency),
        digest=model.digest,
        decision_id=decision_id,
        account=LeaseAccount(slo_p95_ms=slo_p95_ms, started_s=now_s),
        started_s=now_s,
        lease_s=math.inf,
    )


def client_of(url: str | httpx.URL) -> httpx.Client:
    """A client of a local server; it needs no certificates, and loading them would take longer than the test."""
    return httpx.Client(base_url=url, timeout=60, verify=False)


@contextlib.contextmanager
def listening(
    executors: Mapping[str, Executor],
    *,
    body_limit_bytes: int = 1_000_000,
    accept_feedback: Callable[[Feedback], Kept] | None = None,
) -> Iterator[httpx.Client]:
    """A server over real sockets, and a client of it."""
    app = InferenceServer(executors, version="1", body_limit_bytes=body_limit_bytes, accept_feedback=accept_feedback)
    listener = bind("127.0.0.1", 0)
    server = QuietServer(app, sockets=[listener])
    thread = threading.Thread(target=server.serve_until_stopped)
    thread.start()
    try:
        with client_of(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
            yield client
    finally:
        server.stop()
        thread.join(10)
        listener.close()
        assert not thread.is_alive()
