"""A device of a new kind: the page says that nothing was measured, the gate holds, it measures, and both change."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from device_agents.agent import Agent
from device_agents.config import AgentConfig
from device_agents.profiling_jobs import Idleness
from device_agents.wire import Hardware
from tests.qoe_service.served import ROOT, Served, serve

AT_ONCE = Idleness(quiet_s=0.0, load_share=1.0, battery_share=0.0)
BOARD = Hardware(architecture="aarch64", cpu_model="Example board", cores=2, isa=("neon", "neon-dot"))

# What an operator does: an application without a baseline, one model with its data.
SET_UP = """
import django; django.setup()
from pathlib import Path
from django.utils import timezone
from qoe_service.catalogue import applications, datasets, imports
from tests.qoe_service.catalogue.tiny_models import dense_model, write_data, write_model
folder, now = Path(sys.argv[1]), timezone.now()
record = {"name": "quarters", "title": "Quarters", "slo_p95_ms": 500, "lease_s": 60, "configurations": [{}]}
dataset = datasets.import_dataset(path=write_data(folder / "data.npz"), now=now)
application = applications.define(record=record, dataset=dataset, now=now)
path = write_model(folder / "dense.onnx", dense_model())
imports.import_model(application=application, path=path, name="dense", now=now)
"""
WORK = """
import django; django.setup()
from django.utils import timezone
from qoe_service.catalogue import compression, jobs
for job_id in jobs.runnable(now=timezone.now()):
    print(compression.run(job_id=job_id, clock=timezone.now).compression_pass)
"""
DECIDE = """
import django; django.setup()
from qoe_service.rollouts import tasks
from qoe_service.rollouts.models import Assignment
Assignment.objects.update(undecided_until=None)
tasks.reconcile_due()
for each in Assignment.objects.select_related("decision"):
    print(each.decision.variant_digest if each.decision else each.undecided_why)
"""
OPERATOR = """
from django.core.management import execute_from_command_line
execute_from_command_line(["manage.py", "create_operator", "--username", "ada"])
"""


def run(served: Served, code: str) -> str:
    """A piece of the service's work in a process of its own, on its data."""
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "qoe_service.settings", "DATA_DIR": str(served.folder)}
    for name in ("DATABASE_URL", "REDIS_URL", "ARTIFACT_DIR"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}", str(served.folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path) as running:
        run(running, SET_UP)
        yield running


@pytest.fixture
def console(served: Served) -> Iterator[httpx.Client]:
    password = run(served, OPERATOR).split()[-1]
    with httpx.Client(base_url=served.url, follow_redirects=True, timeout=20) as client:
        client.get("/login/")
        fields = {"username": "ada", "password": password, "csrfmiddlewaretoken": client.cookies["csrftoken"]}
        assert client.post("/login/", data=fields, headers={"Referer": served.url}).status_code == 200
        yield client


@pytest.fixture
def agent(served: Served, tmp_path: Path) -> Iterator[Agent]:
    config = AgentConfig(
        service_url=served.url, token=served.token, name="board-1", device_class="board", state_dir=tmp_path / "state",
        disk_reserve_bytes=0, profile_budget_s=0.05,
    )  # fmt: skip
    with Agent(config, idleness=AT_ONCE) as agent:
        agent.read_hardware = lambda: BOARD
        agent.enrol()
        yield agent


def shown(console: httpx.Client) -> str:
    """The page's text, on the board's class."""
    page = console.get("/applications/quarters/catalogue/", params={"class": "board"}).raise_for_status().text
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def until(question: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + 90
    while not question():
        assert time.monotonic() < end_s, what
        time.sleep(0.2)


@pytest.mark.timeout(240)
def test_a_new_kind_of_device_gets_a_variant_once_it_has_measured_it(
    served: Served, console: httpx.Client, agent: Agent
) -> None:
    agent.work_once()  # reports that it is idle; its threads do not run yet
    assert "board aarch64 neon-dot not measured accuracy not measured" in shown(console)
    assert "samples" in run(served, WORK), "a worker makes what the device measures on"
    agent.poke(check_in=True)
    agent.work_once()  # finds the job in its document
    page = shown(console)
    assert "measuring on board-1" in page
    assert "accuracy not measured" in page
    assert "0 on the front for board" in page
    assert "not_measured" in run(served, DECIDE), "the gate holds: neither measured nor explored"

    agent.start()
    until(lambda: "measuring on" not in shown(console), "the device measured nothing")
    page = shown(console)
    assert "1 on the front for board" in page
    assert re.search(r"aarch64 neon-dot [\d.]+ ms a request", page), page
    assert re.search(r"100 % accurate, 98.1 % to 100 % 200 samples, board-1", page), page
    measured = console.get("/api/v1/applications/quarters/measurements").raise_for_status().json()
    (accuracy,) = measured["accuracies"]
    assert (accuracy["isa"], accuracy["samples"]) == ("aarch64 neon-dot", 200)
    assert {(each["device_class"], each["isa"]) for each in measured["profiles"]} == {
        (None, ""),
        ("board", "aarch64 neon-dot"),
    }

    digest = run(served, DECIDE)
    assert digest == measured_digest(console)
    until(lambda: agent.executors.get("quarters") is not None, "the variant is not served")


def measured_digest(console: httpx.Client) -> str:
    (variant,) = console.get("/api/v1/applications/quarters/variants").raise_for_status().json()
    return str(variant["digest"])
