"""The agent against a service in memory: enrol, check in, follow, report, and stay up whatever happens."""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from device_agents.agent import Agent
from device_agents.config import AgentConfig
from device_agents.errors import ServiceRefused
from device_agents.runtime import EmulatedQuota
from device_agents.spool import Kept
from device_agents.store import Record
from device_agents.wire import (
    Feedback,
    Hardware,
    HealthGate,
    Outcome,
    OutcomeReport,
    ServingConfiguration,
    UpdateState,
)
from tests.device_agents.conftest import MakeAgent
from tests.device_agents.fake_service import NOW, TOKEN, URL, FakeService, desired
from tests.device_agents.models import scaling

ROW = {"x": np.ones((1, 4), dtype=np.float32)}
TWICE, THRICE = scaling(2), scaling(3)


def eventually(question: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Waits for something that other threads bring about."""
    end_s = time.monotonic() + timeout_s
    while not question():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.01)


def running(agent: Agent, application: str = "digits") -> str | None:
    executor = agent.executors.get(application)
    return executor.served.decision_id if executor and executor.served else None


def state(agent: Agent) -> UpdateState | None:
    return next((record.state for record in agent.store.records()), None)


def answer(agent: Agent) -> float:
    return float(agent.executors["digits"].infer(ROW, timeout_s=5).outputs["y"][0, 0])


def outcomes(service: FakeService) -> list[tuple[str, Outcome]]:
    """All ends of attempts that the service was told, each once."""
    told = [(o.decision_id, o.outcome) for message in service.check_ins for o in message.outcomes]
    return list(dict.fromkeys(told))


@pytest.fixture
def agent(make_agent: MakeAgent, service: FakeService) -> Agent:
    """An enrolled agent that follows."""
    service.offer(TWICE, THRICE)
    agent = make_agent()
    agent.enrol()
    agent.boot()
    agent.start()
    service.wait_for("wake-up")
    return agent


def test_enrolment_keeps_a_private_credential_that_later_requests_carry(
    make_agent: MakeAgent, service: FakeService
) -> None:
    agent = make_agent()
    agent.enrol()
    agent.work_once()
    mode = (agent.config.state_dir / "identity.json").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600
    assert service.requests[-1].headers["Authorization"] == "Bearer secret"
    assert "secret" not in repr(agent.store.identity())


def test_a_wrong_token_is_refused_for_good(make_agent: MakeAgent) -> None:
    with pytest.raises(ServiceRefused) as refused:
        make_agent(token="a-token-that-nobody-issued").enrol()
    assert refused.value.permanent


def test_the_first_check_in_describes_the_device_and_later_ones_do_not(
    make_agent: MakeAgent, service: FakeService
) -> None:
    agent = make_agent()
    agent.enrol()
    agent.work_once()
    agent.poke(check_in=True)
    agent.work_once()
    first, second = service.check_ins
    assert first.hardware is not None
    assert first.hardware.cores >= 1
    assert second.hardware is None


def test_a_wake_up_leads_to_serving_the_decision_within_a_second(agent: Agent, service: FakeService) -> None:
    started_s = time.monotonic()
    service.want(desired(TWICE, "d1"))
    eventually(lambda: running(agent) == "d1")
    assert time.monotonic() - started_s < 1
    assert answer(agent) == 2


def test_a_served_decision_is_reported_with_its_profile_and_outcome(agent: Agent, service: FakeService) -> None:
    service.want(desired(TWICE, "d1"))
    eventually(lambda: (("d1", Outcome.COMMITTED)) in outcomes(service))
    report = service.check_ins[-1].applications[0]
    assert (report.state, report.decision_id, report.running_digest) == (UpdateState.COMMITTED, "d1", TWICE.digest)
    assert report.cached_digests == (TWICE.digest,)
    profiles = [profile for message in service.check_ins for profile in message.profiles]
    assert [(profile.digest, profile.threads) for profile in profiles] == [(TWICE.digest, 1)]
    reported = [o for message in service.check_ins for o in message.outcomes]
    assert reported[0].evidence == "synthetic"
    assert reported[0].download_bytes == len(TWICE.content)


def test_an_acknowledged_outcome_is_not_told_again(agent: Agent, service: FakeService) -> None:
    service.want(desired(TWICE, "d1"))
    eventually(lambda: outcomes(service))
    eventually(lambda: not agent.store.records()[0].outcomes)
    count = len(service.check_ins)
    agent.poke(check_in=True)
    eventually(lambda: len(service.check_ins) > count)
    assert service.check_ins[-1].outcomes == ()


def test_the_same_variant_is_adopted_at_once_without_a_download(agent: Agent, service: FakeService) -> None:
    service.want(desired(TWICE, "d1"))
    eventually(lambda: state(agent) is UpdateState.COMMITTED)
    session = agent.executors["digits"].served.session  # type: ignore[union-attr]  # it serves, as just seen
    service.want(desired(TWICE, "d2", serving=ServingConfiguration(max_batch=8, max_concurrency=2)))
    eventually(lambda: ("d2", Outcome.ALREADY_RUNNING) in outcomes(service) and running(agent) == "d2")
    served = agent.executors["digits"].served
    assert served is not None
    assert served.session is session
    assert served.configuration.max_batch == 8
    assert [request.url.path for request in service.requests].count(f"/artifacts/sha256/{TWICE.digest}") == 1


def test_other_threads_need_a_new_session_beside_the_old(agent: Agent, service: FakeService) -> None:
    service.want(desired(TWICE, "d1"))
    eventually(lambda: state(agent) is UpdateState.COMMITTED)
    service.want(desired(TWICE, "d2", serving=ServingConfiguration(threads=2)))
    eventually(lambda: ("d2", Outcome.COMMITTED) in outcomes(service))
    served = agent.executors["digits"].served
    assert served is not None
    assert served.session.threads == 2


def test_a_lease_ends_with_its_feedback_before_the_check_in_and_is_sent_once(
    agent: Agent, service: FakeService
) -> None:
    service.want(desired(TWICE, "d1", lease_s=0.4))
    eventually(lambda: running(agent) == "d1")
    for _ in range(3):
        answer(agent)
    service.wait_for("batch")
    (feedback,) = service.feedback.values()
    assert feedback.lease_closed
    assert feedback.decision_id == "d1"
    assert feedback.components is not None
    assert feedback.components.requests == 3
    assert feedback.components.slo_hit_share == 1.0
    assert feedback.active_s == pytest.approx(0.4, abs=0.2)
    after = service.log[service.log.index("batch") :]
    eventually(lambda: "check-in" in service.log[service.log.index("batch") :])
    assert after.count("batch") == 1


def test_requests_after_the_lease_are_answered_under_its_decision_but_counted_nowhere(
    agent: Agent, service: FakeService
) -> None:
    service.want(desired(TWICE, "d1", lease_s=0.1))
    service.wait_for("batch")
    served = agent.executors["digits"].infer(ROW, timeout_s=5).served
    assert served.decision_id == "d1"
    assert served.account.health()[0] == 0


def test_an_early_new_decision_closes_the_lease_of_the_old_one(agent: Agent, service: FakeService) -> None:
    service.want(desired(TWICE, "d1"))
    eventually(lambda: state(agent) is UpdateState.COMMITTED)
    answer(agent)
    service.want(desired(THRICE, "d2"))
    eventually(lambda: service.feedback)
    (feedback,) = service.feedback.values()
    assert (feedback.decision_id, feedback.lease_closed) == ("d1", True)


def test_a_newer_document_supersedes_one_that_soaks(agent: Agent, service: FakeService) -> None:
    service.want(desired(TWICE, "d1", gate=HealthGate(min_requests=1, soak_s=60)))
    eventually(lambda: running(agent) == "d1")
    service.want(desired(THRICE, "d2"))
    eventually(lambda: ("d2", Outcome.COMMITTED) in outcomes(service))
    assert outcomes(service)[0] == ("d1", Outcome.SUPERSEDED)
    assert answer(agent) == 3


def test_a_newer_document_cancels_a_download(agent: Agent, service: FakeService) -> None:
    missing = scaling(4)
    service.want(desired(missing, "d1"))
    service.artifacts[missing.digest] = b""  # forever short: the agent retries
    eventually(lambda: sum("artifacts" in request.url.path for request in service.requests) >= 2)
    service.want(desired(THRICE, "d2"))
    eventually(lambda: running(agent) == "d2")
    assert ("d1", Outcome.SUPERSEDED) in outcomes(service) or agent.store.records()[0].outcomes


def test_several_applications_are_followed_beside_each_other(agent: Agent, service: FakeService) -> None:
    service.want(desired(TWICE, "d1"), desired(THRICE, "p1", application="parity"))
    eventually(lambda: running(agent) == "d1" and running(agent, "parity") == "p1")
    service.want(desired(THRICE, "p1", application="parity"))
    eventually(lambda: "digits" not in agent.executors)
    assert running(agent, "parity") == "p1"
    eventually(lambda: [record.application for record in agent.store.records()] == ["parity"])


def test_two_applications_that_want_one_variant_fetch_it_once_between_them(agent: Agent, service: FakeService) -> None:
    service.chunk_pause_s = 0.05
    service.want(desired(TWICE, "d1"), desired(TWICE, "p1", application="parity"))
    eventually(lambda: running(agent) == "d1" and running(agent, "parity") == "p1")
    assert [request.url.path for request in service.requests].count(f"/artifacts/sha256/{TWICE.digest}") == 1
    assert agent.store.is_intact(TWICE.digest)


def test_a_device_that_is_enrolled_anew_follows_its_new_decisions_and_reports_no_old_ones(
    make_agent: MakeAgent, agent: Agent, service: FakeService
) -> None:
    service.version = 7
    service.want(desired(TWICE, "d1"), desired(TWICE, "p1", application="parity"))
    eventually(lambda: [record.state for record in agent.store.records()] == [UpdateState.COMMITTED] * 2)
    service.hang_up()
    agent.stop()
    service.device_id, service.version = "device-2", 0
    service.want(desired(TWICE, "e1"))
    service.check_ins.clear()
    again = make_agent()
    again.boot()
    assert again.store.cached_digests() == (TWICE.digest,)
    again.enrol()
    assert (again.store.records(), running(again), answer(again)) == ((), None, 2)
    again.start()
    eventually(lambda: running(again) == "e1")
    eventually(lambda: service.check_ins and outcomes(service))
    assert {decision for decision, _ in outcomes(service)} == {"e1"}
    assert "parity" not in again.executors


def test_enrolling_again_as_the_same_device_keeps_what_it_serves(agent: Agent, service: FakeService) -> None:
    service.want(desired(TWICE, "d1"))
    eventually(lambda: state(agent) is UpdateState.COMMITTED)
    agent.enrol()
    assert running(agent) == "d1"
    assert agent.store.seen_version() == service.version


def test_a_document_whose_version_cannot_be_kept_is_followed_and_fetched_again(
    make_agent: MakeAgent, service: FakeService
) -> None:
    service.offer(TWICE)
    agent = make_agent()
    agent.enrol()
    service.want(desired(TWICE, "d1"))
    progress = agent.store.folder / "progress.new"
    progress.mkdir()
    agent.work_once()
    eventually(lambda: running(agent) == "d1")
    assert agent.store.seen_version() == -1
    progress.rmdir()
    agent.poke(check_in=True)
    agent.work_once()
    assert agent.store.seen_version() == service.version


@pytest.mark.parametrize("spoil", ["forged", "expired", "replayed", "another device's"])
def test_a_document_that_must_not_be_followed_is_not(make_agent: MakeAgent, service: FakeService, spoil: str) -> None:
    service.offer(TWICE)
    agent = make_agent()
    agent.enrol()
    service.want(desired(TWICE, "d1"))
    if spoil == "forged":
        service.key = Ed25519PrivateKey.generate()
    elif spoil == "expired":
        service.clock_offset = timedelta(days=2)
    elif spoil == "replayed":
        agent.store.save_seen_version(9)
        agent.stop()
        agent = make_agent()
    else:
        service.device_id = "device-2"
    agent.work_once()
    assert agent.executors == {}


def test_a_restart_serves_what_was_committed_without_the_service(
    make_agent: MakeAgent, agent: Agent, service: FakeService
) -> None:
    service.want(desired(TWICE, "d1"))
    eventually(lambda: state(agent) is UpdateState.COMMITTED)
    service.hang_up()
    agent.stop()
    service.is_away = True
    again = make_agent()
    again.boot()
    assert running(again) == "d1"
    assert answer(again) == 2


def test_a_restart_does_not_open_a_reported_lease_again(
    make_agent: MakeAgent, agent: Agent, service: FakeService
) -> None:
    service.want(desired(TWICE, "d1", lease_s=0.1))
    eventually(lambda: state(agent) is UpdateState.COMMITTED and agent.store.records()[0].lease_closed == "d1")
    service.hang_up()
    agent.stop()
    again = make_agent()
    again.boot()
    answer(again)
    served = again.executors["digits"].served
    assert served is not None
    assert served.decision_id == "d1"
    assert served.account.health()[0] == 0


def test_a_request_that_still_runs_when_its_model_is_replaced_counts_for_the_lease_that_ends(
    agent: Agent, service: FakeService
) -> None:
    service.want(desired(TWICE, "d1"))
    eventually(lambda: state(agent) is UpdateState.COMMITTED)
    executor = agent.executors["digits"]
    assert executor.served is not None
    executor.served.session._quota = EmulatedQuota(1e-9, sleep=lambda _: time.sleep(1))
    slow = executor.submit(ROW)
    service.want(desired(THRICE, "d2"))
    eventually(lambda: running(agent) == "d2")
    assert not slow.done()
    eventually(lambda: service.feedback)
    (feedback,) = service.feedback.values()
    assert feedback.components is not None
    assert (feedback.decision_id, feedback.components.requests) == ("d1", 1)


def test_the_device_serves_on_while_the_service_is_away_and_keeps_what_it_has_to_say(
    agent: Agent, service: FakeService
) -> None:
    service.want(desired(TWICE, "d1", lease_s=0.5))
    eventually(lambda: running(agent) == "d1")
    service.is_away = True
    eventually(lambda: len(agent.spool) == 1)
    assert answer(agent) == 2
    service.is_away = False
    agent.poke(check_in=True)
    eventually(lambda: len(agent.spool) == 0)
    assert len(service.feedback) == 1


@pytest.mark.parametrize("status", [403, 503])
def test_feedback_that_cannot_be_sent_keeps_the_device_from_nothing_else(
    make_agent: MakeAgent, service: FakeService, status: int
) -> None:
    service.offer(TWICE)
    agent = make_agent()
    agent.enrol()
    service.failing_feedback = status
    agent.accept_feedback(Feedback(id="f1", decision_id="d1", rating=0.5))
    service.want(desired(TWICE, "d1"))
    agent.work_once()
    eventually(lambda: running(agent) == "d1")
    assert len(service.check_ins) == 1
    assert len(agent.spool) == 1
    agent.work_once()
    assert count_batches(service) <= 2


def test_a_broken_spool_keeps_the_device_from_nothing_else(make_agent: MakeAgent, service: FakeService) -> None:
    service.offer(TWICE)
    agent = make_agent()
    agent.enrol()
    agent.spool.close()
    service.want(desired(TWICE, "d1"))
    agent.work_once()
    eventually(lambda: running(agent) == "d1")
    assert agent.accept_feedback(Feedback(id="f1", decision_id="d1", rating=0.5)) is Kept.LOST
    agent.poke(check_in=True)
    agent.work_once()
    assert service.check_ins[-1].dropped == {"spool_error": 1}


def count_batches(service: FakeService) -> int:
    return sum(request.url.path.endswith("/batch") for request in service.requests)


def test_ratings_travel_together_but_the_end_of_a_lease_does_not_wait_for_them(
    agent: Agent, service: FakeService
) -> None:
    for index in range(20):
        agent.accept_feedback(Feedback(id=f"f{index}", decision_id="d1", rating=0.5))
        time.sleep(0.01)
    assert count_batches(service) <= 1
    service.want(desired(TWICE, "d1", lease_s=0.01))
    eventually(lambda: any(item.lease_closed for item in service.feedback.values()), timeout_s=0.7)
    assert len(service.feedback) == 21
    assert count_batches(service) <= 3


def test_a_service_that_asks_for_no_pause_is_not_asked_without_one(agent: Agent, service: FakeService) -> None:
    service.check_in_interval_s = 0
    agent.poke(check_in=True)
    eventually(lambda: service.check_ins)
    time.sleep(0.5)
    assert len(service.check_ins) <= 5


@pytest.mark.parametrize("boots_at", [datetime(2000, 1, 1, tzinfo=UTC), NOW], ids=["year 2000", "right"])
def test_a_clock_that_jumps_loses_no_rewards(tmp_path: Path, service: FakeService, boots_at: datetime) -> None:
    clock = [boots_at]
    config = {"service_url": URL, "token": TOKEN, "state_dir": tmp_path / "state", "disk_reserve_bytes": 0}
    with Agent(AgentConfig.model_validate(config), transport=service.transport, now=lambda: clock[0]) as agent:
        agent.enrol()
        agent.accept_feedback(Feedback(id="f1", decision_id="d1", rating=0.5))
        service.failing_feedback = 503
        agent.work_once()
        agent.accept_feedback(Feedback(id="f2", decision_id="d1", rating=0.5))
        for clock[0] in (NOW, NOW + timedelta(days=15), boots_at):
            agent.accept_feedback(Feedback(id=f"f-{clock[0]:%Y-%m-%d}", decision_id="d1", rating=0.5))
            agent.poke(check_in=True)
            agent.work_once()
        assert agent.spool.dropped() == {}
        assert len(agent.spool) >= 4


def test_an_expiry_is_told_by_the_clock_of_the_service_whatever_the_device_believes(
    tmp_path: Path, service: FakeService
) -> None:
    service.offer(TWICE)
    clock = [NOW]
    config = {"service_url": URL, "token": TOKEN, "state_dir": tmp_path / "state", "disk_reserve_bytes": 0}
    with Agent(AgentConfig.model_validate(config), transport=service.transport, now=lambda: clock[0]) as agent:
        agent.enrol()
        agent.work_once()
        clock[0] = NOW + timedelta(days=15)
        service.want(desired(TWICE, "d1"))
        agent.poke(look_at_s=0)
        agent.work_once()
        eventually(lambda: running(agent) == "d1")


def test_hardware_that_changes_is_told_again(make_agent: MakeAgent, service: FakeService) -> None:
    agent = make_agent()
    agent.enrol()
    agent.work_once()
    agent.read_hardware = lambda: Hardware(cores=2, cpu_quota_cores=0.5)
    for _ in range(2):
        agent.poke(check_in=True)
        agent.work_once()
    told = [message.hardware.cpu_quota_cores if message.hardware else "nothing" for message in service.check_ins]
    assert told[1:] == [0.5, "nothing"]


def test_ends_that_a_check_in_has_no_room_for_are_told_by_the_next(make_agent: MakeAgent, service: FakeService) -> None:
    before = make_agent()
    before.enrol()
    for application in (f"a{index}" for index in range(6)):
        record = Record(application=application, model_name=application)
        for index in range(60):
            end = OutcomeReport(
                application=application, decision_id=f"{application}-{index}", outcome=Outcome.SUPERSEDED, at=NOW
            )
            record = record.with_outcome(end)
        before.store.save_record(record)
    before.stop()
    service.key = Ed25519PrivateKey.generate()  # so that no document retires them
    agent = make_agent()
    agent.boot()
    agent.start()
    eventually(lambda: len(service.check_ins) == 1)
    eventually(lambda: sum(len(record.outcomes) for record in agent.store.records()) == 360 - 256)
    agent.poke(check_in=True)
    eventually(lambda: len(outcomes(service)) == 360)


def test_check_ins_about_a_decision_carry_its_trace(agent: Agent, service: FakeService) -> None:
    trace_id = "ab" * 16
    service.want(desired(TWICE, "d1").model_copy(update={"trace_id": trace_id}))
    eventually(lambda: ("d1", Outcome.COMMITTED) in outcomes(service))
    about = [
        request
        for request in service.requests
        if request.url.path.endswith("/check-in") and b'"committed"' in request.content
    ]
    assert about[0].headers["traceparent"].split("-")[1] == trace_id


def test_a_device_without_a_credential_serves_while_it_waits_for_the_service(
    make_agent: MakeAgent, agent: Agent, service: FakeService
) -> None:
    service.want(desired(TWICE, "d1"))
    eventually(lambda: state(agent) is UpdateState.COMMITTED)
    service.hang_up()
    agent.stop()
    (agent.config.state_dir / "identity.json").write_text("rot")
    service.is_away = True
    again = make_agent()
    again.boot()
    again.start_once_enrolled()
    assert answer(again) == 2
    service.want(desired(THRICE, "d2"))
    service.is_away = False
    eventually(lambda: running(again) == "d2")


@pytest.mark.parametrize("token", ["", "a-token-that-nobody-issued"])
def test_a_device_that_cannot_enrol_serves_what_it_has(
    make_agent: MakeAgent, agent: Agent, service: FakeService, token: str
) -> None:
    service.want(desired(TWICE, "d1"))
    eventually(lambda: state(agent) is UpdateState.COMMITTED)
    service.hang_up()
    agent.stop()
    (agent.config.state_dir / "identity.json").unlink()
    again = make_agent(token=token)
    again.boot()
    again.start_once_enrolled()
    eventually(lambda: not any(thread.name == "enrol" for thread in threading.enumerate()))
    assert (running(again), answer(again)) == ("d1", 2)


def test_one_poisoned_feedback_does_not_block_the_others(make_agent: MakeAgent, service: FakeService) -> None:
    agent = make_agent()
    agent.enrol()
    for index in range(5):
        agent.accept_feedback(Feedback(id=f"f{index}", decision_id="d1", rating=0.5))
    service.poison = frozenset({"f2"})
    for _ in range(12):
        agent.work_once()
    assert set(service.feedback) == {"f0", "f1", "f3", "f4"}
    assert agent.spool.dropped() == {"refused": 1}
    agent.poke(check_in=True)
    agent.work_once()
    assert service.check_ins[-1].dropped == {"refused": 1}
