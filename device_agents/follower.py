"""Follows decisions for one application in a thread of its own: orders in, leases and outcomes out.

The machine says what an attempt does; here is when: newest order first, a soak judged while it lasts, a lease closed
on time. The thread sleeps until one of them is due.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from device_agents.errors import AgentError
from device_agents.executor import Executor
from device_agents.lease import LEASE_ID_PREFIX
from device_agents.served import ServedModel
from device_agents.states import is_under_way
from device_agents.store import Record
from device_agents.update import Machine, Tools
from device_agents.wire import ApplicationReport, DesiredApplication, Feedback, OutcomeReport, UpdateState

logger = logging.getLogger("qoe_agent.follower")

SOAK_TICK_S = 0.25
LAST_RUNS_S = 10.0


@dataclass(frozen=True)
class _Order:
    desired: DesiredApplication
    seen_s: float


class Follower:
    """One application on this device. ``send`` takes finished leases; ``Tools.on_change`` is told of anything new."""

    def __init__(self, record: Record, executor: Executor, tools: Tools, *, send: Callable[[Feedback], None]) -> None:
        self.executor = executor
        self._machine = Machine(record, executor, tools, on_exchange=self._on_exchange)
        self._tools = tools
        self._send = send
        self._changed = threading.Condition()
        self._overtaken = threading.Event()
        self._order: _Order | None = None
        self._acknowledged: list[OutcomeReport] = []
        self._is_stopping = False
        self._thread = threading.Thread(target=self._follow, name=f"follow-{record.application}", daemon=True)

    # -- for the agent -----------------------------------------------------------------------------------------------

    @property
    def application(self) -> str:
        """Name of the application."""
        return self._machine.record.application

    @property
    def outcomes(self) -> tuple[OutcomeReport, ...]:
        """Ends of attempts that the service has not acknowledged."""
        return self._machine.record.outcomes

    @property
    def trace_id(self) -> str | None:
        """The trace of the decision that is followed now, or whose end is yet to be told."""
        record, served = self._machine.record, self.executor.served
        if record.candidate is not None:
            return record.candidate.trace_id
        ended = {outcome.decision_id for outcome in record.outcomes}
        is_told = served is None or served.decision_id not in ended
        return record.committed.trace_id if record.committed and not is_told else None

    def boot(self) -> None:
        """Serves what was committed before, in the calling thread."""
        self._machine.boot()

    def disown(self) -> None:
        """Forgets all decisions, before it follows any: the model serves on, and belongs to none."""
        self._machine.disown()

    def start(self) -> None:
        """Begins to follow."""
        self._thread.start()

    def order(self, desired: DesiredApplication, *, seen_s: float) -> None:
        """The newest decision; overtakes whatever is under way."""
        with self._changed:
            self._order = _Order(desired, seen_s)
            if not self._is_followed(desired):
                self._overtaken.set()
            self._changed.notify()

    def acknowledge(self, outcomes: tuple[OutcomeReport, ...]) -> None:
        """The service has these outcomes."""
        with self._changed:
            self._acknowledged.extend(outcomes)
            self._changed.notify()

    def stop(self) -> None:
        """Gives up what is under way and ends the thread; the model serves on."""
        with self._changed:
            self._is_stopping = True
            self._overtaken.set()
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(LAST_RUNS_S)

    def retire(self) -> None:
        """The service wants this application here no more: reports its lease, answers what waits, and ends."""
        self.stop()
        if (served := self.executor.served) is not None:
            self._close_lease(served)
        self.executor.close()

    def report(self) -> ApplicationReport:
        """What this application does now."""
        served, record = self.executor.served, self._machine.record
        return ApplicationReport(
            application=record.application,
            state=record.state,
            running_digest=served.digest if served else None,
            decision_id=served.decision_id if served else None,
            lease_active_s=round(served.account.active_s(time.monotonic()), 3) if served else 0.0,
            arrival_rate_rps=round(self.executor.arrival_rate_rps(), 3),
            cached_digests=self._tools.store.cached_digests()[:256],
        )

    def digests_in_use(self) -> set[str]:
        """Variants that must not be evicted."""
        return self._machine.digests_in_use()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        while not self._is_stopping:
            try:
                self._step()
            except Exception:
                # The top of a loop: whatever went wrong, the device keeps serving and follows the next order.
                logger.exception("follower failed application=%s", self.application)
                self._machine.abandon("internal error")
        self._machine.abandon("the agent stopped")

    def _step(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._order or self._acknowledged or self._is_stopping, self._due_in_s())
            order, self._order = self._order, None
            acknowledged, self._acknowledged = tuple(self._acknowledged), []
            if not self._is_stopping:
                self._overtaken.clear()
        self._machine.acknowledge(acknowledged)
        if order is not None and not self._is_stopping:
            self._obey(order)
        elif self._machine.record.state is UpdateState.SOAKING:
            self._machine.soak(self._overtaken)
        served = self.executor.served
        if served is not None and served.account.active_s(time.monotonic()) >= served.lease_s:
            self._close_lease(served)

    def _obey(self, order: _Order) -> None:
        desired = order.desired
        if self._is_followed(desired):
            return
        if self._machine.can_adopt(desired):
            self._machine.adopt(desired, seen_s=order.seen_s)
            return
        if is_under_way(self._machine.record.state):
            self._machine.abandon(f"overtaken by decision {desired.decision_id}")
        try:
            self._machine.attempt(desired, seen_s=order.seen_s, overtaken=self._overtaken)
        except AgentError:
            logger.exception("attempt failed application=%s", desired.application)
            self._machine.abandon("internal error")

    def _is_followed(self, desired: DesiredApplication) -> bool:
        """Whether this very decision is served, or on its way, already: documents repeat what has not changed."""
        candidate, served = self._machine.record.candidate, self.executor.served
        if candidate is not None:
            return candidate.decision_id == desired.decision_id
        return served is not None and served.decision_id == desired.decision_id

    def _due_in_s(self) -> float | None:
        served = self.executor.served
        dues = [SOAK_TICK_S] if self._machine.record.state is UpdateState.SOAKING else []
        if served is not None and not served.account.is_closed:
            dues.append(max(0.0, served.lease_s - served.account.active_s(time.monotonic())))
        return min(dues, default=None)

    # -- leases ------------------------------------------------------------------------------------------------------

    def _on_exchange(self, old: ServedModel | None, new: ServedModel) -> None:
        """The requests that the old model still runs belong to its lease, so it closes when they are answered."""
        if old is not None and old is not new:
            self.executor.wait_until_idle(old, timeout_s=LAST_RUNS_S)
            self._close_lease(old)

    def _close_lease(self, served: ServedModel) -> None:
        now_s = time.monotonic()
        if served.decision_id is None or not served.account.close(now_s):
            return
        self._send(
            Feedback(
                id=lease_feedback_id(served.decision_id),
                decision_id=served.decision_id,
                components=served.account.components(now_s),
                lease_closed=True,
                active_s=served.account.active_s(now_s),
                controller_version=served.controller_version,
                observed_at=self._tools.now(),
            )
        )
        self._machine.remember_closed(served.decision_id)
        logger.info("lease closed application=%s decision=%s", self.application, served.decision_id)


def lease_feedback_id(decision_id: str) -> str:
    """One lease, one feedback: the id follows from the decision, so that sending twice does nothing twice."""
    return f"{LEASE_ID_PREFIX}{hashlib.sha256(decision_id.encode()).hexdigest()[:40]}"
