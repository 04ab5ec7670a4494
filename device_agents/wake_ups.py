"""Listens for wake-ups, in a thread of its own, and comes back when the line ends. A wake-up only says "look"."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from device_agents.client import ServiceClient, asked_wait_s, full_jitter_s
from device_agents.errors import AgentError, ServiceRefused
from device_agents.wire import WakeUp

logger = logging.getLogger("qoe_agent.wake_ups")

STEADY_CONNECTION_S = 5.0
LONGEST_PAUSE_S = 30.0
REFUSED_PAUSE_S = 30.0


class WakeUps:
    """The agent's ear. ``on_wake`` is told each wake-up, in this thread; None stands for one in unknown words."""

    def __init__(
        self,
        client: ServiceClient,
        *,
        on_wake: Callable[[WakeUp | None], None],
        rng: random.Random,
        stopping: threading.Event,
    ) -> None:
        self._client = client
        self._on_wake = on_wake
        self._random = rng
        self._stopping = stopping

    def listen(self) -> None:
        """Until the agent stops; without wake-ups the agent still looks at every check-in."""
        failures = 0
        while not self._stopping.is_set():
            connected_s = time.monotonic()
            wait_s = self._listen_once(failures)
            failures = 0 if time.monotonic() - connected_s > STEADY_CONNECTION_S else failures + 1
            self._stopping.wait(wait_s)

    def _listen_once(self, failures: int) -> float:
        """One connection to its end; how many seconds to wait before the next."""
        try:
            for wake_up in self._client.wake_ups():
                self._on_wake(wake_up)
                if self._stopping.is_set():
                    break
            return self._random.uniform(0.0, 1.0)
        except AgentError as error:
            logger.debug("wake-up channel ended reason=%r", str(error))
            wait_s = max(full_jitter_s(failures, self._random, cap_s=LONGEST_PAUSE_S), asked_wait_s(error))
            is_refused = isinstance(error, ServiceRefused) and error.permanent
            return max(wait_s, REFUSED_PAUSE_S) if is_refused else wait_s
        except Exception:
            # The top of a loop.
            logger.exception("listener failed")
            return full_jitter_s(failures, self._random, base_s=5.0)
