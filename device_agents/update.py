"""The moves of one application through the table of states: one attempt at a time, saved before it acts.

What is here: the steps of an attempt, and what serves when one fails. When to attempt is the follower's business.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Protocol

from device_agents.delivery import Delivery, Fetch
from device_agents.errors import AttemptFailed, Superseded
from device_agents.executor import Executor
from device_agents.health import STUCK_AFTER_S, Evidence, judge
from device_agents.lease import LeaseAccount
from device_agents.profiler import LONGEST_MS, Warmed
from device_agents.runtime import Session
from device_agents.served import ServedModel
from device_agents.states import ATTEMPTS_PER_DECISION, STEPS, TERMINAL, S
from device_agents.store import Record, Store
from device_agents.wire import DesiredApplication, Outcome, OutcomeReport, ServingConfiguration, UpdateState

logger = logging.getLogger("qoe_agent.update")

WARM_UP_LIMIT_S = 120.0
WARM_UP_NICENESS = 10


class WarmUp(Protocol):
    """Loads and tries a verified variant beside the running one."""

    def __call__(self, desired: DesiredApplication, *, must_match: Session | None) -> Warmed: ...


@dataclass(frozen=True)
class Tools:
    """What an attempt needs from outside."""

    store: Store
    fetch: Fetch
    warm_up: WarmUp
    now: Callable[[], datetime]
    in_use: Callable[[], set[str]]
    on_change: Callable[[], None] = lambda: None
    warm_up_limit_s: float = WARM_UP_LIMIT_S
    stuck_after_s: float = STUCK_AFTER_S


Exchanged = Callable[[ServedModel | None, ServedModel], None]


class Machine:
    """Holds one application's record and moves it through the table. For one thread only: its follower's.

    ``on_exchange`` is told the old and the new model after each exchange; it closes the lease of the old one.
    """

    def __init__(self, record: Record, executor: Executor, tools: Tools, *, on_exchange: Exchanged) -> None:
        self.record = record
        self.executor = executor
        self._tools = tools
        self._on_exchange = on_exchange
        self._standby: ServedModel | None = None
        self._swap_ms = 0.0
        self._fetched_bytes = 0

    # -- moves -----------------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Settles what the last process left behind, then serves what is committed, once its bytes are checked."""
        step = STEPS[self.record.state]
        if step.interrupted is not None and self.record.candidate is not None:
            reason = f"the agent ended while {self.record.state.value}"
            self._end(step.booted, self.record.candidate, step.interrupted, reason)
        committed, previous = self.record.committed, self.record.previous
        if committed is None:
            self._serve_fallback_again()
        elif not self._serve_again(committed):
            is_saved = previous is not None and self._serve_again(previous)
            reason = "the committed variant could not be served after a restart"
            self._end(
                S.ROLLED_BACK, committed, Outcome.VERIFY_FAILED, reason,
                committed=previous if is_saved else None, previous=None, fallback=_fallback_of(committed),
            )  # fmt: skip
            if not is_saved:
                self._serve_fallback_again()

    def attempt(self, desired: DesiredApplication, *, seen_s: float, overtaken: threading.Event) -> None:
        """Follows a decision that needs another variant or session, up to serving it: the state is then soaking.

        A failure ends in ROLLED_BACK with an outcome and the committed model serving, or the document's fallback where
        nothing was committed. ``overtaken`` ends it early.
        """
        if self.record.attempts.get(desired.decision_id, 0) >= ATTEMPTS_PER_DECISION:
            logger.warning("gave up application=%s decision=%s", desired.application, desired.decision_id)
            self._fall_back(desired, overtaken)
            return
        self._swap_ms, self._fetched_bytes = 0.0, 0
        delivery = self._delivery(overtaken, lambda state: self._reach(state, overtaken))
        try:
            attempts = self.record.attempts.get(desired.decision_id, 0) + 1
            self.record = self.record.with_attempts(desired.decision_id, attempts)
            self._save(state=S.DOWNLOADING, candidate=desired)
            delivery.bring(desired.variant, trace_id=desired.trace_id)
            self._fetched_bytes = delivery.fetched_bytes
            self._swap(desired, overtaken, seen_s)
        except Superseded as error:
            self._end(S.IDLE, desired, Outcome.SUPERSEDED, error.reason)
        except AttemptFailed as error:
            self._fetched_bytes = delivery.fetched_bytes
            self._fail(desired, error.outcome, error.reason)
            self._fall_back(desired, overtaken)
        except OSError as error:
            self._fail(desired, Outcome.NO_SPACE, f"the state folder fails: {error.strerror}")

    def can_adopt(self, desired: DesiredApplication) -> bool:
        """Whether the running session can serve a decision as it is."""
        served = self.executor.served
        return (
            served is not None
            and served.digest == desired.variant.digest
            and served.session.threads == desired.serving.threads
        )

    def adopt(self, desired: DesiredApplication, *, seen_s: float) -> None:
        """Serves a decision with the session that runs: nothing to fetch; a variant that soaks soaks on."""
        served, candidate, committed = self.executor.served, self.record.candidate, self.record.committed
        assert served is not None, "only a running variant can be adopted"
        if candidate is not None:
            self._end(S.IDLE, candidate, Outcome.SUPERSEDED, "its variant goes on under a newer decision")
        self._swap_ms, self._fetched_bytes = _since_ms(seen_s), 0
        if committed is not None and _session_of(committed) == _session_of(desired):
            self._standby = None
            self._end(S.COMMITTED, desired, Outcome.ALREADY_RUNNING, "", committed=desired)
        else:
            self._save(state=S.SOAKING, candidate=desired)
        self._exchange(desired, served.session)

    def soak(self, overtaken: threading.Event) -> None:
        """Judges the soaking candidate by what it has served so far."""
        candidate, served = self.record.candidate, self.executor.served
        assert candidate is not None, "only a candidate soaks"
        assert served is not None, "a candidate that soaks is served"
        requests, errors, p95_ms = served.account.health()
        soaked_s = time.monotonic() - served.started_s
        verdict = judge(
            candidate.health_gate,
            requests=requests,
            errors=errors,
            p95_ms=p95_ms,
            soaked_s=soaked_s,
            unanswered=self.executor.unanswered,
            stuck_after_s=self._tools.stuck_after_s,
        )
        if verdict.problem:
            self._end(S.ROLLED_BACK, candidate, Outcome.ROLLED_BACK, verdict.problem, evidence="traffic")
            served.account.close(time.monotonic())
            self._return_to_standby(gives_up_old=requests == errors)
            self._fall_back(candidate, overtaken, gives_up_old=requests == errors)
        elif verdict.is_final:
            self._commit(candidate, verdict.evidence)

    def abandon(self, reason: str) -> None:
        """Gives up what is under way; what it already serves goes on until the next exchange."""
        if self.record.candidate is not None:
            self._end(S.IDLE, self.record.candidate, Outcome.SUPERSEDED, reason)

    def disown(self) -> None:
        """Forgets what was decided for another device; what runs goes on under no decision."""
        self.record = Record(application=self.record.application, model_name=self.record.model_name)
        self._standby = None
        if (served := self.executor.served) is not None:
            account = LeaseAccount(slo_p95_ms=LONGEST_MS, started_s=time.monotonic())
            self.executor.swap(replace(served, decision_id=None, account=account, lease_s=math.inf))

    def acknowledge(self, outcomes: Collection[OutcomeReport]) -> None:
        """Forgets outcomes that the service has."""
        if outcomes:
            self._keep(outcomes=tuple(outcome for outcome in self.record.outcomes if outcome not in outcomes))

    def remember_closed(self, decision_id: str) -> None:
        """Remembers that a decision's lease was reported, so that a restart does not open it again."""
        self._keep(lease_closed=decision_id)

    def digests_in_use(self) -> set[str]:
        """Variants that must stay on disk: running, committed, previous, being tried, and what stands in for them."""
        known = (self.record.committed, self.record.previous, self.record.candidate, self.record.fallback)
        served = self.executor.served
        return {desired.variant.digest for desired in known if desired} | ({served.digest} if served else set())

    # -- steps of an attempt ---------------------------------------------------------------------------------------

    def _delivery(self, overtaken: threading.Event, reached: Callable[[UpdateState], None]) -> Delivery:
        tools = self._tools
        return Delivery(tools.store, tools.fetch, in_use=tools.in_use, overtaken=overtaken, reached=reached)

    def _swap(self, desired: DesiredApplication, overtaken: threading.Event, seen_s: float) -> None:
        """staged → warming → soaking: tried beside the running model, then exchanged by one reference."""
        self._reach(S.WARMING, overtaken)
        running, committed = self.executor.served, self.record.committed
        warmed = self._warm_up(desired, must_match=running.session if running else None)
        if warmed.profile is not None:
            self._tools.store.save_profile(warmed.profile)
        self._reach(S.SOAKING, overtaken)
        if running is not None and running.decision_id == (committed.decision_id if committed else None):
            self._standby = running
        self._exchange(desired, warmed.session)
        self._swap_ms = _since_ms(seen_s)
        logger.info(
            "swapped application=%s decision=%s digest=%.12s swap_ms=%.0f fetched_bytes=%d",
            desired.application, desired.decision_id, desired.variant.digest, self._swap_ms, self._fetched_bytes,
        )  # fmt: skip

    def _commit(self, candidate: DesiredApplication, evidence: Evidence) -> None:
        committed, previous = self.record.committed, self.record.previous
        if committed is not None and committed.variant.digest != candidate.variant.digest:
            previous = committed
        self._standby = None
        self._end(
            S.COMMITTED, candidate, Outcome.COMMITTED, "",
            evidence=evidence, committed=candidate, previous=previous, fallback=None,
        )  # fmt: skip

    def _fail(self, desired: DesiredApplication, outcome: Outcome, reason: str) -> None:
        logger.warning("attempt failed application=%s reason=%r", desired.application, reason)
        self._end(S.ROLLED_BACK, desired, outcome, reason)
        self._return_to_standby()

    def _return_to_standby(self, *, gives_up_old: bool = False) -> None:
        """Back to what served before the attempt, whose session is loaded for as long as anything else serves."""
        standby, self._standby = self._standby, None
        if standby is not None and self.executor.served is not standby:
            self._on_exchange(self.executor.swap(standby, gives_up_old=gives_up_old), standby)
            logger.warning("rolled back application=%s digest=%.12s", self.record.application, standby.digest)

    # -- with nothing committed --------------------------------------------------------------------------------------

    def _fall_back(self, failed: DesiredApplication, overtaken: threading.Event, *, gives_up_old: bool = False) -> None:
        """Serves the fallback that the document names, under no decision, until the service decides anew.

        Without one, or when it fails too, the device goes on answering with what it has.
        """
        fallback, served = _fallback_of(failed), self.executor.served
        if fallback is None or self.record.committed is not None or overtaken.is_set():
            return
        if served is not None and served.digest == fallback.variant.digest:
            return
        self._keep(fallback=fallback)
        try:
            delivery = self._delivery(overtaken, lambda _: _raise_if_set(overtaken))
            delivery.bring(fallback.variant, trace_id=fallback.trace_id)
            warmed = self._warm_up(fallback, must_match=None)
            _raise_if_set(overtaken)
        except (AttemptFailed, Superseded) as error:
            logger.warning("no fallback application=%s reason=%r", failed.application, error.reason)
            return
        self._exchange(fallback, warmed.session, is_fallback=True, gives_up_old=gives_up_old)
        logger.warning("fell back application=%s digest=%.12s", failed.application, fallback.variant.digest)

    def _serve_fallback_again(self) -> None:
        if self.record.fallback is not None:
            self._serve_again(self.record.fallback, is_fallback=True)

    # -- sessions ----------------------------------------------------------------------------------------------------

    def _serve_again(self, known: DesiredApplication, *, is_fallback: bool = False) -> bool:
        if not self._tools.store.is_intact(known.variant.digest):
            return False
        try:
            warmed = self._warm_up(known, must_match=None)
        except AttemptFailed as error:
            logger.warning("cannot serve again digest=%.12s reason=%r", known.variant.digest, error.reason)
            return False
        self._exchange(known, warmed.session, is_fallback=is_fallback)
        return True

    def _warm_up(self, desired: DesiredApplication, *, must_match: Session | None) -> Warmed:
        """In a thread of its own, which is left behind when the variant hangs: the follower must go on."""
        ended: Future[Warmed] = Future()

        def work() -> None:
            if self.executor.served is not None and desired.serving.threads == 1:
                _give_way()  # with more threads the session's own would inherit it, and serve with it later
            try:
                ended.set_result(self._tools.warm_up(desired, must_match=must_match))
            except Exception as error:  # noqa: BLE001 - result() raises it again, in the follower's thread
                ended.set_exception(error)

        threading.Thread(target=work, name=f"warm-up-{desired.application}", daemon=True).start()
        try:
            return ended.result(self._tools.warm_up_limit_s)
        except TimeoutError as error:
            reason = f"the warm-up did not end within {self._tools.warm_up_limit_s:.0f} s"
            raise AttemptFailed(reason, outcome=Outcome.ROLLED_BACK) from error

    # -- plumbing --------------------------------------------------------------------------------------------------

    def _exchange(
        self,
        desired: DesiredApplication,
        session: Session,
        *,
        is_fallback: bool = False,
        gives_up_old: bool = False,
    ) -> None:
        """One reference is exchanged. A fallback follows no decision: it has no lease, and nobody rates it."""
        started_s = time.monotonic()
        account = LeaseAccount(slo_p95_ms=desired.slo_p95_ms, started_s=started_s)
        if self.record.lease_closed == desired.decision_id:
            account.close(started_s)
        served = ServedModel(
            session=session,
            configuration=desired.serving,
            digest=desired.variant.digest,
            decision_id=None if is_fallback else desired.decision_id,
            account=account,
            started_s=started_s,
            lease_s=math.inf if is_fallback else desired.lease_s,
        )
        self._on_exchange(self.executor.swap(served, gives_up_old=gives_up_old), served)
        self._tools.on_change()

    def _reach(self, state: UpdateState, overtaken: threading.Event) -> None:
        """Saves the next state, before anything of it is done."""
        _raise_if_set(overtaken)
        assert state in (STEPS[self.record.state].done, S.DOWNLOADING), "the table knows no such move"
        self._save(state=state)

    def _end(
        self,
        state: UpdateState,
        desired: DesiredApplication,
        outcome: Outcome,
        reason: str,
        *,
        evidence: Evidence = "none",
        **changes: object,
    ) -> None:
        report = OutcomeReport(
            application=desired.application,
            decision_id=desired.decision_id,
            outcome=outcome,
            reason=reason[:1024],
            evidence=evidence,
            download_bytes=self._fetched_bytes,
            swap_ms=min(self._swap_ms, LONGEST_MS),
            at=self._tools.now(),
        )
        if outcome in TERMINAL:
            self.record = self.record.with_attempts(desired.decision_id, ATTEMPTS_PER_DECISION)
            self._tools.store.demote(desired.variant.digest)
        elif outcome is Outcome.SUPERSEDED:
            self.record = self.record.with_attempts(desired.decision_id, 0)
        self._keep(**changes, state=state, candidate=None, outcomes=self.record.with_outcome(report).outcomes)
        self._tools.on_change()

    def _save(self, **changes: object) -> None:
        """Durable or not at all: what cannot be saved must not be done."""
        record = self.record.model_copy(update=changes)
        try:
            self._tools.store.save_record(record)
        except OSError as error:
            raise AttemptFailed(f"cannot save state: {error.strerror}", outcome=Outcome.NO_SPACE) from error
        self.record = record

    def _keep(self, **changes: object) -> None:
        """An end must be reached even on a full disk: a restart then finds the attempt open and rolls it back."""
        self.record = self.record.model_copy(update=changes)
        try:
            self._tools.store.save_record(self.record)
        except OSError:
            logger.exception("cannot save application=%s", self.record.application)


def _session_of(desired: DesiredApplication) -> tuple[str, int]:
    """What a soak vouches for: the variant and its threads. Batches and concurrency need no other session."""
    return desired.variant.digest, desired.serving.threads


def _fallback_of(desired: DesiredApplication) -> DesiredApplication | None:
    """What the document names for the worst case, under the narrowest bounds: nobody measured wider ones for it."""
    if desired.fallback is None:
        return None
    return desired.model_copy(update={"variant": desired.fallback, "serving": ServingConfiguration(), "fallback": None})


def _raise_if_set(overtaken: threading.Event) -> None:
    if overtaken.is_set():
        raise Superseded("overtaken by a newer order")


def _give_way() -> None:
    """Lets requests go before this thread: a warm-up may take the processor only while nobody else wants it."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WARM_UP_NICENESS)


def _since_ms(seen_s: float) -> float:
    return (time.monotonic() - seen_s) * 1000
