"""The service's processes and commands, as the demo and the system tests use them: environment in, programs out.

Knows the service by its commands and its HTTP interface only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import httpx

from demo.processes import ROOT, Program


class CommandFailed(Exception):
    """A management command ended with an error; the message is what it said."""


class Stopped(Exception):
    """The demo was told to stop while a command ran."""


@dataclass(frozen=True)
class Service:
    """One installation of the service: where its data is and where it listens."""

    folder: Path
    port: int
    settings: Mapping[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What the demo sets itself, unless the caller's environment or `settings` says otherwise."""
        usual = {
            "DEBUG": "0",
            "CHECK_IN_INTERVAL_S": "2",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        given = {name: os.environ[name] for name in usual if name in os.environ}
        return {**usual, **given, "DATA_DIR": str(self.folder), **self.settings}

    def manage(self, *arguments: str) -> str:
        """Run a management command and return what it printed.

        Raises CommandFailed with the end of its complaint, and Stopped when `stop` was set meanwhile.
        """
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as complaint:
            code = self._run([sys.executable, "manage.py", *arguments], out, complaint)
            out.seek(0)
            complaint.seek(0)
            if code != 0:
                lines = (complaint.read().strip() or out.read().strip()).splitlines()
                raise CommandFailed(f"manage.py {arguments[0]}: " + " | ".join(lines[-3:]))
            return out.read().strip()

    def _run(self, arguments: Sequence[str], out: IO[str], complaint: IO[str]) -> int:
        with subprocess.Popen(
            arguments,
            cwd=ROOT,
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=complaint,
            start_new_session=True,
        ) as process:
            while process.poll() is None:
                if self.stop.wait(0.05):
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    raise Stopped
            return process.returncode

    def programs(self) -> list[Program]:
        """Web, worker, learner and beat."""
        return [self.web(), self.worker(), self.learner(), self.beat()]

    def web(self) -> Program:
        return self._program(
            "web",
            *("uvicorn", "qoe_service.asgi:application"),
            *("--host", self.host, "--port", str(self.port)),
            *("--no-access-log", "--log-level", "warning", "--lifespan", "off"),
            # Wake-up connections never end by themselves.
            *("--timeout-graceful-shutdown", "2"),
        )

    def worker(self) -> Program:
        return self._celery("worker", "-Q", "service", "--pool", "threads", "-c", "4")

    def learner(self) -> Program:
        return self._celery("learner", "-Q", "learning", "--pool", "solo")

    def beat(self) -> Program:
        return self._program("beat", "celery", "-A", "qoe_service", "beat", "--loglevel", "WARNING", "--pidfile", "")

    def wait_until_up(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.is_up():
                return True
            time.sleep(0.2)
        return False

    def is_up(self) -> bool:
        try:
            return httpx.get(f"{self.url}/healthz", timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def _celery(self, name: str, *arguments: str) -> Program:
        # One worker of each kind and no fan-out: nothing to gossip about, and a file broker pays for every message.
        quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "WARNING")
        return self._program(name, "celery", "-A", "qoe_service", "worker", "-n", f"{name}@%h", *quiet, *arguments)

    def _program(self, name: str, module: str, *arguments: str) -> Program:
        return Program(name, [sys.executable, "-m", module, *arguments], self.environment)
