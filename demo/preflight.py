"""Whether the demo can run here and now: Python, port, data folder. Says what to do where it cannot."""

from __future__ import annotations

import fcntl
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import IO

MARKER = ".edge-qoe-demo"


class CannotStart(Exception):
    """The demo cannot run here and now; the message says what to do."""


def check_python(version: tuple[int, int]) -> None:
    if not (3, 11) <= version <= (3, 13):
        raise CannotStart(f"Python {version[0]}.{version[1]} is too old or too new; use 3.11, 3.12 or 3.13")


def check_port(port: int) -> None:
    if not is_free(port):
        other = next(iter(free_ports(1, port + 1)))
        raise CannotStart(f"port {port} is in use; try: make run PORT={other} (python -m demo up --port {other})")


def check_start(is_fresh: bool, environment: Mapping[str, str]) -> None:
    """Starting over empties the data folder, and nobody's database server."""
    if is_fresh and environment.get("DATABASE_URL"):
        raise CannotStart(
            "DATABASE_URL is set, and a database server is not emptied here; empty it, or unset the variable"
        )


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
    return True


def free_ports(count: int, start: int) -> list[int]:
    """The next `count` ports from `start` on that nobody listens on."""
    found = [port for port in range(start, min(start + 500, 65_536)) if is_free(port)][:count]
    if len(found) < count:
        raise CannotStart(f"no {count} free ports above {start}; choose another with PORT= or --port")
    return found


def claim(folder: Path) -> IO[str]:
    """The data folder, made and locked: two demos on one folder would spoil each other's data."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise CannotStart(f"cannot write to {folder} ({error.strerror}); name another folder with --data") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise CannotStart(f"another demo runs on {folder}; stop it, or name another folder with --data") from error
    if not (folder / MARKER).exists():
        if any(entry.name != "lock" for entry in folder.iterdir()):
            lock.close()
            raise CannotStart(f"{folder} holds something else; name an empty folder with --data")
        (folder / MARKER).touch()
    return lock


def clear(folder: Path) -> None:
    """Remove what earlier runs left in a claimed folder."""
    for entry in folder.iterdir():
        if entry.name in {"lock", MARKER}:
            continue
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
