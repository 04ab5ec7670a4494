"""`python -m demo up`: says what to do when it cannot start, and leaves nothing behind when it is stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from demo.installation import Secrets
from demo.preflight import MARKER, CannotStart, check_python, check_start, claim, clear, free_ports, is_free
from demo.processes import identity
from demo.service import CommandFailed, Service, Stopped
from demo.status import app_counts, line
from demo.supervisor import log_in, say

UP = [sys.executable, "-m", "demo", "up"]


@contextmanager
def listening() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_port_in_use_is_said_with_the_command_that_works(tmp_path: Path) -> None:
    with listening() as port:
        arguments = [*UP, "--port", str(port), "--data", str(tmp_path / "data")]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()
    assert f"port {port} is in use" in said
    suggested = int(said.split("PORT=")[1].split()[0])
    assert suggested > port
    assert not (tmp_path / "data" / "service").exists()


LEFT_BEHIND = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(60)"


def test_what_a_killed_supervisor_left_behind_ends_even_if_it_holds_the_port(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / MARKER).touch()
    (port,) = free_ports(1, 28_000 + os.getpid() % 10_000)
    with subprocess.Popen([sys.executable, "-c", LEFT_BEHIND, str(port)], start_new_session=True) as left_behind:
        while is_free(port):
            time.sleep(0.02)
        (data / "processes.json").write_text(json.dumps([identity(left_behind.pid)]))
        arguments = [*UP, "--port", str(port), "--data", str(data)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as supervisor:
            assert supervisor.stdout
            assert "starting with empty data" in supervisor.stdout.readline()
            supervisor.terminate()
        assert left_behind.wait(5) == -signal.SIGKILL


def test_starting_over_leaves_a_database_server_alone() -> None:
    check_start(False, {"DATABASE_URL": "postgres://somewhere/else"})
    with pytest.raises(CannotStart, match="DATABASE_URL"):
        check_start(True, {"DATABASE_URL": "postgres://somewhere/else"})


def test_a_terminal_that_is_gone_stops_nobody_from_stopping(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        say("stopping")
        monkeypatch.undo()
        with suppress(OSError):
            full.close()


def test_being_stopped_ends_every_process_that_was_started(tmp_path: Path) -> None:
    arguments = [*UP, "--port", str(free_ports(1, 18_000 + os.getpid() % 10_000)[0]), "--data", str(tmp_path / "data")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as supervisor:
        record = tmp_path / "data" / "processes.json"
        deadline = time.monotonic() + 60
        while not record.exists() or len(json.loads(record.read_text() or "[]")) < 4:
            assert supervisor.poll() is None, supervisor.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        started = [pid for pid, _ in json.loads(record.read_text())]
        assert all(psutil.pid_exists(pid) for pid in started)
        supervisor.send_signal(signal.SIGTERM)
        printed, _ = supervisor.communicate(timeout=30)
    assert supervisor.returncode == 0
    assert not any(psutil.pid_exists(pid) for pid in started)
    assert printed.rstrip().endswith("stopped")
    assert not record.exists()


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CannotStart, match="holds something else"):
        claim(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_two_demos_do_not_share_a_folder(tmp_path: Path) -> None:
    with claim(tmp_path / "data"), pytest.raises(CannotStart, match="another demo runs"):
        claim(tmp_path / "data")
    with claim(tmp_path / "data"):
        pass


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CannotStart, match="--data"):
        claim(tmp_path / "file" / "data")


def test_starting_over_forgets_everything_but_the_claim(tmp_path: Path) -> None:
    with claim(tmp_path / "data"):
        (tmp_path / "data" / "service").mkdir()
        (tmp_path / "data" / "service" / "db.sqlite3").touch()
        clear(tmp_path / "data")
        assert not (tmp_path / "data" / "service").exists()
    with claim(tmp_path / "data"):
        pass


@pytest.mark.parametrize("version", [(3, 10), (3, 14), (2, 7)])
def test_a_wrong_python_is_said(version: tuple[int, int]) -> None:
    with pytest.raises(CannotStart, match=r"3\.11, 3\.12 or 3\.13"):
        check_python(version)


def test_a_failing_command_says_what_went_wrong(tmp_path: Path) -> None:
    service = Service(tmp_path, 1)
    with pytest.raises(CommandFailed, match="no_such_command"):
        service.manage("no_such_command")


def test_a_command_ends_when_the_demo_is_stopped(tmp_path: Path) -> None:
    service = Service(tmp_path, 1)
    threading.Timer(0.2, service.stop.set).start()
    started = time.monotonic()
    with pytest.raises(Stopped):
        service.manage("shell", "-c", "import time; time.sleep(60)")
    assert time.monotonic() - started < 10


def test_secrets_are_made_once_and_are_for_their_owner_only(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path / "secrets")
    secrets.keep("key", lambda: "first")
    secrets.keep("key", lambda: "second")
    assert secrets.path("key").read_text() == "first"
    assert secrets.path("key").stat().st_mode & 0o777 == 0o600


def test_the_log_in_line_shows_a_password_once() -> None:
    assert "s3cret" in log_in("operator operator password s3cret")
    assert "first run" in log_in("operator operator exists")


def test_the_status_line_sums_the_apps_and_tells_evidence_from_none(tmp_path: Path) -> None:
    for name, failed in (("phone", 0), ("camera", 2)):
        (tmp_path / name).mkdir()
        counts = {"requests": 10, "failed": failed, "refused": 0}
        (tmp_path / name / "app-digits.json").write_text(json.dumps(counts))
    verdict = {"decisions": 7, "feedback": 9, "qoe": {"mean": 0.7}, "lift_over_uniform": None}
    said = line(verdict, app_counts(tmp_path))
    assert "decisions 7" in said
    assert "not enough evidence" in said
    assert "20 requests, 2 failed" in said
    lift = {"mean": 0.2, "low": 0.1, "high": 0.3}
    assert "+0.20 (+0.10 to +0.30)" in line(verdict | {"lift_over_uniform": lift}, app_counts(tmp_path))
