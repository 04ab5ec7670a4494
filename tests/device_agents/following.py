"""Questions to an agent that follows, for its tests."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from device_agents.agent import Agent
from device_agents.wire import (
    Outcome,
    UpdateState,
)
from tests.device_agents.fake_service import FakeService
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
