"""Who keeps the demo's processes restarts what dies, stops everything with descendants, clears up after a crash."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from demo.processes import Child, Household, Program, end_leftovers, rotate

SLEEP = "import time; time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); {SLEEP}"
PARENT = (
    f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); print('ready', flush=True); {SLEEP}"
)


# Half of the time that it waits so briefly, the event's lock is held.
WAITS_BRIEFLY = """
import random, signal
from demo.processes import stopping_on
for _ in range(100):
    stop = stopping_on(signal.SIGALRM)
    signal.setitimer(signal.ITIMER_REAL, random.uniform(0.001, 0.003))
    while not stop.wait(1e-6):
        pass
"""


def program(name: str, source: str) -> Program:
    return Program(name, [sys.executable, "-c", source])


def until(condition: Callable[[], object], within_s: float = 10) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def pid_of(child: Child) -> int:
    assert child.pid is not None
    return child.pid


def test_stopping_ends_descendants_and_what_ignores_the_signal(tmp_path: Path) -> None:
    household = Household(tmp_path)
    children = [household.start(program("parent", PARENT)), household.start(program("stubborn", STUBBORN))]
    until(lambda: all("ready" in child.log_path.read_text() for child in children))
    grandchildren = [found.pid for found in psutil.Process(pid_of(children[0])).children()]
    pids = [pid_of(child) for child in children] + grandchildren
    assert len(pids) == 3
    household.stop(grace_s=0.3)
    until(lambda: not any(is_alive(pid) for pid in pids))
    assert not (tmp_path / "processes.json").exists()


def test_a_signal_is_heard_whatever_it_interrupts() -> None:
    subprocess.run([sys.executable, "-c", WAITS_BRIEFLY], check=True, timeout=30)


def test_what_dies_is_started_again_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    household = Household(tmp_path, said.append)
    child = household.start(program("fragile", SLEEP))
    first = pid_of(child)
    psutil.Process(first).kill()

    def runs_again() -> bool:
        household.tend()
        return child.is_running and child.pid != first

    until(runs_again)
    household.stop()
    assert len(said) == 1
    assert "fragile ended with code -9" in said[0]
    assert "fragile.log" in said[0]


def test_what_keeps_dying_is_started_later_and_later(tmp_path: Path) -> None:
    child = Child(program("broken", "raise SystemExit(3)"), tmp_path / "broken.log")
    now, pauses = 0.0, []
    child.start(now)
    for _ in range(8):
        assert child.wait(10)
        said = child.tend(now)
        assert said is not None
        pause_s = float(said.split("again in ")[1].split(" s,")[0])
        assert child.tend(now + pause_s - 0.01) is None
        assert not child.is_running
        pauses.append(pause_s)
        now += pause_s
        child.tend(now)
    assert child.wait(10)
    assert pauses == [0.5, 1, 2, 4, 8, 15, 15, 15]


def test_what_a_killed_supervisor_left_is_ended_by_the_next_and_nothing_else(tmp_path: Path) -> None:
    household = Household(tmp_path)
    left = pid_of(household.start(program("left", SLEEP)))
    with subprocess.Popen([sys.executable, "-c", SLEEP], start_new_session=True) as stranger:
        record = tmp_path / "processes.json"
        # The stranger got a process id that the record knows, at another time.
        record.write_text(record.read_text().replace("]]", f"], [{stranger.pid}, 12.5]]"))
        end_leftovers(record)
        household["left"].wait(10)
        assert not is_alive(left)
        assert stranger.poll() is None
        stranger.kill()


def test_a_log_that_grew_large_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.processes.LOG_LIMIT_BYTES", 10)
    log = tmp_path / "web.log"
    log.write_text("more than ten bytes")
    rotate(log)
    assert not log.exists()
    assert (tmp_path / "web.log.1").read_text() == "more than ten bytes"
