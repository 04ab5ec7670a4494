"""Feedback on its way through the agent: it is sent in time, and whatever keeps it back keeps back nothing else."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from device_agents.agent import Agent
from device_agents.config import AgentConfig
from device_agents.spool import Kept
from device_agents.wire import (
    Feedback,
)
from tests.device_agents.conftest import MakeAgent
from tests.device_agents.fake_service import NOW, TOKEN, URL, FakeService, desired
from tests.device_agents.following import TWICE, answer, eventually, running


def count_batches(service: FakeService) -> int:
    return sum(request.url.path.endswith("/batch") for request in service.requests)


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
