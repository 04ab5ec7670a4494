"""The agent of one device: boots what was committed, then checks in, follows desired documents and drains the spool.

Threads, so that nothing here ever blocks serving: one loop that talks to the service, one that listens for
wake-ups, one follower per application. All of them sleep until something is due.
"""

from __future__ import annotations

import logging
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import metadata
from typing import Self

import httpx

from device_agents.client import ServiceClient, full_jitter_s
from device_agents.config import AgentConfig
from device_agents.desired import open_desired
from device_agents.errors import AgentError, BadConfiguration, DesiredRefused, ServiceRefused, ServiceUnreachable
from device_agents.executor import Executor
from device_agents.follower import Follower
from device_agents.profiler import Warmed, warm_up
from device_agents.runtime import EmulatedQuota, Session
from device_agents.spool import Kept, Spool
from device_agents.store import Identity, Record, Store
from device_agents.telemetry import TelemetryReader, hardware
from device_agents.update import Tools
from device_agents.wire import (
    FEEDBACK_BATCH_LIMIT,
    CheckIn,
    DesiredApplication,
    DesiredState,
    EnrolmentRequest,
    Feedback,
    FeedbackBatch,
    Hardware,
    OutcomeReport,
    ProfileReport,
)

logger = logging.getLogger("qoe_agent")

TOO_LARGE_OR_WRONG = frozenset({400, 413, 422})
STEADY_CONNECTION_S = 5.0
SHORTEST_CHECK_IN_S = 0.2
DRAIN_EVERY_S = 1.0
LONGEST_DRAIN_PAUSE_S = 10.0
OUTCOMES_PER_APPLICATION, OUTCOMES_PER_CHECK_IN = 64, 256


def agent_version() -> str:
    """Version of this agent; "dev" when it runs from a source tree."""
    try:
        return metadata.version("qoe-agent")
    except metadata.PackageNotFoundError:
        return "dev"


def utc_now() -> datetime:
    """The wall clock."""
    return datetime.now(UTC)


@dataclass
class _Due:
    """What the loop has to do next. Set by any thread, taken by the loop."""

    check_in: bool = True
    look: bool = True


class Agent:
    """One device. ``executors`` (by model name) is what the local server serves; it changes while running."""

    def __init__(
        self,
        config: AgentConfig,
        *,
        transport: httpx.BaseTransport | None = None,
        now: Callable[[], datetime] = utc_now,
        rng: random.Random | None = None,
    ) -> None:
        self.config = config
        self.executors: dict[str, Executor] = {}
        self.serving_url = ""
        self._now = now
        self.read_hardware: Callable[[], Hardware] = hardware
        self.random = rng or random.Random()
        self.store = Store(
            config.state_dir, disk_budget_bytes=config.disk_budget_bytes, disk_reserve_bytes=config.disk_reserve_bytes
        )
        self.client = ServiceClient(
            config.service_url,
            identity=self.store.identity(),
            allow_plaintext=config.allow_plaintext,
            ca_bundle=config.ca_bundle,
            transport=transport,
            rng=self.random,
        )
        self.store.lock()
        self.spool = Spool(
            config.state_dir / "spool.sqlite3",
            budget_bytes=config.spool_budget_bytes,
            max_age_s=config.spool_max_age_s,
        )
        self._quota = EmulatedQuota(config.cpu_quota_emulated) if config.cpu_quota_emulated else None
        self._telemetry = TelemetryReader()
        self._followers: dict[str, Follower] = {}
        # The current document is read again after a restart: what it asks for may not have been reached.
        self._seen_version = max(-1, self.store.seen_version() - 1)
        self._etag = ""
        self._service_time: tuple[datetime, float] | None = None
        self._told_profiles: set[tuple[str, int]] = set()
        self._told_hardware: Hardware | None = None
        self._batch_limit = FEEDBACK_BATCH_LIMIT
        self._due = _Due()
        self._poked = threading.Condition()
        self._stopping = threading.Event()
        self._next_check_in_s = 0.0
        self._next_drain_s = 0.0
        self._drain_failures = 0
        self._threads: list[threading.Thread] = []

    # -- life ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def is_enrolled(self) -> bool:
        """Whether the device has a credential of this service."""
        return self.client.identity is not None

    def enrol(self) -> Identity:
        """Trades the configured token for a credential and keeps it. Raises ServiceRefused or ServiceUnreachable."""
        if not self.config.token:
            raise BadConfiguration("this device is not enrolled: give --token once")
        reply = self.client.enrol(
            EnrolmentRequest(
                token=self.config.token,
                name=self.config.name,
                device_class=self.config.device_class,
                agent_version=agent_version(),
                hardware=self.read_hardware(),
                labels=self.config.labels,
            )
        )
        known = self.store.identity()
        if known is None or known.device_id != reply.device_id:
            self._forget_device()
        identity = Identity(
            service_url=self.config.service_url,
            device_id=reply.device_id,
            credential=reply.credential,
            trusted_keys=reply.trusted_keys,
        )
        self.store.save_identity(identity)
        self.client.identity = identity
        logger.info("enrolled device=%s name=%s", identity.device_id, self.config.name)
        return identity

    def _forget_device(self) -> None:
        """Another device id: decisions made for the old one must not be reported; what serves, serves on."""
        self.store.forget_device()
        self._seen_version, self._etag = -1, ""
        for follower in self._followers.values():
            follower.disown()

    def boot(self) -> None:
        """Serves what was committed before, without asking anybody."""
        for record in self.store.records():
            self._follower(record).boot()

    def enrol_until_done(self) -> bool:
        """Waits for a service that is away; raises ServiceRefused when it says no. False when stopped meanwhile."""
        failures = 0
        while not self.is_enrolled and not self._stopping.is_set():
            try:
                self.enrol()
            except (ServiceUnreachable, ServiceRefused) as error:
                if error.permanent:
                    raise
                logger.warning("cannot enrol yet reason=%r", str(error))
                self._stopping.wait(full_jitter_s(failures, self.random, cap_s=30.0))
                failures += 1
        return self.is_enrolled

    def start_once_enrolled(self) -> None:
        """Serves on, and begins to follow as soon as the service has given this device a credential."""
        thread = threading.Thread(target=self._enrol_and_start, name="enrol", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _enrol_and_start(self) -> None:
        try:
            if self.enrol_until_done():
                self.start()
        except (AgentError, ValueError) as error:
            logger.error("not enrolled: serving on without the service reason=%r", str(error))

    def start(self) -> None:
        """Begins to follow the service, in the background."""
        for follower in self._followers.values():
            follower.start()
        for work in (self._loop, self._listen):
            thread = threading.Thread(target=work, name=work.__name__.strip("_"), daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Ends all threads, answers what waits, and releases the state folder."""
        self._stopping.set()
        self.poke()
        self.client.hang_up()
        for follower in self._followers.values():
            follower.stop()
        for thread in list(self._threads):
            thread.join(5.0)
        for executor in self.executors.values():
            executor.close()
        self.client.close()
        self.spool.close()
        self.store.unlock()

    def poke(self, *, check_in: bool = False, look: bool = False) -> None:
        """Says that something is due now."""
        with self._poked:
            self._due = _Due(check_in=self._due.check_in or check_in, look=self._due.look or look)
            self._poked.notify()

    def accept_feedback(self, feedback: Feedback) -> Kept:
        """Keeps feedback of a local app for the service, and says whether it could."""
        kept = self.spool.put(feedback, now=self._service_now())
        self.poke()
        return kept

    # -- the loop --------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                self.work_once()
                failures = 0
                self._sleep()
            except AgentError as error:
                logger.warning("service trouble reason=%r failures=%d", str(error), failures)
                wait_s = full_jitter_s(failures, self.random)
                failures += 1
                if isinstance(error, ServiceRefused):
                    wait_s = max(wait_s, error.retry_after_s or 0.0, 30.0 if error.permanent else 0.0)
                self._stopping.wait(wait_s)
            except Exception:
                # The top of a loop: the device serves on, and the next round begins afresh.
                logger.exception("loop failed")
                self._stopping.wait(full_jitter_s(failures, self.random, base_s=5.0))
                failures += 1

    def work_once(self) -> None:
        """One round: send feedback, check in if due, look at the desired state if due. Raises what the client does.

        Feedback goes first, so that the service knows how a lease ended when the check-in makes it decide anew.
        """
        with self._poked:
            due, self._due = self._due, _Due(check_in=False, look=False)
        is_check_in_due = due.check_in or time.monotonic() >= self._next_check_in_s
        try:
            self._drain_if_due()
            if is_check_in_due:
                due.look |= self._check_in()
                is_check_in_due = False
            if due.look:
                self._look()
                due.look = False
        finally:
            self.poke(check_in=is_check_in_due, look=due.look)

    def _sleep(self) -> None:
        with self._poked:
            if self._due.check_in or self._due.look:
                return
            due_s = min(self._next_check_in_s, self._next_drain_s) if len(self.spool) else self._next_check_in_s
            self._poked.wait(max(0.0, due_s - time.monotonic()))

    def _check_in(self) -> bool:
        """Reports; True when the service has a newer document."""
        followers = list(self._followers.values())
        outcomes = _first_outcomes(followers)
        profiles = self._untold_profiles()
        found = self.read_hardware()
        reply = self.client.check_in(
            CheckIn(
                sent_at=self._now(),
                agent_version=agent_version(),
                desired_version_seen=max(0, self._seen_version),
                hardware=None if found == self._told_hardware else found,
                telemetry=self._telemetry.read(),
                applications=tuple(follower.report() for follower in followers)[:64],
                outcomes=tuple(outcome for told in outcomes.values() for outcome in told),
                profiles=profiles,
                dropped=self.spool.dropped(),
                serving_url=self.serving_url,
            ),
            trace_id=next((trace_id for follower in followers if (trace_id := follower.trace_id)), None),
        )
        for follower, told in outcomes.items():
            if told:
                follower.acknowledge(told)
        self._told_profiles |= {(profile.digest, profile.threads) for profile in profiles}
        self._told_hardware = found
        self._service_time = (reply.server_time, time.monotonic())
        self._next_check_in_s = time.monotonic() + max(SHORTEST_CHECK_IN_S, reply.check_in_interval_s)
        return reply.desired_version > self._seen_version

    def _untold_profiles(self) -> tuple[ProfileReport, ...]:
        return tuple(p for p in self.store.profiles() if (p.digest, p.threads) not in self._told_profiles)[:256]

    def _service_now(self) -> datetime | None:
        """The service's time, counted on from its last reply, so that no jump of the wall clock moves it."""
        if self._service_time is None:
            return None
        told, at_s = self._service_time
        return told + timedelta(seconds=time.monotonic() - at_s)

    def _drain_if_due(self) -> None:
        """Feedback that cannot be read or sent has a back-off of its own: the device must still be heard and led."""
        if time.monotonic() < self._next_drain_s:
            return
        limit = self._batch_limit
        try:
            sent = self._drain()
        except (AgentError, sqlite3.Error, ValueError) as error:
            pause_s = full_jitter_s(self._drain_failures, self.random, cap_s=LONGEST_DRAIN_PAUSE_S)
            if isinstance(error, ServiceRefused):
                pause_s = max(pause_s, error.retry_after_s or 0.0, LONGEST_DRAIN_PAUSE_S if error.permanent else 0.0)
            self._drain_failures += 1
            logger.warning("feedback waits reason=%r failures=%d", str(error), self._drain_failures)
        else:
            self._drain_failures = 0
            pause_s = DRAIN_EVERY_S if 0 < sent < limit else 0.0
        self._next_drain_s = time.monotonic() + pause_s

    def _drain(self) -> int:
        """Sends one batch, newest rewards first, and returns how many it held.

        What is refused for good must not block what is not.
        """
        items = self.spool.batch(now=self._service_now(), limit=self._batch_limit)
        if not items:
            return 0
        try:
            reply = self.client.send_feedback(FeedbackBatch(items=items))
        except ServiceRefused as error:
            if error.http_status not in TOO_LARGE_OR_WRONG:
                raise
            if len(items) == 1:
                logger.warning("feedback refused id=%s reason=%r", items[0].id, error.reason)
                self.spool.refuse(items[0].id)
            self._batch_limit = max(1, len(items) // 2)
            return FEEDBACK_BATCH_LIMIT
        self.spool.settle(reply.results)
        self._batch_limit = min(FEEDBACK_BATCH_LIMIT, self._batch_limit * 2)
        return len(items)

    # -- desired state -----------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Fetches the desired document and gives each application its order."""
        seen_s = time.monotonic()
        found = self.client.desired(self._etag)
        if found is None:
            return
        signed, etag = found
        assert self.client.identity is not None, "only an enrolled device looks"
        try:
            state = open_desired(
                signed,
                trusted_keys=self.client.identity.trusted_keys,
                device_id=self.client.identity.device_id,
                seen_version=self._seen_version,
                now=self._service_now() or self._now(),
            )
        except DesiredRefused as error:
            logger.warning("desired document refused reason=%r", error.reason)
            return
        self.store.save_seen_version(state.version)
        self._follow(state, seen_s)
        # Not before: what fails on the way here must be fetched again, instead of being "not modified" for ever.
        self._seen_version, self._etag = state.version, etag

    def _follow(self, state: DesiredState, seen_s: float) -> None:
        wanted = {desired.application for desired in state.applications}
        for application in set(self._followers) - wanted:
            self._retire(application)
        for desired in state.applications:
            follower = self._followers.get(desired.application)
            if follower is not None and self.executors.get(desired.model_name) is not follower.executor:
                self._retire(desired.application)  # the model goes by another name now
                follower = None
            if follower is None:
                if desired.model_name in self.executors:
                    logger.error("model name taken application=%s model=%s", desired.application, desired.model_name)
                    continue
                follower = self._follower(Record(application=desired.application, model_name=desired.model_name))
                follower.start()
            follower.order(desired, seen_s=seen_s)

    def _follower(self, record: Record) -> Follower:
        executor = Executor(record.model_name, queue_requests=self.config.queue_requests)
        tools = Tools(
            store=self.store,
            fetch=self.client.download,
            warm_up=self._warm_up,
            now=self._now,
            in_use=self._digests_in_use,
            on_change=lambda: self.poke(check_in=True),
        )
        follower = Follower(record, executor, tools, send=self._send_lease)
        self.executors[record.model_name] = executor
        self._followers[record.application] = follower
        return follower

    def _retire(self, application: str) -> None:
        follower = self._followers.pop(application)
        self.executors.pop(follower.executor.model_name, None)
        follower.retire()
        self.store.forget_record(application)
        logger.info("retired application=%s", application)

    def _digests_in_use(self) -> set[str]:
        return {digest for follower in list(self._followers.values()) for digest in follower.digests_in_use()}

    def _send_lease(self, feedback: Feedback) -> None:
        self.spool.put(feedback, now=self._service_now())
        if not self._drain_failures:
            self._next_drain_s = 0.0
        self.poke(check_in=True)

    def _warm_up(self, desired: DesiredApplication, *, must_match: Session | None) -> Warmed:
        digest, threads = desired.variant.digest, desired.serving.threads
        known = next((p for p in self.store.profiles() if (p.digest, p.threads) == (digest, threads)), None)
        return warm_up(
            self.store.artifact(digest),
            digest=digest,
            threads=threads,
            max_batch=desired.serving.max_batch,
            budget_s=self.config.profile_budget_s,
            known=known,
            must_match=must_match,
            quota=self._quota,
        )

    # -- wake-ups ----------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            connected_s = time.monotonic()
            try:
                for _ in self.client.wake_ups():
                    self.poke(look=True)
                    if self._stopping.is_set():
                        return
                wait_s = self.random.uniform(0.0, 1.0)
            except AgentError as error:
                logger.debug("wake-up channel ended reason=%r", str(error))
                wait_s = full_jitter_s(failures, self.random)
                if isinstance(error, ServiceRefused) and error.permanent:
                    wait_s = max(wait_s, 30.0)
            except Exception:
                # The top of a loop: without wake-ups the agent still looks at every check-in.
                logger.exception("listener failed")
                wait_s = full_jitter_s(failures, self.random, base_s=5.0)
            failures = 0 if time.monotonic() - connected_s > STEADY_CONNECTION_S else failures + 1
            self._stopping.wait(wait_s)


def _first_outcomes(followers: Sequence[Follower]) -> dict[Follower, tuple[OutcomeReport, ...]]:
    """As many ends of attempts as one check-in carries; only those are acknowledged by its reply."""
    chosen: dict[Follower, tuple[OutcomeReport, ...]] = {}
    room = OUTCOMES_PER_CHECK_IN
    for follower in followers:
        chosen[follower] = follower.outcomes[: min(room, OUTCOMES_PER_APPLICATION)]
        room -= len(chosen[follower])
    return chosen
