"""Enrolment and the credential: who the device is, and what it serves while nobody says so."""

from __future__ import annotations

import stat
import threading

import pytest

from device_agents.agent import Agent
from device_agents.errors import ServiceRefused
from device_agents.wire import (
    UpdateState,
)
from tests.device_agents.conftest import MakeAgent
from tests.device_agents.fake_service import FakeService, desired
from tests.device_agents.following import THRICE, TWICE, answer, eventually, outcomes, running, state


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
