"""A real agent process on a state folder of its own, for the delivery benchmark, and the app that asks it."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.delivery_service import APPLICATION, DEVICE_ID, WIDTH, RigService
from device_agents.store import Identity, Record, Store
from device_agents.wire import UpdateState

ROOT = Path(__file__).resolve().parents[1]
SHIM = Path(__file__).with_name("device_shim.c")


def free_port() -> int:
    """A port that nobody listens at just now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def compiled_shim(folder: Path) -> Path | None:
    """The shim as a library to preload; None where there is no C compiler."""
    compiler, library = shutil.which("cc"), folder / "device_shim.so"
    if compiler is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SHIM)], check=True)
    return library


class Device:
    """One state folder and the agent process that runs on it, again and again."""

    def __init__(
        self,
        folder: Path,
        service: RigService,
        *,
        service_port: int | None = None,
        environment: Mapping[str, str] | None = None,
        file_limit_bytes: int | None = None,
        core: int | None = None,
    ) -> None:
        self.folder = folder
        self.store = Store(folder, disk_budget_bytes=2**40)
        url = f"http://127.0.0.1:{service_port or service.port}"
        identity = Identity(service_url=url, device_id=DEVICE_ID, credential="c", trusted_keys=(service.trusted_key,))
        self.store.save_identity(identity)
        self.port = free_port()
        self._environment = dict(environment or {})
        self._url = url
        self._file_limit_bytes = file_limit_bytes
        self._core = core
        self._process: subprocess.Popen[bytes] | None = None
        self._record_file = folder / "applications" / f"{APPLICATION}.json"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """Of the running agent."""
        assert self._process is not None, "the agent was started"
        return self._process.pid

    def start(self) -> None:
        """Starts ``qoe-agent run`` as a process of its own; returns at once."""
        settings = {
            "QOE_AGENT_SERVICE_URL": self._url,
            "QOE_AGENT_STATE_DIR": str(self.folder),
            "QOE_AGENT_PORT": str(self.port),
            "QOE_AGENT_NAME": "rig",
            "QOE_AGENT_PROFILE_BUDGET_S": "0.05",
            "QOE_AGENT_DISK_RESERVE_BYTES": "0",
        }
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "device_agents", "run"],
                cwd=ROOT,
                env={**os.environ, **settings, **self._environment},
                stdout=log,
                stderr=log,
            )
        if self._file_limit_bytes is not None:
            limits = (self._file_limit_bytes, self._file_limit_bytes)
            resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, limits)
        if self._core is not None:
            os.sched_setaffinity(self._process.pid, {self._core})

    def kill(self) -> None:
        """Kill -9, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Asks it to end, as systemd does."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)
            self._process = None

    def record(self) -> Record | None:
        """What the store says now; None before the first save."""
        with contextlib.suppress(FileNotFoundError):
            return Record.model_validate_json(self._record_file.read_bytes())
        return None

    def state(self) -> UpdateState | None:
        """The state on disk, read fast enough to be asked a thousand times a second."""
        with contextlib.suppress(FileNotFoundError):
            return UpdateState(json.loads(self._record_file.read_bytes())["state"])
        return None

    def wait_for_state(self, wanted: UpdateState, decision_id: str, timeout_s: float = 20.0) -> bool:
        """Whether the attempt at that decision reached the state in time."""
        ends_s = time.monotonic() + timeout_s
        marked = f'"decision_id":"{decision_id}"'.encode()
        state = f'"state":"{wanted.value}"'.encode()
        while time.monotonic() < ends_s:
            with contextlib.suppress(FileNotFoundError):
                content = self._record_file.read_bytes()
                if state in content and marked in content:
                    return True
            time.sleep(0.0002)
        return False


@dataclass(frozen=True)
class Answered:
    """One answer of the local server. ``digest`` is what it says of itself, ``value`` is what the model made of 1."""

    status: int
    digest: str
    value: float


class App:
    """Asks the local server again and again over one connection."""

    def __init__(self, port: int, *, timeout_s: float = 10.0, body: bytes | None = None) -> None:
        self._port = port
        self._timeout_s = timeout_s
        self._connection: http.client.HTTPConnection | None = None
        inputs = [{"name": "x", "shape": [1, WIDTH], "datatype": "FP32", "data": [1.0] * WIDTH}]
        self._body = body or json.dumps({"inputs": inputs}).encode()

    def ask(self) -> Answered:
        """One request. Raises OSError or HTTPException when nobody answers."""
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=self._timeout_s)
        try:
            self._connection.request("POST", f"/v2/models/{APPLICATION}/infer", body=self._body)
            response = self._connection.getresponse()
            content: dict[str, Any] = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError):
            self.hang_up()
            raise
        value = content["outputs"][0]["data"][0] if response.status == 200 else 0.0
        return Answered(response.status, response.headers.get("X-Model-Digest", ""), value)

    def first_answer(self, timeout_s: float = 30.0) -> Answered:
        """Asks until a model answers. Raises TimeoutError."""
        for answer in self._answers(timeout_s):
            if answer is not None and answer.status == 200:
                return answer
        raise TimeoutError("no model answered")

    def _answers(self, timeout_s: float) -> Iterator[Answered | None]:
        ends_s = time.monotonic() + timeout_s
        for attempt in itertools.count():
            if time.monotonic() > ends_s:
                return
            try:
                yield self.ask()
            except (OSError, http.client.HTTPException, ValueError):
                yield None
            time.sleep(0.005 if attempt else 0.0)

    def hang_up(self) -> None:
        """Ends the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Watch:
    """An app in a thread that checks every answer: from a model that was offered, and by the digest that it claims."""

    def __init__(self, device: Device, factors: Mapping[str, float], *, pause_s: float = 0.01) -> None:
        self.answers = 0
        self.unverified = 0
        self._device = device
        self._factors = factors
        self._pause_s = pause_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(15)

    def _run(self) -> None:
        app = App(self._device.port, timeout_s=2.0)
        while not self._is_over.wait(self._pause_s):
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                answer = app.ask()
                if answer.status == 200:
                    self.answers += 1
                    self.unverified += self._factors.get(answer.digest) != answer.value
        app.hang_up()
