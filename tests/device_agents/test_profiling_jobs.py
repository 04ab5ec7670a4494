"""Profiling jobs: only while the device is idle, never at the expense of what it serves, told once."""

from __future__ import annotations

import hashlib
import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from device_agents.agent import Agent
from device_agents.client import ServiceClient
from device_agents.config import AgentConfig
from device_agents.errors import AttemptFailed, ServiceRefused
from device_agents.profiling_jobs import Command, Idleness, Measured, ProfilingJobs, why_busy
from device_agents.store import Identity, Store
from device_agents.wire import (
    AccuracyReport,
    ApplicationReport,
    Hardware,
    ProfileReport,
    ProfilingJob,
    ProfilingResult,
    ProfilingState,
    Telemetry,
    UpdateState,
    VariantReference,
)
from tests.device_agents.conftest import MakeAgent
from tests.device_agents.fake_service import URL, FakeService, variant
from tests.device_agents.models import Model, scaling

TWICE = scaling(2)
AT_ONCE = Idleness(quiet_s=0.0, load_share=1.0, battery_share=0.0)
BOARD = Hardware(architecture="aarch64", isa=("neon", "neon-dot"))


def samples_file() -> Model:
    """Ten samples that ``scaling`` answers rightly."""
    inputs, content = np.eye(4, dtype=np.float32)[np.arange(10) % 4], io.BytesIO()
    np.savez_compressed(content, kind="top-1", inputs=inputs, expected=np.arange(10) % 4)
    return Model(content.getvalue())


SAMPLES = samples_file()


def job(job_id: str = "7-1", *, model: Model = TWICE, samples: Model = SAMPLES) -> ProfilingJob:
    return ProfilingJob(job_id=job_id, variant=variant(model), samples=variant(samples))


def report(rate_rps: float = 0.0, state: UpdateState = UpdateState.COMMITTED) -> ApplicationReport:
    return ApplicationReport(application="digits", state=state, arrival_rate_rps=rate_rps)


@dataclass
class Gauge:
    """Stands in for the command: waits until it is let go, and looks whether it should go on meanwhile."""

    started: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    may_end: threading.Event = field(default_factory=threading.Event)
    runs: int = 0
    digest: str = ""

    def __call__(self, model: Path, samples: Path, *, threads: int, go_on: Callable[[], None]) -> Measured:
        self.runs += 1
        self.started.release()
        while not self.may_end.wait(0.01):
            go_on()
        digest = self.digest or hashlib.sha256(model.read_bytes()).hexdigest()
        right = AccuracyReport(kind="top-1", samples=10, correct=9)
        return Measured(ProfileReport(digest=digest, threads=threads, a_ms=2.0, b_ms=0.5), right)


@dataclass
class Device:
    """Profiling jobs on a real state folder, a service in memory, and apps that ask as often as ``rate_rps``."""

    service: FakeService
    store: Store
    gauge: Gauge
    jobs: ProfilingJobs
    reports: list[ApplicationReport]
    told: threading.Semaphore

    def wait_for_end(self) -> ProfilingState:
        assert self.told.acquire(timeout=10)
        return self.jobs.state(Telemetry())


@pytest.fixture
def device(tmp_path: Path, store: Store, service: FakeService) -> Iterator[Device]:
    config = AgentConfig(service_url=URL, state_dir=tmp_path / "state", disk_reserve_bytes=0)
    identity = Identity(service_url=URL, device_id="device-1", credential="secret")
    client = ServiceClient(URL, identity=identity, transport=service.transport)
    service.offer(TWICE, SAMPLES)
    gauge, reports, told = Gauge(), [report()], threading.Semaphore(0)
    gauge.may_end.set()
    jobs = ProfilingJobs(
        config,
        store,
        fetch=client.download,
        reports=lambda: tuple(reports),
        in_use=set,
        read_hardware=lambda: BOARD,
        on_result=told.release,
        idleness=AT_ONCE,
        measure=gauge,
    )
    jobs.start()
    yield Device(service, store, gauge, jobs, reports, told)
    jobs.stop()
    client.close()


@pytest.mark.parametrize(
    ("telemetry", "reports", "says"),
    [
        (Telemetry(), [report()], ""),
        (Telemetry(), [report(0.1)], ""),
        (Telemetry(), [report(0.06), report(0.06)], "requests come in"),
        (Telemetry(), [report(state=UpdateState.SOAKING)], "an update is under way"),
        (Telemetry(cpu_load_share=0.6), [], "others use 60% of the processor"),
        (Telemetry(throttled=True), [], "the processor is throttled"),
        (Telemetry(battery_share=0.4), [], "the battery is at 40% and not charging"),
        (Telemetry(battery_share=0.4, charging=True), [], ""),
        (Telemetry(battery_share=0.9), [], ""),
        (Telemetry(network="metered"), [], "the network is metered"),
    ],
)
def test_what_keeps_a_device_from_measuring(telemetry: Telemetry, reports: list[ApplicationReport], says: str) -> None:
    assert why_busy(telemetry, reports, Idleness()) == says


def test_a_result_is_told_until_it_is_acknowledged(device: Device) -> None:
    device.jobs.order(job())
    told = device.wait_for_end()
    (result,) = told.results
    assert (result.job_id, result.error) == ("7-1", "")
    assert (result.architecture, result.isa) == ("aarch64", ("neon", "neon-dot"))
    assert result.profile is not None
    assert (result.profile.digest, result.profile.a_ms) == (TWICE.digest, 2.0)
    assert result.accuracy is not None
    assert told.job_id is None
    assert device.store.profiles() == (result.profile,)
    assert device.jobs.state(Telemetry()).results == (result,)
    device.jobs.acknowledge(told)
    assert device.jobs.state(Telemetry()).results == ()


def test_a_document_that_still_names_a_measured_job_starts_it_no_second_time(device: Device) -> None:
    device.jobs.order(job())
    device.wait_for_end()
    device.jobs.order(job())
    assert device.jobs.state(Telemetry()).job_id is None
    assert device.gauge.runs == 1


def test_a_result_survives_a_restart(device: Device, tmp_path: Path) -> None:
    device.jobs.order(job())
    (result,) = device.wait_for_end().results
    again = Store(tmp_path / "state", disk_budget_bytes=1_000_000)
    assert again.profiling_results() == (result,)


def test_nothing_is_fetched_or_measured_while_apps_ask(device: Device) -> None:
    device.reports[:] = [report(5.0)]
    device.jobs.order(job())
    state = device.jobs.state(Telemetry())
    assert (state.is_idle, state.busy_with, state.job_id) == (False, "requests come in", "7-1")
    assert not device.told.acquire(timeout=0.3)
    assert (device.gauge.runs, device.service.requests) == (0, [])
    device.reports[:] = [report()]
    assert not device.wait_for_end().results[0].error


def test_quiet_must_have_lasted(tmp_path: Path, store: Store, service: FakeService) -> None:
    config = AgentConfig(service_url=URL, state_dir=tmp_path / "state")
    jobs = ProfilingJobs(
        config,
        store,
        fetch=ServiceClient(URL, transport=service.transport).download,
        reports=tuple,
        in_use=set,
        read_hardware=lambda: BOARD,
        on_result=lambda: None,
    )
    assert jobs.state(Telemetry()).busy_with == "requests came in less than 30 s ago"


def test_measuring_ends_when_requests_come_and_begins_again_later(device: Device) -> None:
    device.gauge.may_end.clear()
    device.jobs.order(job())
    assert device.gauge.started.acquire(timeout=10)
    device.reports[:] = [report(5.0)]
    device.gauge.may_end.wait(0.2)
    assert device.jobs.state(Telemetry()).results == ()
    device.gauge.may_end.set()
    device.reports[:] = [report()]
    assert not device.wait_for_end().results[0].error
    assert device.gauge.runs == 2


def test_a_job_that_is_no_longer_asked_for_ends_without_a_result(device: Device) -> None:
    device.gauge.may_end.clear()
    device.jobs.order(job())
    assert device.gauge.started.acquire(timeout=10)
    device.jobs.order(None)
    device.jobs.order(job("8-1"))
    assert device.gauge.started.acquire(timeout=10)
    device.gauge.may_end.set()
    assert [result.job_id for result in device.wait_for_end().results] == ["8-1"]


def test_corrupted_bytes_are_told_and_never_measured(device: Device) -> None:
    for place, damaged in enumerate((TWICE, SAMPLES)):
        device.service.offer(TWICE, SAMPLES)
        device.service.artifacts[damaged.digest] = bytes(len(damaged.content))
        device.jobs.order(job(f"{place}-1"))
        (result,) = device.wait_for_end().results
        assert (result.error, result.profile) == ("size or sha256 differ from what was announced", None)
        device.jobs.acknowledge(device.jobs.state(Telemetry()))
    assert device.gauge.runs == 0


def test_numbers_of_another_variant_are_not_told(device: Device) -> None:
    device.gauge.digest = "f" * 64
    device.jobs.order(job())
    (result,) = device.wait_for_end().results
    assert (result.error, result.profile) == ("another variant was measured", None)
    assert device.store.profiles() == ()


def test_samples_that_would_fill_the_device_are_not_fetched(device: Device) -> None:
    huge = VariantReference(digest="c" * 64, name="samples", size_bytes=2**40, url="/artifacts/sha256/c")
    device.jobs.order(job().model_copy(update={"samples": huge}))
    assert "samples of more than" in device.wait_for_end().results[0].error
    assert device.service.requests == []


def test_samples_push_no_variant_out_and_are_no_variant(device: Device) -> None:
    device.jobs.order(job())
    device.wait_for_end()
    assert device.store.cached_digests() == (TWICE.digest,)


# -- the command -------------------------------------------------------------------------------------------------------


def command(code: str, *, longest_s: float = 10.0) -> Command:
    return Command(0.0, longest_s=longest_s, program=(sys.executable, "-c", code))


def test_a_measurement_that_takes_too_long_is_killed() -> None:
    started_s = time.monotonic()
    with pytest.raises(AttemptFailed, match="took longer than"):
        command("import time; time.sleep(60)", longest_s=0.1)(Path("m"), Path("s"), threads=1, go_on=lambda: None)
    assert time.monotonic() - started_s < 5


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import os; os.abort()", "ended with status -6"),
        ("raise SystemExit('qoe-agent: the samples cannot be read')", "^the samples cannot be read$"),
        ("print('{}')", "gave no answer"),
        ("print('nonsense')", "gave no answer"),
    ],
)
def test_a_measurement_that_fails_says_why(code: str, says: str) -> None:
    with pytest.raises(AttemptFailed, match=says):
        command(code)(Path("m"), Path("s"), threads=1, go_on=lambda: None)


def test_the_process_knows_no_secret_of_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QOE_AGENT_TOKEN", "t0ken-0f-this-device")
    code = "import os, sys; sys.exit('told' if 't0ken' in str(os.environ) else 'kept')"
    with pytest.raises(AttemptFailed, match=r"^kept$"):
        command(code)(Path("m"), Path("s"), threads=1, go_on=lambda: None)


def test_an_idle_agent_measures_what_the_signed_document_names(make_agent: MakeAgent, service: FakeService) -> None:
    """The whole way on the device: document, download, the real command in its process, check-in."""
    service.offer(TWICE, SAMPLES)
    service.profiling = job()
    service.want()
    agent = make_agent(idleness=AT_ONCE)
    agent.enrol()
    agent.start()
    until_s = time.monotonic() + 60
    while not (found := [r for told in service.check_ins if told.profiling for r in told.profiling.results]):
        assert time.monotonic() < until_s, "nothing was measured"
        time.sleep(0.05)
    first = service.check_ins[0].profiling
    assert first is not None
    assert first.is_idle
    result = found[0]
    assert result.error == ""
    assert result.profile is not None
    assert result.profile.digest == TWICE.digest
    assert result.profile.load_ms > 0
    assert result.accuracy == AccuracyReport(kind="top-1", samples=10, correct=10)


@pytest.fixture
def telling(make_agent: MakeAgent) -> Agent:
    """An enrolled agent that has five results to tell."""
    agent = make_agent()
    agent.enrol()
    agent.store.save_profiling_results(tuple(ProfilingResult(job_id=f"{n}-1", error="no room") for n in range(5)))
    return agent


def kept_by(agent: Agent) -> list[str]:
    return [result.job_id for result in agent.store.profiling_results()]


@pytest.mark.parametrize("status", [400, 413, 422, 503])
def test_a_check_in_refused_for_another_reason_loses_no_result(
    status: int, telling: Agent, service: FakeService
) -> None:
    service.failing = status
    with pytest.raises(ServiceRefused):
        telling.work_once()
    assert len(kept_by(telling)) == 5
    service.failing = None
    telling.work_once()
    assert kept_by(telling) == []
    (told,) = service.check_ins
    assert told.profiling is not None
    assert len(told.profiling.results) == 5


def test_only_the_result_that_the_service_will_never_take_is_given_up_and_the_device_is_heard_meanwhile(
    telling: Agent, service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    service.poison = frozenset({"3-1"})
    rounds = 0
    while kept_by(telling):
        telling.poke(check_in=True)
        telling.work_once()
        rounds += 1
        assert len(service.check_ins) == rounds
    told = [result.job_id for each in service.check_ins if each.profiling for result in each.profiling.results]
    assert sorted(told) == ["0-1", "1-1", "2-1", "4-1"]
    assert rounds < 10
    assert [line for line in caplog.messages if "refused" in line] == [
        "profiling result refused job=3-1 reason='400: poison'"
    ]
