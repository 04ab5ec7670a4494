from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from django.core.management import call_command

from qoe_service.catalogue import sandbox
from qoe_service.catalogue.sandbox import Cancelled, Limits, Refused, Sandbox

MIB = 2**20


def run(tmp_path: Path, program: str, limits: Limits | None = None, watch: sandbox.Watch | None = None) -> Sandbox:
    """Run a program of our own in a sandbox whose folder stays for the test to look at."""
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "program.py").write_text(program)
    (tmp_path / "box").mkdir()
    box = Sandbox(tmp_path / "box", limits or Limits())
    box.run(tmp_path / "programs", "program", watch=watch)
    return box


def running(seconds: str) -> list[int]:
    """The programs ``sleep SECONDS`` of this machine: inside a sandbox process ids may be others than outside."""
    return [each.pid for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"] == ["sleep", seconds]]


def is_kept_up(holds: Callable[[], bool], seconds: float = 1.0) -> bool:
    """Whether something still holds after a while; ends as soon as it does not."""
    ends = time.monotonic() + seconds
    while holds():
        if time.monotonic() > ends:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("program", "limits", "reason"),
    [
        ("while True: pass", Limits(cpu_s=2), "CPU time"),
        ("import time; time.sleep(60)", Limits(wall_s=0.5), "longer than 0.5 s"),
        ("held = bytearray(300 * 2**20)\nimport time; time.sleep(60)", Limits(memory_bytes=100 * MIB), "100 MiB"),
        ("open('f', 'wb').write(bytes(2 * 2**20))", Limits(file_bytes=MIB), "File too large"),
        ("held = [open('/dev/null') for _ in range(100)]", Limits(open_files=40), "Too many open files"),
        ("import os; os.abort()", Limits(), "SIGABRT"),
        ("import ctypes; ctypes.string_at(0)", Limits(), "SIGSEGV"),
        ("raise ValueError('odd bytes')", Limits(), "odd bytes"),
        ("import sys; sys.exit(3)", Limits(), "exit code 3"),
    ],
)
def test_whatever_goes_wrong_in_the_child_becomes_a_reason(
    tmp_path: Path, program: str, limits: Limits, reason: str
) -> None:
    with pytest.raises(Refused, match=reason):
        run(tmp_path, program, limits)


def test_the_child_sees_no_secret_of_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "do-not-show")
    monkeypatch.setenv("DATABASE_URL", "postgres://user:password@host/name")
    box = run(tmp_path, "import os, json; print(json.dumps(dict(os.environ)))")
    seen = json.loads((box.folder / "stdout").read_text())
    assert "do-not-show" not in str(seen)
    assert set(seen) <= {
        *(
            "PATH",
            "HOME",
            "TMPDIR",
            "LANG",
            "LC_CTYPE",
            "PYTHONHASHSEED",
            "PYTHONDONTWRITEBYTECODE",
            "ORT_DISABLE_TELEMETRY",
        ),
        *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
    }


def test_the_child_is_a_nice_session_of_its_own_without_core_dumps(tmp_path: Path) -> None:
    program = "import os, resource; print(os.getsid(0) == os.getpid(), os.nice(0), resource.getrlimit(4)[0])"
    box = run(tmp_path, program)
    leader, niceness, core_bytes = (box.folder / "stdout").read_text().split()
    assert (leader, core_bytes) == ("True", "0")
    assert int(niceness) >= min(os.nice(0) + 10, 19)


def test_the_programs_that_read_models_import_nothing_of_the_service() -> None:
    with sandbox.opened() as box:
        (box.folder / "probe.py").write_text(
            "import sys; sys.path.append(sys.argv[1])\n"
            "import sandboxed.__main__\n"
            "print(sorted({name.split('.')[0] for name in sys.modules} & {'django', 'celery', 'qoe_service'}))"
        )
        box.run(box.folder, "probe", str(sandbox.FOLDER))
        assert (box.folder / "stdout").read_text().strip() == "[]"


@pytest.mark.parametrize("session", [False, True])
def test_a_cancelled_program_and_its_children_are_dead_within_two_seconds(tmp_path: Path, session: bool) -> None:
    seconds = f"60.{os.getpid()}"
    program = (
        "import subprocess, time\n"
        f"child = subprocess.Popen(['sleep', '{seconds}'], start_new_session={session})\n"
        "time.sleep(60)"
    )
    asked_at: list[float] = []

    def watch(_: float) -> bool:
        if running(seconds):
            asked_at.append(time.monotonic())
        return not asked_at

    with pytest.raises(Cancelled):
        run(tmp_path, program, watch=watch)
    assert time.monotonic() - asked_at[0] < 2
    assert not running(seconds)


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_when_the_sandbox_comes_back_nothing_of_it_is_left_to_reap(tmp_path: Path, is_cancelled: bool) -> None:
    if not sandbox.can_hide_processes():
        pytest.skip("the kernel grants no process namespaces here; doctor says so")
    seen: set[psutil.Process] = set()
    others = set(psutil.Process().children(recursive=True))  # an earlier test's browser, say

    def watch(progress: float) -> bool:
        seen.update(set(psutil.Process().children(recursive=True)) - others)
        return progress < 1 or not is_cancelled

    program = f"import time; open('progress', 'w').write('1'); time.sleep({60 if is_cancelled else 1})"
    with pytest.raises(Cancelled) if is_cancelled else contextlib.nullcontext():
        run(tmp_path, program, watch=watch)
    assert len(seen) == 3  # the launcher, the first process of its namespace, and the program
    assert not [each for each in seen if each.is_running()]


def test_what_a_program_leaves_running_ends_with_it(tmp_path: Path) -> None:
    seconds = f"61.{os.getpid()}"
    run(tmp_path, f"import subprocess; subprocess.Popen(['sleep', '{seconds}'], start_new_session=True)")
    if sandbox.can_hide_processes():
        assert not is_kept_up(lambda: bool(running(seconds)))


def test_the_child_sees_no_other_process_where_namespaces_allow(tmp_path: Path) -> None:
    if not sandbox.can_hide_processes():
        pytest.skip("the kernel grants no process namespaces here; doctor says so")
    box = run(tmp_path, "import os; print(os.getpid(), sum(name.isdigit() for name in os.listdir('/proc')))")
    assert (box.folder / "stdout").read_text().split() == ["2", "2"]


def test_progress_reaches_the_watcher(tmp_path: Path) -> None:
    seen: list[float] = []

    def watch(progress: float) -> bool:
        seen.append(progress)
        return progress < 0.5

    with pytest.raises(Cancelled):
        run(tmp_path, "import time; open('progress', 'w').write('0.625'); time.sleep(60)", watch=watch)
    assert seen[-1] == 0.625


def test_the_child_reaches_no_network_where_namespaces_allow(tmp_path: Path) -> None:
    namespaces = ctypes.CDLL(None)
    child = os.fork()
    if child == 0:
        os._exit(namespaces.unshare(0x10000000 | 0x40000000) != 0)
    if os.waitpid(child, 0)[1] != 0:
        pytest.skip("the kernel grants no namespaces here; doctor says so")
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = (
            "import socket\n"
            f"try: socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)\n"
            "except OSError as error: print(error)"
        )
        box = run(tmp_path, program)
    assert "unreachable" in (box.folder / "stdout").read_text()


def test_a_program_that_starts_others_can_gain_no_rights(tmp_path: Path) -> None:
    box = run(tmp_path, "print(open('/proc/self/status').read(), open('/proc/self/oom_score_adj').read())")
    status = (box.folder / "stdout").read_text()
    assert "NoNewPrivs:\t1" in status
    assert status.strip().endswith("1000")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
@pytest.mark.parametrize("alone", [False, True])
def test_as_root_the_child_can_become_a_user_who_owns_its_folder_alone(tmp_path: Path, alone: bool) -> None:
    if alone and not sandbox.can_hide_processes():
        pytest.skip("the kernel grants no process namespaces here; doctor says so")
    python = "/usr/bin/python3"
    if not os.access(python, os.X_OK):
        pytest.skip("no Python that others may run")
    launcher = shutil.copy(sandbox.LAUNCHER, tmp_path)
    (tmp_path / "who.py").write_text("import os; print(os.getuid(), os.getgroups(), os.access('/etc/shadow', os.R_OK))")
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == 0 and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    bounds = json.dumps({"limits": Limits().as_rlimits(), "uid": 61190, "members": None, "alone": alone})
    said = subprocess.run(
        [python, launcher, str(os.getpid()), bounds, str(tmp_path), "who"], capture_output=True, text=True, check=True
    )
    assert said.stdout.split(maxsplit=1) == ["61190", "[] False\n"]


def test_what_would_not_fit_is_refused_beforehand_with_the_estimate() -> None:
    with pytest.raises(Refused, match=r"checking it would need about 528 MiB of memory \(4 times the model and 128"):
        sandbox.check_memory(Limits(memory_bytes=256 * MIB), 100 * MIB, 4.0, what="checking it")
    sandbox.check_memory(Limits(memory_bytes=1024 * MIB), 100 * MIB, 4.0, what="checking it")


def test_doctor_says_which_limits_are_real_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # the sandbox sets its own: no leak
    out = io.StringIO()
    call_command("doctor", stdout=out)
    said = out.getvalue()
    for limit in (
        "network",
        "own user",
        "other processes",
        "memory",
        "memory by the kernel",
        "CPU time",
        "file size",
        "open files",
        "core dumps",
        "credentials",
    ):
        assert f"{limit}: " in said, said
    assert "CPU time: real" in said
    assert "credentials: real" in said


@pytest.mark.parametrize("text", ["", "{", "[1]", '"text"'])
def test_an_answer_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(Refused, match="no answer"):
        Sandbox(tmp_path, Limits())._answer()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/etc/hostname", path)])
@pytest.mark.parametrize("name", ["derived.onnx", "result.json", "stdout", "progress"])
def test_what_the_child_leaves_instead_of_a_file_is_not_opened(
    tmp_path: Path, make: Callable[[str], None], name: str
) -> None:
    box = Sandbox(tmp_path, Limits())
    make(str(tmp_path / name))
    with pytest.raises(Refused, match=name):
        box.open(name)
    assert box._progress() == 0.0
    with pytest.raises(Refused, match="no answer"):
        box._answer()


def test_the_folder_goes_away_with_the_sandbox() -> None:
    with sandbox.opened() as box:
        box.add("model.onnx", io.BytesIO(b"model"))
        folder = box.folder
        assert folder.exists()
    assert not folder.exists()


def test_folders_of_killed_workers_are_swept_and_those_in_use_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    hour_ago = time.time() - 3600
    abandoned, foreign = tmp_path / "qoe-sandbox-dead", tmp_path / "sandbox-of-somebody-else"
    for folder in (abandoned, foreign):
        folder.mkdir()
        (folder / "lock").touch()
        os.utime(folder / "lock", (hour_ago, hour_ago))
    with sandbox.opened() as box:
        os.utime(box.folder / "lock", (hour_ago, hour_ago))
        with sandbox.opened():
            assert box.folder.exists()
    assert sorted(tmp_path.iterdir()) == [foreign]


def test_onnx_runtime_reports_to_nobody() -> None:
    with sandbox.opened() as box:
        (box.folder / "probe.py").write_text("import onnxruntime")
        box.run(box.folder, "probe")
        assert not [path for path in box.folder.rglob("*") if path.suffix in {".db", ".ses"} or path.name == ".cache"]
