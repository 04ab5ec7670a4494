"""CPU limits by Linux control groups, version 1 or 2, where this process may set them. Which device gets how much is in
`devices.py`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# As short as the kernel allows: a quota slows a single run down as much as it does a row of them, so that what a device
# measures at warm-up holds under traffic. With long periods a model is fast until the quota is used up, then stalls.
QUOTA_US = 1_000
CGROUPS = Path("/sys/fs/cgroup")


class CpuGroup:
    """A control group whose processes share `cores` of CPU time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def limit(self, cores: float) -> None:
        quota_us = max(QUOTA_US, round(cores * QUOTA_US))
        period_us = round(quota_us / cores)
        if (self.folder / "cpu.max").exists():
            (self.folder / "cpu.max").write_text(f"{quota_us} {period_us}")
        else:
            (self.folder / "cpu.cfs_period_us").write_text(str(period_us))
            (self.folder / "cpu.cfs_quota_us").write_text(str(quota_us))

    def add(self, pid: int) -> None:
        """Move a process with all its threads; one that has just ended is no error."""
        with suppress(ProcessLookupError):
            (self.folder / "cgroup.procs").write_text(str(pid))

    def remove(self) -> None:
        """End what is still inside, and take the group away."""
        deadline = time.monotonic() + 3
        while self.folder.exists() and time.monotonic() < deadline:
            with suppress(OSError):
                for line in (self.folder / "cgroup.procs").read_text().split():
                    os.kill(int(line), signal.SIGKILL)
                self.folder.rmdir()
                return
            time.sleep(0.05)


def open_cpu_group(name: str, cores: float) -> CpuGroup | None:
    """A group of this name under that limit, or None where control groups cannot be written."""
    for parent in parents():
        folder = parent / name
        try:
            folder.mkdir(exist_ok=True)
            group = CpuGroup(folder)
            group.limit(cores)
        except OSError:
            with suppress(OSError):
                folder.rmdir()
            continue
        return group
    return None


def parents(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> Iterator[Path]:
    """Where a group may be made: below this process's own group, else at the top of the hierarchy."""
    for controllers, path in memberships(own):
        if controllers and "cpu" not in controllers:
            continue
        mount = root / ",".join(controllers) if controllers else root
        if not controllers and not (root / "cgroup.controllers").exists():
            continue
        for folder in dict.fromkeys((mount / path.lstrip("/"), mount)):
            if os.access(folder, os.W_OK):
                yield folder


def memberships(own: Path) -> Iterator[tuple[list[str], str]]:
    """(controllers, path) of each hierarchy that this process is in; version 2 names no controllers."""
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            yield [name for name in controllers.split(",") if name], path
