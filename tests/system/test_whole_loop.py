"""The whole loop with real processes: agents serve real models, apps rate, the learner learns, models are pushed.

One story, told on both ways to run: embedded, and on PostgreSQL and Redis.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.system.backends import embedded, free_port, servers

ROOT = Path(__file__).resolve().parent.parent.parent
THREE_DEVICES = """
import sys
from dataclasses import replace
from pathlib import Path
from demo import models
from demo.devices import DEVICES
from demo.supervisor import Options, up
# Less to compress and to judge: two of the three networks, 300 of the 1800 held-out pictures.
def judged_by_fewer(application, load=models.load_data):
    data = load(application)
    return replace(data, heldout_inputs=data.heldout_inputs[:300], heldout_labels=data.heldout_labels[:300])
models.load_data = judged_by_fewer
smaller = models.digits_models()[:2]
models.digits_models = lambda: smaller
devices = [device for device in DEVICES if device.name in {"workstation", "tablet", "camera"}]
sys.exit(up(Options(port=int(sys.argv[1]), folder=Path(sys.argv[2]), devices=devices)))
"""


class Loop:
    """A running demo with three devices, seen from outside: its commands, its pages, its processes."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.folder, self.port = folder, free_port()
        # The loop runs as a user starts it: nothing of the test's own settings may reach it.
        inherited = {
            name: value for name, value in os.environ.items() if name not in {"DJANGO_SETTINGS_MODULE", "DATA_DIR"}
        }
        self.environment = {**inherited, **settings, "FIRST_POLICY_AFTER": "6", "RESCAN_S": "1"}
        self.log = folder / "supervisor.log"
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-u", "-c", THREE_DEVICES, str(self.port), str(self.folder / "demo")],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start_again(self) -> None:
        self.process = self._start()

    def stop(self) -> int:
        """What Ctrl-C does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(30)

    def manage(self, *arguments: str) -> str:
        environment = self.environment | {"DATA_DIR": str(self.folder / "demo" / "service")}
        command = [sys.executable, "manage.py", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def verdict(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.manage("verdict", "digits", "--json").splitlines()[-1])
        return value

    def rows(self, model: str) -> list[dict[str, Any]]:
        """The fields of every row of a model, as the service's own command prints them."""
        return [row["fields"] for row in json.loads(self.manage("dumpdata", model))]

    def metric(self, name: str, label: str = "") -> float:
        """Sum over the labels, or where one has this value; 0 while nothing of the kind exists."""
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        assert f"# HELP {name} " in text, f"{name} is no metric"
        labels = rf'{{[^}}]*="{label}"[^}}]*}}' if label else r"(?:{[^}]*})?"
        values = re.findall(rf"^{name}{labels} (\S+)$", text, flags=re.MULTILINE)
        return sum(float(value) for value in values)

    def until(self, what: str, holds: Callable[[], bool], timeout_s: float) -> None:
        """Wait for something that must come; what the processes said is shown when it does not."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the demo ended while waiting for {what}:\n{self.log.read_text()}"
            if holds():
                return
            time.sleep(1.0)
        logs = "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in self.folder.glob("demo/logs/*.log"))
        pytest.fail(f"waited {timeout_s:g} s in vain for {what}\n{self.log.read_text()[-3000:]}\n{logs}")

    def processes(self, word: str) -> list[psutil.Process]:
        """Processes that this demo started whose command line holds the word."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if word in command_of(child)]

    def app_counts(self) -> dict[str, int]:
        total = {"requests": 0, "failed": 0}
        for path in self.folder.glob("demo/devices/*/app-*.json"):
            counts = json.loads(path.read_text())
            total = {name: total[name] + counts[name] for name in total}
        return total


@contextmanager
def running_loop(folder: Path, settings: dict[str, str]) -> Iterator[Loop]:
    loop = Loop(folder, settings)
    try:
        yield loop
    finally:
        loop.stop()


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def operator_session(loop: Loop) -> httpx.Client:
    """An operator who logs in with the password that was printed once."""
    match = re.search(r"password (\S{12,})", loop.log.read_text())
    assert match, "no password was printed"
    client = httpx.Client(base_url=loop.url, follow_redirects=True, timeout=10)
    client.get("/login/")
    token = client.cookies["csrftoken"]
    password = match.group(1)
    fields = {"username": "operator", "password": password, "csrfmiddlewaretoken": token, "next": "/"}
    answer = client.post("/login/", data=fields, headers={"Referer": f"{loop.url}/login/"})
    assert answer.status_code == 200
    assert "workstation" in answer.text
    return client


def command_of(process: psutil.Process) -> str:
    """Its command line; nothing of one that ends while it is listed."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # a zombie, too
        return ""


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs still: one that nobody has reaped does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.timeout(280)
@pytest.mark.parametrize("backend", [embedded, servers])
def test_devices_learn_which_model_serves_them_best(
    backend: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("loop")
    with ExitStack() as stack:
        settings = stack.enter_context(backend(folder))
        loop = stack.enter_context(running_loop(folder, settings))
        loop.until("the console", lambda: is_up(loop.url), 90)
        loop.until("variants that were compressed here", lambda: loop.metric("qoe_variants") >= 7, 120)
        loop.until("a first policy", lambda: loop.metric("qoe_policy_number") >= 1, 120)
        with closing(operator_session(loop)) as console:
            assert "committed" in console.get("/").text

        learner = loop.processes("learning")[0]
        learner.kill()
        seen = loop.metric("qoe_policy_number")
        loop.until("the learner to go on after kill -9", lambda: loop.metric("qoe_policy_number") > seen, 60)
        for worker in loop.processes("-Q service"):
            worker.kill()
        joined = loop.metric("qoe_decisions", "joined")
        loop.until("leases to close after kill -9", lambda: loop.metric("qoe_decisions", "joined") > joined + 1, 60)

        def swapped() -> int:
            outcomes = loop.rows("rollouts.attemptoutcome")
            return len({row["device"] for row in outcomes if row["outcome"] == "committed"})

        loop.until("every device to have swapped once", lambda: swapped() == 3, 60)
        learnt = [row for row in loop.rows("decisions.decision") if row["policy_number"] > 0 and row["active_at"]]
        assert learnt, "no choice of a learnt policy became active"
        assert all(abs(sum(row["candidates"]["probability"]) - 1) < 1e-6 for row in learnt)
        assert "match" in loop.manage("replay", "digits")
        assert loop.metric("qoe_orphans") == 0
        counts = loop.app_counts()
        assert counts["requests"] > 200
        assert counts["failed"] == 0
        before = loop.verdict()
        joined = loop.metric("qoe_decisions", "joined")
        assert before["feedback"] > before["decisions"]

        children = psutil.Process(loop.process.pid).children(recursive=True)
        assert loop.stop() == 0
        _, left = psutil.wait_procs([child for child in children if is_alive(child)], timeout=2)  # the kernel ends some
        assert not [child for child in left if is_alive(child)]

        loop.start_again()
        loop.until("the console of a second run", lambda: is_up(loop.url), 60)
        loop.until("more decisions", lambda: loop.metric("qoe_decisions", "joined") > joined, 60)
        assert "going on from the data of the last run" in loop.log.read_text()
