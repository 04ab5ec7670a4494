"""All applications of one device: each has a follower and an executor, made and retired as desired documents ask."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime

from device_agents.budget import ThreadBudget
from device_agents.config import AgentConfig
from device_agents.delivery import Fetch
from device_agents.executor import Executor
from device_agents.follower import Follower
from device_agents.profiler import Warmed, warm_up
from device_agents.runtime import EmulatedQuota, Session
from device_agents.store import Record, Store
from device_agents.update import Tools
from device_agents.wire import ApplicationReport, DesiredApplication, DesiredState, Feedback, OutcomeReport

logger = logging.getLogger("qoe_agent.followers")

OUTCOMES_PER_APPLICATION, OUTCOMES_PER_CHECK_IN = 64, 256
REPORTS_PER_CHECK_IN = 64


class Followers:
    """``executors`` (by model name) is what the local server serves; ``on_change`` is told of anything new."""

    def __init__(
        self,
        config: AgentConfig,
        store: Store,
        *,
        fetch: Fetch,
        now: Callable[[], datetime],
        send: Callable[[Feedback], None],
        on_change: Callable[[], None],
    ) -> None:
        self.executors: dict[str, Executor] = {}
        self._config = config
        self._store = store
        self._fetch = fetch
        self._now = now
        self._send = send
        self._on_change = on_change
        self._quota = EmulatedQuota(config.cpu_quota_emulated) if config.cpu_quota_emulated else None
        self._budget = ThreadBudget()
        self._all: dict[str, Follower] = {}

    # -- life ------------------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Serves what was committed before, without asking anybody."""
        for record in self._store.records():
            self._make(record).boot()

    def start(self) -> None:
        """Begins to follow, each in a thread of its own."""
        for follower in self._all.values():
            follower.start()

    def disown(self) -> None:
        """The device is another now: what serves, serves on, and belongs to no decision."""
        for follower in self._all.values():
            follower.disown()

    def stop(self) -> None:
        """Gives up what is under way; the models serve on until ``close``."""
        for follower in self._all.values():
            follower.stop()

    def close(self) -> None:
        """Answers what waits, and ends."""
        for executor in self.executors.values():
            executor.close()

    # -- orders ----------------------------------------------------------------------------------------------------

    def follow(self, state: DesiredState, *, seen_s: float) -> None:
        """Gives each application its order; those that the document leaves out are retired."""
        wanted = {desired.application for desired in state.applications}
        for application in set(self._all) - wanted:
            self._retire(application)
        for desired in state.applications:
            follower = self._all.get(desired.application)
            if follower is not None and self.executors.get(desired.model_name) is not follower.executor:
                self._retire(desired.application)  # the model goes by another name now
                follower = None
            if follower is None:
                if desired.model_name in self.executors:
                    logger.error("model name taken application=%s model=%s", desired.application, desired.model_name)
                    continue
                follower = self._make(Record(application=desired.application, model_name=desired.model_name))
                follower.start()
            follower.order(desired, seen_s=seen_s)

    def _make(self, record: Record) -> Follower:
        executor = Executor(record.model_name, queue_requests=self._config.queue_requests, budget=self._budget)
        tools = Tools(
            store=self._store,
            fetch=self._fetch,
            warm_up=self._warm_up,
            now=self._now,
            in_use=self.digests_in_use,
            on_change=self._on_change,
        )
        follower = Follower(record, executor, tools, send=self._send)
        self.executors[record.model_name] = executor
        self._all[record.application] = follower
        return follower

    def _retire(self, application: str) -> None:
        follower = self._all.pop(application)
        self.executors.pop(follower.executor.model_name, None)
        follower.retire()
        self._store.forget_record(application)
        logger.info("retired application=%s", application)

    def digests_in_use(self) -> set[str]:
        """Variants of all applications that must stay on disk."""
        return {digest for follower in list(self._all.values()) for digest in follower.digests_in_use()}

    def _warm_up(self, desired: DesiredApplication, *, must_match: Session | None) -> Warmed:
        digest, threads = desired.variant.digest, desired.serving.threads
        known = next((p for p in self._store.profiles() if (p.digest, p.threads) == (digest, threads)), None)
        return warm_up(
            self._store.artifact(digest),
            digest=digest,
            threads=threads,
            max_batch=desired.serving.max_batch,
            budget_s=self._config.profile_budget_s,
            known=known,
            must_match=must_match,
            quota=self._quota,
        )

    # -- reports ---------------------------------------------------------------------------------------------------

    def reports(self) -> tuple[ApplicationReport, ...]:
        """What each application does now."""
        return tuple(follower.report() for follower in list(self._all.values()))[:REPORTS_PER_CHECK_IN]

    def trace_id(self) -> str | None:
        """The trace of a decision that is followed now, or whose end is yet to be told."""
        return next((found for follower in list(self._all.values()) if (found := follower.trace_id)), None)

    def first_outcomes(self) -> dict[Follower, tuple[OutcomeReport, ...]]:
        """As many ends of attempts as one check-in carries; only those are acknowledged by its reply."""
        chosen: dict[Follower, tuple[OutcomeReport, ...]] = {}
        room = OUTCOMES_PER_CHECK_IN
        for follower in list(self._all.values()):
            chosen[follower] = follower.outcomes[: min(room, OUTCOMES_PER_APPLICATION)]
            room -= len(chosen[follower])
        return chosen
