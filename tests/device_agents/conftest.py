"""Fixtures of the agent's tests: a fake service in memory, a real state folder on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from device_agents.agent import Agent
from device_agents.config import AgentConfig
from device_agents.profiling_jobs import Idleness
from device_agents.store import Store
from tests.device_agents.fake_service import NOW, TOKEN, URL, FakeService
from tests.device_agents.models import scaling


class MakeAgent(Protocol):
    def __call__(self, *, idleness: Idleness | None = None, **settings: object) -> Agent: ...


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state", disk_budget_bytes=10_000_000)


@pytest.fixture
def make_agent(tmp_path: Path, service: FakeService) -> Iterator[MakeAgent]:
    """Agents of one state folder, one after the other; the last one is stopped."""
    made: list[Agent] = []

    def make(*, idleness: Idleness | None = None, **settings: object) -> Agent:
        config = AgentConfig.model_validate(
            {"service_url": URL, "token": TOKEN, "name": "device", "state_dir": tmp_path / "state"}
            | {"profile_budget_s": 0.05, "disk_reserve_bytes": 0}
            | settings
        )
        made.append(Agent(config, transport=service.transport, now=lambda: NOW, idleness=idleness))
        return made[-1]

    yield make
    service.close()
    for agent in made:
        agent.stop()


@pytest.fixture
def agent(make_agent: MakeAgent, service: FakeService) -> Agent:
    """An enrolled agent that follows."""
    service.offer(scaling(2), scaling(3))
    agent = make_agent()
    agent.enrol()
    agent.boot()
    agent.start()
    service.wait_for("wake-up")
    return agent
