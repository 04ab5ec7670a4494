"""The agent against a service in memory: enrol, check in, follow, report, and stay up whatever happens."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from device_agents.agent import Agent
from device_agents.config import AgentConfig
from device_agents.errors import NotFound
from device_agents.runtime import EmulatedQuota
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
from tests.device_agents.following import ROW, THRICE, TWICE, answer, eventually, outcomes, running, state
from tests.device_agents.models import scaling


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


def test_enrolment_comes_back_no_sooner_than_it_was_asked_to(tmp_path: Path, service: FakeService) -> None:
    asked_s: list[float] = []

    def busy_at_first(request: httpx.Request) -> httpx.Response:
        asked_s.append(time.monotonic())
        if len(asked_s) == 1:
            return httpx.Response(429, headers={"Retry-After": "1"}, json={"title": "slow down"})
        return service.transport.handle_request(request)

    config = AgentConfig(service_url=URL, token=TOKEN, name="device", state_dir=tmp_path / "state")
    with Agent(config, transport=httpx.MockTransport(busy_at_first)) as agent:
        assert agent.enrol_until_done()
    first_s, second_s = asked_s
    assert second_s - first_s >= 1, "the back-off alone is half a second at most"


def test_a_wake_up_leads_to_serving_the_decision_within_a_second(agent: Agent, service: FakeService) -> None:
    started_s = time.monotonic()
    service.want(desired(TWICE, "d1"))
    eventually(lambda: running(agent) == "d1")
    assert time.monotonic() - started_s < 1
    assert answer(agent) == 2


def test_an_app_in_the_same_process_is_answered_and_rates_the_decision(agent: Agent, service: FakeService) -> None:
    with pytest.raises(NotFound, match="unknown model digits"):
        agent.infer("digits", ROW)
    service.want(desired(TWICE, "d1"))
    eventually(lambda: running(agent) == "d1")
    answered = agent.infer("digits", ROW)
    assert answered.outputs["y"].tolist() == [[2, 2, 2, 2]]
    assert answered.served.decision_id == "d1"
    agent.accept_feedback(Feedback(id="f1", decision_id=answered.served.decision_id, rating=0.9))
    eventually(lambda: "f1" in service.feedback)
    assert service.feedback["f1"].observed_at == NOW


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


def test_a_service_that_asks_for_no_pause_is_not_asked_without_one(agent: Agent, service: FakeService) -> None:
    service.check_in_interval_s = 0
    agent.poke(check_in=True)
    eventually(lambda: service.check_ins)
    time.sleep(0.5)
    assert len(service.check_ins) <= 5


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
