"""Sends spooled feedback to the service, one batch at a time, at a pace of its own. The agent's loop calls it."""

from __future__ import annotations

import logging
import random
import sqlite3
import time
from collections.abc import Callable
from datetime import datetime

from device_agents.client import full_jitter_s
from device_agents.errors import AgentError, ServiceRefused
from device_agents.spool import Spool
from device_agents.wire import FEEDBACK_BATCH_LIMIT, FeedbackBatch, FeedbackBatchReply

logger = logging.getLogger("qoe_agent.drain")

TOO_LARGE_OR_WRONG = frozenset({400, 413, 422})
EVERY_S = 1.0
LONGEST_PAUSE_S = 10.0


class Drain:
    """Feedback that cannot be read or sent has a back-off of its own: the device must still be heard and led."""

    def __init__(
        self, spool: Spool, send: Callable[[FeedbackBatch], FeedbackBatchReply], *, rng: random.Random
    ) -> None:
        self._spool = spool
        self._send = send
        self._random = rng
        self._limit = FEEDBACK_BATCH_LIMIT
        self._failures = 0
        self.next_s = 0.0
        """Monotonic time before which nothing is sent."""

    def hurry(self) -> None:
        """A lease ended: the service decides by what it measured, so it must not wait for others."""
        if not self._failures:
            self.next_s = 0.0

    def run_if_due(self, now: datetime | None) -> None:
        """Sends a batch when it is time. ``now`` is the service's time, or None before it is known."""
        if time.monotonic() < self.next_s:
            return
        limit = self._limit
        try:
            sent = self._send_batch(now)
        except (AgentError, sqlite3.Error, ValueError) as error:
            pause_s = self._pause_s(error)
            self._failures += 1
            logger.warning("feedback waits reason=%r failures=%d", str(error), self._failures)
        else:
            self._failures = 0
            pause_s = EVERY_S if 0 < sent < limit else 0.0
        self.next_s = time.monotonic() + pause_s

    def _pause_s(self, error: Exception) -> float:
        pause_s = full_jitter_s(self._failures, self._random, cap_s=LONGEST_PAUSE_S)
        if isinstance(error, ServiceRefused):
            return max(pause_s, error.retry_after_s or 0.0, LONGEST_PAUSE_S if error.permanent else 0.0)
        return pause_s

    def _send_batch(self, now: datetime | None) -> int:
        """Sends one batch, newest rewards first, and returns how many it held.

        What is refused for good must not block what is not.
        """
        items = self._spool.batch(now=now, limit=self._limit)
        if not items:
            return 0
        try:
            reply = self._send(FeedbackBatch(items=items))
        except ServiceRefused as error:
            if error.http_status not in TOO_LARGE_OR_WRONG:
                raise
            if len(items) == 1:
                logger.warning("feedback refused id=%s reason=%r", items[0].id, error.reason)
                self._spool.refuse(items[0].id)
            self._limit = max(1, len(items) // 2)
            return FEEDBACK_BATCH_LIMIT
        self._spool.settle(reply.results)
        self._limit = min(FEEDBACK_BATCH_LIMIT, self._limit * 2)
        return len(items)
