"""Starts the service under uvicorn, and speaks to it over sockets."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
MAX_BODY_BYTES = 50_000
_PREPARE = """
import django; django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0); call_command("issue_token", uses=1000)
"""


@dataclass(frozen=True)
class Enrolled:
    """A device of the served service."""

    device_id: str
    credential: str


@dataclass(frozen=True)
class Served:
    """A running web process."""

    port: int
    process: psutil.Process
    folder: Path
    token: str

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def enrol(self, *names: str) -> list[Enrolled]:
        """One device of each name."""
        with httpx.Client(base_url=self.url) as client:
            bodies = [{"token": self.token, "name": name} for name in names]
            answers = [client.post("/api/v1/devices/enrol", json=body).raise_for_status() for body in bodies]
        return [Enrolled(each.json()["device_id"], each.json()["credential"]) for each in answers]

    def change(self, device: Enrolled, version: int) -> None:
        """Do to the database what a worker does when it decided."""
        now = "2026-06-01 12:00:00"
        for table in ("rollouts_desiredversion", "rollouts_change"):
            self.execute(
                f"INSERT OR REPLACE INTO {table} (device_id, version, changed_at) VALUES (?, ?, ?)",
                device.device_id,
                version,
                now,
            )

    def execute(self, statement: str, *values: object) -> None:
        """One statement on the database of the service, committed."""
        with sqlite3.connect(self.folder / "db.sqlite3", timeout=20) as database:
            database.execute(statement, values)
        database.close()

    def log(self) -> str:
        """What the web process has logged so far."""
        return (self.folder / "log").read_text()

    def open_database_files(self) -> int:
        """How many database connections the web process holds (each has the file open once)."""
        path = str(self.folder / "db.sqlite3")
        return sum(file.path == path for file in self.process.open_files())


class Stream:
    """A wake-up stream over a plain socket."""

    def __init__(self, served: Served, device: Enrolled) -> None:
        self._socket = socket.create_connection(("127.0.0.1", served.port), timeout=10)
        path = f"/api/v1/devices/{device.device_id}/wake-up"
        head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {device.credential}\r\n\r\n"
        self._socket.sendall(head.encode())
        self._received = b""
        self.until(b"retry:")

    def until(self, wanted: bytes) -> float:
        """Read until ``wanted`` has come; how many seconds that took."""
        started = time.monotonic()
        while wanted not in self._received:
            chunk = self._socket.recv(65_536)
            if not chunk:
                raise EOFError(self._received)
            self._received += chunk
        return time.monotonic() - started

    def wake(self, version: int) -> float:
        """Read until the device is woken with this version; how many seconds that took."""
        return self.until(b"event: wake\ndata: " + json.dumps({"version": version}).encode())

    def end(self) -> float:
        """Read to the end of the chunked answer; how many seconds that took."""
        return self.until(b"\r\n0\r\n\r\n")

    def has_heard(self, text: bytes) -> bool:
        """Whether these bytes have come so far."""
        return text in self._received

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


@contextmanager
def serve(folder: Path) -> Iterator[Served]:
    """The service with its data in this folder."""
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "qoe_service.settings",
        "DATA_DIR": str(folder),
        "MAX_BODY_BYTES": str(MAX_BODY_BYTES),
        "ENROLMENTS_PER_MINUTE": "1000",
    }
    for name in ("DATABASE_URL", "REDIS_URL"):
        environment.pop(name, None)
    prepared = subprocess.run(
        [sys.executable, "-c", _PREPARE], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    port = _free_port()
    command = [sys.executable, "-m", "uvicorn", "qoe_service.asgi:application", "--port", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        _wait_for(port, process)
        yield Served(port, psutil.Process(process.pid), folder, prepared.stdout.strip())
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        try:
            httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=5).raise_for_status()
        except httpx.HTTPError:
            assert process.poll() is None, "the web process ended"
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the web process does not answer")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
