"""Processes of the demo: start each in a group of its own, restart what dies, leave nothing behind, stop when told.

What is started, and in which order, is in `service.py`, `devices.py` and `supervisor.py`.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
LOG_LIMIT_BYTES = 5_000_000
FIRST_PAUSE_S, LONGEST_PAUSE_S, STEADY_S = 0.5, 15.0, 20.0


@dataclass(frozen=True)
class Program:
    """What to run. `after_start` gets the process id, for example to put it under a CPU limit."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    cores: frozenset[int] = frozenset()
    after_start: Callable[[int], None] | None = None


class Child:
    """One program, whether it runs at the moment or waits for its next start."""

    def __init__(self, program: Program, log_path: Path) -> None:
        self.program = program
        self.log_path = log_path
        self.restarts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._start_again_at = 0.0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, now: float) -> None:
        rotate(self.log_path)
        with self.log_path.open("ab") as log, on_cores(self.program.cores):
            self._process = subprocess.Popen(
                self.program.arguments,
                env={**os.environ, **self.program.environment},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started_at = now
        if self.program.after_start:
            self.program.after_start(self._process.pid)

    def tend(self, now: float) -> str | None:
        """Start again what died, later and later while it keeps dying. Says what happened, if anything did."""
        if self.is_running:
            return None
        if self._process is not None:
            code, self._process = self._process.returncode, None
            self.restarts = 1 if now - self._started_at > STEADY_S else self.restarts + 1
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (self.restarts - 1))
            self._start_again_at = now + pause_s
            return (
                f"{self.program.name} ended with code {code}; starting it again in {pause_s:g} s, see {self.log_path}"
            )
        if now >= self._start_again_at:
            self.start(now)
        return None

    def signal(self, number: signal.Signals) -> None:
        """Reach the whole process group: a worker's children too."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def wait(self, timeout_s: float) -> bool:
        if self._process is None:
            return True
        try:
            self._process.wait(max(0.0, timeout_s))
        except subprocess.TimeoutExpired:
            return False
        return True


class Household:
    """All child processes of one demo, and a record of them on disk so that the next run can clear up after a crash."""

    def __init__(self, folder: Path, say: Callable[[str], None] = print) -> None:
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self._record = folder / "processes.json"
        self._children: dict[str, Child] = {}
        self._say = say

    def __iter__(self) -> Iterator[Child]:
        return iter(self._children.values())

    def __getitem__(self, name: str) -> Child:
        return self._children[name]

    def start(self, program: Program) -> Child:
        child = Child(program, self.logs / f"{program.name}.log")
        self._children[program.name] = child
        child.start(time.monotonic())
        self._write_record()
        return child

    def tend(self) -> None:
        """Look after every child once."""
        before = [child.pid for child in self]
        for child in self:
            if event := child.tend(time.monotonic()):
                self._say(event)
        if before != [child.pid for child in self]:
            self._write_record()

    def stop(self, grace_s: float = 8.0) -> None:
        """Ask every process group to end, last started first; kill what has not ended after the grace."""
        children = list(reversed(self._children.values()))
        for child in children:
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        for child in children:
            child.wait(deadline - time.monotonic())
        for child in children:
            child.signal(signal.SIGKILL)
            child.wait(5)
        self._children.clear()
        self._record.unlink(missing_ok=True)

    def _write_record(self) -> None:
        identities = [identity(child.pid) for child in self if child.pid]
        self._record.write_text(json.dumps([known for known in identities if known]))


def stopping_on(*numbers: signal.Signals) -> threading.Event:
    """An event that is set when this process gets one of the signals.

    Its handler must not set it: it interrupts the main thread anywhere, also where that thread looks at the event and
    holds its lock, and would wait for that lock forever. So the handler only passes on, and a thread sets it.
    """
    stop = threading.Event()
    heard: queue.SimpleQueue[int] = queue.SimpleQueue()  # the one queue that may be interrupted by itself
    for number in numbers:
        signal.signal(number, lambda number, _: heard.put(number))

    def set_when_heard() -> None:
        heard.get()
        stop.set()

    threading.Thread(target=set_when_heard, name="signals", daemon=True).start()
    return stop


def identity(pid: int) -> tuple[int, float] | None:
    """A process id with its start time: the pair is not used twice."""
    try:
        return pid, psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None


def end_leftovers(record: Path) -> None:
    """End the process groups that a killed supervisor left behind, and only those."""
    if not record.exists():
        return
    with suppress(ValueError):
        known = [
            (pid, started_at)
            for pid, started_at in json.loads(record.read_text())
            if identity(pid) == (pid, started_at)
        ]
        for pid, _ in known:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(pid) for pid, _ in known if psutil.pid_exists(pid)], timeout=5)
    record.unlink(missing_ok=True)


def rotate(log: Path) -> None:
    """Keep one older log; a log begins anew beyond its limit."""
    if log.exists() and log.stat().st_size > LOG_LIMIT_BYTES:
        os.replace(log, log.with_suffix(".log.1"))


@contextmanager
def on_cores(cores: frozenset[int]) -> Iterator[None]:
    """What is started inside inherits the affinity of this thread; cores that the machine lacks are left out."""
    if not hasattr(os, "sched_getaffinity"):
        yield
        return
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, usable(cores))
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


def usable(cores: frozenset[int]) -> set[int]:
    """Those of them that there are; all that there are where it is none."""
    mine = os.sched_getaffinity(0)
    return set(cores & mine) or mine
