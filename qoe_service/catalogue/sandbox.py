"""Runs untrusted models in a child process: bounded, alone in a private folder, without credentials, killable.

The child shares no Python state with the service. It answers with one small JSON file; whatever else happens to it
becomes a refusal with a reason, and the parent lives on.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import psutil
from django.conf import settings

from qoe_service.catalogue import control_groups

FOLDER = Path(__file__).parent
LAUNCHER = FOLDER / "sandboxed" / "launcher.py"
PREFIX, LOCK = "qoe-sandbox-", "lock"
RESULT, PROGRESS = "result.json", "progress"
MAX_RESULT_BYTES = 1_048_576
POLL_S, MEMORY_POLL_S, WATCH_S = 0.05, 0.1, 0.25
SWEEP_AFTER_S = 60.0
REAPED_WITHIN_S, KILLED_WITHIN_S = 0.25, 1.0
PROBED_WITHIN_S = 30.0
# Measured: Python with ONNX, ONNX Runtime and a small model; peak bytes per byte of a model that is checked; and, with
# some room, of one whose weights lie before its graph (1.4 for 512 MiB of dense layers).
BASE_MEMORY_BYTES, MEASURING_FACTOR, CONTAINER_FACTOR = 128 * 2**20, 4.0, 2.0
PRIVATE_UIDS = (61184, 65519)  # what systemd, too, gives to programs that need a user of their own for a while

Watch = Callable[[float], bool]


class Refused(Exception):
    """The model, the data or the pass cannot be used; the text tells an operator why."""


class Cancelled(Exception):
    """The watcher asked to stop; the child is dead."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one sandboxed program may use."""

    wall_s: float = 600.0
    cpu_s: int = 300
    memory_bytes: int = 2 * 2**30
    file_bytes: int = 4 * 2**30 + 2**24
    open_files: int = 256

    def as_rlimits(self) -> dict[str, int]:
        """For the launcher. No RLIMIT_AS: ONNX Runtime maps far more than it uses, so memory is watched instead."""
        return {
            "RLIMIT_CPU": self.cpu_s,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_CORE": 0,
        }


class Sandbox:
    """A private folder, and the programs that run in it."""

    def __init__(self, folder: Path, limits: Limits, uid: int | None = None) -> None:
        self.folder = folder
        self.limits = limits
        self._uid = uid

    def add(self, name: str, source: BinaryIO) -> None:
        """Copy a file into the folder, so that no program touches the original."""
        with source, (self.folder / name).open("wb") as target:
            shutil.copyfileobj(source, target, 262_144)

    def open(self, name: str) -> BinaryIO:
        """A file that a program left behind: no link out of the folder and no endless pipe. Raises Refused."""
        try:
            # without NONBLOCK, opening a pipe waits until somebody writes
            descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            raise Refused(f"the program that reads models left no usable file {name}") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise Refused(f"the program that reads models left something else than a file as {name}")
        return os.fdopen(descriptor, "rb")

    def ask(self, request: dict[str, Any], *, program: str = "sandboxed", watch: Watch | None = None) -> dict[str, Any]:
        """Let one of our own programs answer a request. Raises Refused or Cancelled."""
        (self.folder / "request.json").write_text(json.dumps(request))
        self.run(FOLDER, program, watch=watch)
        answer = self._answer()
        if "refusal" in answer:
            raise Refused(str(answer["refusal"])[:2000])
        return answer

    def run(self, path: Path, module: str, *arguments: str, watch: Watch | None = None) -> None:
        """Run a Python module found in ``path`` to its end. Raises Refused or Cancelled."""
        with (
            control_groups.limited(self.limits.memory_bytes) as group,
            (self.folder / "stdout").open("wb") as out,
            (self.folder / "stderr").open("wb") as err,
        ):
            process = subprocess.Popen(
                [*_python(), self._bounds(group), str(path), module, *arguments],
                cwd=self.folder,
                env=environment(self.folder),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            try:
                self._supervise(process, watch)
            finally:
                _kill_group(process)
            if process.returncode != 0 and group is not None and group.ran_out_of_memory():
                raise Refused(self._too_much_memory())
        if process.returncode != 0:
            raise Refused(_how_it_ended(process.returncode, self.tail_of_errors()))

    def _bounds(self, group: control_groups.ControlGroup | None) -> str:
        """What the launcher does to itself before it becomes the program."""
        members = str(group.members) if group else None
        bounds = {"limits": self.limits.as_rlimits(), "uid": self._uid, "members": members}
        return json.dumps({**bounds, "alone": can_hide_processes()})

    def tail_of_errors(self) -> str:
        """The last lines that the child wrote for people."""
        with self.open("stderr") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 2000, 0))
            return file.read().decode(errors="replace").strip()[-500:]

    def _answer(self) -> dict[str, Any]:
        try:
            with self.open(RESULT) as file:
                answer = json.loads(file.read(MAX_RESULT_BYTES))
        except (Refused, OSError, ValueError):
            raise Refused("the program that reads models gave no answer") from None
        if not isinstance(answer, dict):
            raise Refused("the program that reads models gave no answer")
        return answer

    def _supervise(self, process: subprocess.Popen[bytes], watch: Watch | None) -> None:
        started = memory_checked = watched = time.monotonic()
        while not _has_ended(process):
            now = time.monotonic()
            if now - started > self.limits.wall_s:
                raise Refused(f"took longer than {self.limits.wall_s:g} s")
            if now - memory_checked >= MEMORY_POLL_S:
                memory_checked = now
                self._check_memory(process.pid)
            if watch is not None and now - watched >= WATCH_S:
                watched = now
                if not watch(self._progress()):
                    raise Cancelled
            time.sleep(POLL_S)

    def _check_memory(self, pid: int) -> None:
        try:
            child = psutil.Process(pid)
            used = sum(_resident_bytes(each) for each in (child, *child.children(recursive=True)))
        except psutil.NoSuchProcess:
            return
        if used > self.limits.memory_bytes:
            raise Refused(self._too_much_memory())

    def _too_much_memory(self) -> str:
        return f"needs more than {self.limits.memory_bytes // 2**20} MiB of memory"

    def _progress(self) -> float:
        try:
            with self.open(PROGRESS) as file:
                return min(max(float(file.read(32)), 0.0), 1.0)
        except (Refused, OSError, ValueError):
            return 0.0


@contextlib.contextmanager
def opened(limits: Limits | None = None) -> Iterator[Sandbox]:
    """A fresh sandbox whose folder goes away with it."""
    _sweep()
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with (folder / LOCK).open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            uid = _private_uid(folder)
            yield Sandbox(folder, limits or Limits(memory_bytes=settings.SANDBOX_MEMORY_BYTES), uid)


def check_memory(limits: Limits, model_bytes: int, factor: float, *, what: str) -> dict[str, Any]:
    """Raises Refused beforehand where a program would exceed the sandbox's memory, with the estimate.

    The answer goes into the request, so that the program can add what the model's layers hold, which only it can see.
    """
    needed = BASE_MEMORY_BYTES + int(factor * model_bytes)
    if needed > limits.memory_bytes:
        raise Refused(
            f"{what} would need about {needed // 2**20} MiB of memory ({factor:g} times the model and "
            f"{BASE_MEMORY_BYTES // 2**20} MiB); the sandbox has {limits.memory_bytes // 2**20} MiB "
            "(SANDBOX_MEMORY_BYTES)"
        )
    return {"what": what, "needed_bytes": needed, "limit_bytes": limits.memory_bytes}


def _private_uid(folder: Path) -> int | None:
    """A user of its own for one sandbox, where we may give one; the folder becomes its. None: the worker's own."""
    if os.geteuid() != 0 or not can_others_run_python():
        return None
    uid = random.randint(*PRIVATE_UIDS)
    os.chown(folder, uid, uid)
    return uid


@functools.cache
def can_others_run_python() -> bool:
    """Whether another user could read the interpreter, its packages and our programs."""
    places = {sys.executable, os.path.realpath(sys.executable), sys.prefix, sys.base_prefix, psutil.__file__}
    places |= {str(LAUNCHER), str(settings.BASE_DIR), tempfile.gettempdir()}
    return all(_is_open_to_others(Path(each)) for each in places)


@functools.cache
def can_hide_processes() -> bool:
    """Whether a program can go on without seeing any other process, and with a /proc that says the same."""
    bounds: dict[str, Any] = {"limits": {}, "uid": None, "members": None, "alone": True}
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name, contextlib.suppress(subprocess.TimeoutExpired):
        command = [*_python(), json.dumps(bounds), str(FOLDER), "sandboxed.alone"]
        given: dict[str, Any] = {"cwd": name, "env": environment(Path(name)), "capture_output": True}
        return subprocess.run(command, **given, timeout=PROBED_WITHIN_S, check=False).returncode == 0
    return False


def _is_open_to_others(path: Path) -> bool:
    wanted = stat.S_IROTH | (stat.S_IXOTH if path.is_dir() else 0)
    ways = all(each.stat().st_mode & stat.S_IXOTH for each in path.absolute().parents)
    return ways and path.stat().st_mode & wanted == wanted


def _sweep() -> None:
    """Remove what killed workers left: folders whose lock nobody holds any more."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime < SWEEP_AFTER_S:
                continue  # perhaps made this moment, and not locked yet
            with path.open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.parent, ignore_errors=True)


def _python() -> Sequence[str]:
    # -s and -P: neither a user's packages nor the working folder can slip a module in
    return (sys.executable, "-s", "-P", str(LAUNCHER), str(os.getpid()))


def environment(folder: Path) -> dict[str, str]:
    """Nothing of the service's environment. One thread each, and a fixed hash seed: same input, same bytes."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    places = {"PATH": os.defpath, "HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8"}
    # official builds of ONNX Runtime since 1.29 report usage over the network unless told not to
    quiet = {"ORT_DISABLE_TELEMETRY": "1", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    return {**places, **one_thread, **quiet}


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    # WNOWAIT keeps the process id taken until the whole group is killed, so the id cannot be somebody else's by then
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the session, and children that left it; come back when they are dead.

    Children first: a launcher outside their namespace reaps them and ends. Were it killed before, the namespace would
    last until the machine's first process reaps them, which may take a second, or for ever.
    """
    left = _descendants(process.pid)
    for each in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    if left:
        _wait_while(lambda: not _has_ended(process), REAPED_WITHIN_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _wait_while(lambda: any(_is_alive(each) for each in left), KILLED_WITHIN_S)


def _wait_while(holds: Callable[[], bool], seconds: float) -> None:
    ends = time.monotonic() + seconds
    while holds() and time.monotonic() < ends:
        time.sleep(0.005)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _how_it_ended(code: int, errors: str) -> str:
    if code == -signal.SIGXCPU:
        return "used up its CPU time"
    if code < 0:
        return f"crashed the program that reads models ({signal.Signals(-code).name})"
    return f"could not be read: {errors.splitlines()[-1] if errors else f'exit code {code}'}"
