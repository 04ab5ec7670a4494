"""The agent of one device: boots what was committed, then checks in, follows desired documents and drains the spool.

Threads, so that nothing here ever blocks serving: one loop that talks to the service, one that listens for
wake-ups, one follower per application. All of them sleep until something is due.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Self

import httpx

from device_agents.client import ServiceClient, asked_wait_s, full_jitter_s
from device_agents.config import AgentConfig
from device_agents.desired import open_desired
from device_agents.drain import TOO_LARGE_OR_WRONG, Drain
from device_agents.errors import AgentError, DesiredRefused, NotFound, ServiceRefused, ServiceUnreachable
from device_agents.executor import Executor
from device_agents.followers import Followers
from device_agents.membership import Membership
from device_agents.profiling_jobs import Idleness, ProfilingJobs
from device_agents.runtime import Array
from device_agents.served import Answer
from device_agents.spool import Kept, Spool
from device_agents.store import Identity, Store
from device_agents.telemetry import TelemetryReader, hardware
from device_agents.version import agent_version
from device_agents.wake_ups import REFUSED_PAUSE_S, WakeUps
from device_agents.wire import CheckIn, CheckInReply, Feedback, Hardware, ProfileReport, WakeUp

logger = logging.getLogger("qoe_agent")

SHORTEST_CHECK_IN_S = 0.2
LONGEST_SPREAD_S = 60.0


def utc_now() -> datetime:
    """The wall clock."""
    return datetime.now(UTC)


@dataclass
class _Due:
    """What the loop has to do next. Set by any thread, taken by the loop."""

    check_in: bool = True
    look_at_s: float = 0.0
    """Monotonic time; infinite when there is no reason to look."""


class Agent:
    """One device. What it serves changes while it runs."""

    def __init__(
        self,
        config: AgentConfig,
        *,
        transport: httpx.BaseTransport | None = None,
        now: Callable[[], datetime] = utc_now,
        rng: random.Random | None = None,
        idleness: Idleness | None = None,
    ) -> None:
        self.config = config
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
        self.store.secure_identity()
        self.spool = Spool(
            config.state_dir / "spool.sqlite3",
            budget_bytes=config.spool_budget_bytes,
            max_age_s=config.spool_max_age_s,
        )
        self._drain = Drain(self.spool, self.client.send_feedback, rng=self.random)
        self._membership = Membership(config, self.store, self.client)
        self._telemetry = TelemetryReader(downlink_mbps=self.client.throughput.mbps)
        self._followers = Followers(
            config,
            self.store,
            fetch=self.client.download,
            now=now,
            send=self._send_lease,
            on_change=lambda: self.poke(check_in=True),
        )
        self.profiling = ProfilingJobs(
            config,
            self.store,
            fetch=self.client.download,
            reports=self._followers.reports,
            in_use=self._followers.digests_in_use,
            read_hardware=self._hardware_now,
            on_result=lambda: self.poke(check_in=True),
            idleness=idleness,
        )
        # The current document is read again after a restart: what it asks for may not have been reached.
        self._seen_version = max(-1, self.store.seen_version() - 1)
        self._etag = ""
        self._service_time: tuple[datetime, float] | None = None
        self._told_profiles: set[tuple[str, int]] = set()
        self._told_hardware: Hardware | None = None
        self._due = _Due()
        self._poked = threading.Condition()
        self._stopping = threading.Event()
        self._next_check_in_s = 0.0
        self._wake_ups = WakeUps(self.client, on_wake=self._woken, rng=self.random, stopping=self._stopping)
        self._threads: list[threading.Thread] = []

    # -- life ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def executors(self) -> dict[str, Executor]:
        """What the local server serves, by model name."""
        return self._followers.executors

    @property
    def is_enrolled(self) -> bool:
        """Whether the device has a credential of this service."""
        return self.client.identity is not None

    def enrol(self) -> Identity:
        """Trades the configured token for a credential and keeps it. Raises ServiceRefused or ServiceUnreachable."""
        if self._membership.enrol(self.read_hardware()):
            # Decisions made for another device must not be reported; what serves, serves on.
            self._seen_version, self._etag = -1, ""
            self._followers.disown()
            self.profiling.order(None)
        assert self.client.identity is not None, "enrolment keeps an identity"
        return self.client.identity

    def boot(self) -> None:
        """Serves what was committed before, without asking anybody."""
        self._followers.boot()

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
                self._stopping.wait(max(full_jitter_s(failures, self.random, cap_s=30.0), asked_wait_s(error)))
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
        self._followers.start()
        self.profiling.start()
        for name, work in (("loop", self._loop), ("wake-ups", self._wake_ups.listen)):
            thread = threading.Thread(target=work, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Ends all threads, answers what waits, and releases the state folder."""
        self._stopping.set()
        self.poke()
        self.client.hang_up()
        self._followers.stop()
        self.profiling.stop()
        for thread in list(self._threads):
            thread.join(5.0)
        self._followers.close()
        self.client.close()
        self.spool.close()
        self.store.unlock()

    def poke(self, *, check_in: bool = False, look_at_s: float = math.inf) -> None:
        """Says that something is due: a check-in now, a look at the desired state at that monotonic time."""
        with self._poked:
            self._due = _Due(check_in=self._due.check_in or check_in, look_at_s=min(self._due.look_at_s, look_at_s))
            self._poked.notify()

    def infer(
        self,
        model_name: str,
        inputs: Mapping[str, Array],
        *,
        timeout_s: float | None = None,
        within_ms: float = math.inf,
    ) -> Answer:
        """Answers an app in this process; ``answer.served.decision_id`` is what it may rate, by ``accept_feedback``.

        Raises NotFound, Overloaded, BadRequest or RunFailed, and TimeoutError after ``timeout_s``.
        """
        executor = self.executors.get(model_name)
        if executor is None:
            raise NotFound(f"unknown model {model_name}")
        return executor.infer(inputs, timeout_s=timeout_s, within_ms=within_ms)

    def accept_feedback(self, feedback: Feedback) -> Kept:
        """Keeps feedback of a local app for the service, and says whether it could. It may wait for days: it is told
        when it was given, by the clock whose offset the service knows."""
        observed = feedback.model_copy(update={"observed_at": feedback.observed_at or self._now()})
        kept = self.spool.put(observed, now=self._service_now())
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
                if self._membership.has_new_credential(error):
                    continue
                logger.warning("service trouble reason=%r failures=%d", str(error), failures)
                wait_s = max(full_jitter_s(failures, self.random), asked_wait_s(error))
                failures += 1
                is_refused = isinstance(error, ServiceRefused) and error.permanent
                self._stopping.wait(max(wait_s, REFUSED_PAUSE_S) if is_refused else wait_s)
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
            due, self._due = self._due, _Due(check_in=False, look_at_s=math.inf)
        is_check_in_due = due.check_in or time.monotonic() >= self._next_check_in_s
        try:
            self._drain.run_if_due(self._service_now())
            if is_check_in_due:
                if self._check_in():
                    due.look_at_s = 0.0
                is_check_in_due = False
            if time.monotonic() >= due.look_at_s:
                self._look()
                due.look_at_s = math.inf
        finally:
            self.poke(check_in=is_check_in_due, look_at_s=due.look_at_s)

    def _sleep(self) -> None:
        with self._poked:
            if self._due.check_in:
                return
            due_s = min(self._next_check_in_s, self._due.look_at_s)
            if len(self.spool):
                due_s = min(due_s, self._drain.next_s)
            self._poked.wait(max(0.0, due_s - time.monotonic()))

    def _check_in(self) -> bool:
        """Reports; True when the service has a newer document."""
        outcomes = self._followers.first_outcomes()
        profiles = self._untold_profiles()
        found, telemetry = self.read_hardware(), self._telemetry.read()
        reply = self._send_check_in(
            CheckIn(
                sent_at=self._now(),
                agent_version=agent_version(),
                desired_version_seen=max(0, self._seen_version),
                hardware=None if found == self._told_hardware else found,
                telemetry=telemetry,
                applications=self._followers.reports(),
                outcomes=tuple(outcome for told in outcomes.values() for outcome in told),
                profiles=profiles,
                dropped=self.spool.dropped(),
                serving_url=self.serving_url,
                keys_version=self.client.identity.keys_version if self.client.identity else None,
                profiling=self.profiling.state(telemetry),
            )
        )
        for follower, told in outcomes.items():
            if told:
                follower.acknowledge(told)
        self._told_profiles |= {(profile.digest, profile.threads) for profile in profiles}
        self._told_hardware = found
        self._service_time = (reply.server_time, time.monotonic())
        self._next_check_in_s = time.monotonic() + max(SHORTEST_CHECK_IN_S, reply.check_in_interval_s)
        if reply.keys is not None:
            self._membership.trust(reply.keys)
        return reply.desired_version > self._seen_version

    def _send_check_in(self, message: CheckIn) -> CheckInReply:
        """What the service will never take of a measurement must not keep the device from being heard.

        Where the check-in is refused without the measurements too, they are not the reason, and all are kept.
        """
        trace_id, told = self._followers.trace_id(), message.profiling
        assert told is not None, "every check-in says something of profiling"
        try:
            reply = self.client.check_in(message, trace_id=trace_id)
        except ServiceRefused as error:
            if error.http_status not in TOO_LARGE_OR_WRONG or not told.results:
                raise
            without = message.model_copy(update={"profiling": told.model_copy(update={"results": ()})})
            reply = self.client.check_in(without, trace_id=trace_id)
            self.profiling.refuse(told, error.reason)
        else:
            self.profiling.acknowledge(told)
        return reply

    def _hardware_now(self) -> Hardware:
        return self.read_hardware()

    def _untold_profiles(self) -> tuple[ProfileReport, ...]:
        return tuple(p for p in self.store.profiles() if (p.digest, p.threads) not in self._told_profiles)[:256]

    def _service_now(self) -> datetime | None:
        """The service's time, counted on from its last reply, so that no jump of the wall clock moves it."""
        if self._service_time is None:
            return None
        told, at_s = self._service_time
        return told + timedelta(seconds=time.monotonic() - at_s)

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
        try:
            self.store.save_seen_version(state.version)
        except OSError as error:
            # A full disk: what cannot be saved is not begun, and the service hears of it. Looked at again later.
            logger.warning("desired version not kept version=%d reason=%r", state.version, error.strerror)
            self._followers.follow(state, seen_s=seen_s)
            return
        self._followers.follow(state, seen_s=seen_s)
        self.profiling.order(state.profiling)
        # Not before: what fails on the way here must be fetched again, instead of being "not modified" for ever.
        self._seen_version, self._etag = state.version, etag

    def _send_lease(self, feedback: Feedback) -> None:
        self.spool.put(feedback, now=self._service_now())
        self._drain.hurry()
        self.poke(check_in=True)

    def _woken(self, wake_up: WakeUp | None) -> None:
        """Some time within the spread that the service asks for, unless the version is known already."""
        if wake_up is not None and wake_up.version == self._seen_version:
            return
        spread_s = wake_up.spread_s if wake_up is not None else 0.0
        self.poke(look_at_s=time.monotonic() + self.random.uniform(0.0, min(spread_s, LONGEST_SPREAD_S)))
