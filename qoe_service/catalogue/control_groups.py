"""Memory limits that the kernel itself keeps: a control group for each sandbox, where this process may make one.

Version 2 needs the memory controller handed down to the worker's own group or the one above it; version 1 needs
nothing but the right to write. Elsewhere there is none, and the watchdog of ``sandbox.py`` stands alone.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PREFIX = "qoe-sandbox-"
LIMITS = ("memory.max", "memory.limit_in_bytes")
EVENTS = ("memory.events", "memory.oom_control")
REMOVED_WITHIN_S = 1.0


class ControlGroup(NamedTuple):
    """One group with a limit; a process joins by writing its id into ``members``."""

    folder: Path

    @property
    def members(self) -> Path:
        """The file that lists the processes in it."""
        return self.folder / "cgroup.procs"

    def ran_out_of_memory(self) -> bool:
        """Whether the kernel ended a process because of the limit."""
        for name in EVENTS:
            with contextlib.suppress(OSError):
                lines = (self.folder / name).read_text().split("\n")
                return any(line.startswith("oom_kill ") and line != "oom_kill 0" for line in lines)
        return False


@contextlib.contextmanager
def limited(memory_bytes: int, *, parent: Path | None = None) -> Iterator[ControlGroup | None]:
    """A group that may hold so many bytes, below ``parent`` or wherever it is allowed; None where it is not."""
    group = _made(parent or place(), memory_bytes)
    try:
        yield group
    finally:
        if group is not None:
            _remove(group.folder)


def place(processes: Path = Path("/proc/self")) -> Path | None:
    """The group below which this process may make limited ones; None where there is none."""
    try:
        lines = [line.split(":", 2) for line in (processes / "cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (processes / "mountinfo").read_text().splitlines()]
        paths = {names: path for _, names, path in lines}
    except (OSError, ValueError):
        return None
    for fields in mounts:
        kind, options = fields[fields.index("-") + 1], fields[-1].split(",")
        if kind == "cgroup" and "memory" in options:
            path = next((path for names, path in paths.items() if "memory" in names.split(",")), None)
        elif kind == "cgroup2":
            path = paths.get("")
        else:
            continue
        if path is not None:
            # in a container the mount shows the tree from somewhere below its root
            mount, below = Path(fields[4]), path.removeprefix(fields[3] if fields[3] != "/" else "").lstrip("/")
            found = _usable(mount, mount / below, is_unified=kind == "cgroup2")
            if found is not None:
                return found
    return None


def _usable(mount: Path, own: Path, *, is_unified: bool) -> Path | None:
    for folder in (own, own.parent) if is_unified and own != mount else (own,):
        handed_down = not is_unified or "memory" in _words(folder / "cgroup.subtree_control")
        if handed_down and os.access(folder, os.W_OK) and os.access(folder / "cgroup.procs", os.W_OK):
            return folder
    return None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _made(parent: Path | None, memory_bytes: int) -> ControlGroup | None:
    if parent is None:
        return None
    folder = parent / f"{PREFIX}{uuid.uuid4().hex[:12]}"
    try:
        folder.mkdir()
    except OSError:
        return None
    for name in LIMITS:
        with contextlib.suppress(OSError), (folder / name).open("r+") as file:
            file.write(str(memory_bytes))
            return ControlGroup(folder)
    _remove(folder)
    return None


def _remove(folder: Path) -> None:
    """A group goes once its last process is gone, which may take the kernel a moment."""
    ends = time.monotonic() + REMOVED_WITHIN_S
    while folder.exists():
        with contextlib.suppress(OSError):
            folder.rmdir()
            return
        if time.monotonic() > ends:
            return
        time.sleep(0.01)
