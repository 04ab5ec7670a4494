"""The update state machine of one application: one table, one attempt at a time, saved before it acts.

What is here: the table, the health gate, and the steps of an attempt. When to attempt is the follower's business.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol

from device_agents.errors import AttemptFailed, Superseded
from device_agents.executor import Executor, ServedModel
from device_agents.lease import LeaseAccount
from device_agents.profiler import LONGEST_MS, Warmed
from device_agents.runtime import Session
from device_agents.store import Record, Store
from device_agents.wire import (
    DesiredApplication,
    HealthGate,
    Outcome,
    OutcomeReport,
    UpdateState,
    VariantReference,
)

logger = logging.getLogger("qoe_agent.update")

ATTEMPTS_PER_DECISION = 3
SOAK_EXTENSION = 3.0
STUCK_AFTER_S = 5.0
WARM_UP_LIMIT_S = 120.0
# Trying the same decision again cannot end better; the other outcomes may, when the document is read again.
TERMINAL = frozenset({Outcome.ROLLED_BACK, Outcome.VERIFY_FAILED, Outcome.INCOMPATIBLE})

Evidence = Literal["traffic", "synthetic", "none"]


@dataclass(frozen=True)
class Step:
    """One state: where success and failure lead, where a restart finds it, and what a restart reports."""

    done: UpdateState | None
    failed: UpdateState | None
    booted: UpdateState
    interrupted: Outcome | None


S = UpdateState
STEPS: Mapping[UpdateState, Step] = {
    # state                done            failed         after a restart    and the restart reports
    S.IDLE: Step(S.DOWNLOADING, None, S.IDLE, None),
    S.DOWNLOADING: Step(S.VERIFYING, S.ROLLED_BACK, S.ROLLED_BACK, Outcome.DOWNLOAD_FAILED),
    S.VERIFYING: Step(S.STAGED, S.ROLLED_BACK, S.ROLLED_BACK, Outcome.DOWNLOAD_FAILED),
    S.STAGED: Step(S.WARMING, S.ROLLED_BACK, S.ROLLED_BACK, Outcome.DOWNLOAD_FAILED),
    S.WARMING: Step(S.SOAKING, S.ROLLED_BACK, S.ROLLED_BACK, Outcome.ROLLED_BACK),
    S.SOAKING: Step(S.COMMITTED, S.ROLLED_BACK, S.ROLLED_BACK, Outcome.ROLLED_BACK),
    S.COMMITTED: Step(S.DOWNLOADING, None, S.COMMITTED, None),
    S.ROLLED_BACK: Step(S.DOWNLOADING, None, S.ROLLED_BACK, None),
}
AT_REST = frozenset(state for state, step in STEPS.items() if step.failed is None)


def is_under_way(state: UpdateState) -> bool:
    """Whether an attempt is in progress."""
    return state not in AT_REST


@dataclass(frozen=True)
class Verdict:
    """What a health gate says: wait on, commit on some evidence, or roll back for a reason."""

    is_final: bool = False
    evidence: Evidence = "none"
    problem: str = ""


def judge(
    gate: HealthGate,
    *,
    requests: int,
    errors: int,
    p95_ms: float | None,
    soaked_s: float,
    unanswered: int = 0,
    stuck_after_s: float = STUCK_AFTER_S,
) -> Verdict:
    """The health gate. Fails early on clear evidence; passes after the soak time and enough requests.

    With no traffic it passes on the warm-up alone, marked synthetic; with too little it waits up to three soak
    times and then judges what there is. Requests that wait or run while none was answered are no lack of traffic:
    it waits as long, ``stuck_after_s`` at least, and then fails.

    >>> judge(HealthGate(min_requests=10, soak_s=5), requests=10, errors=5, p95_ms=1.0, soaked_s=1).problem
    '5 of 10 requests failed'
    """
    is_enough = requests >= gate.min_requests
    is_over = soaked_s >= gate.soak_s
    is_stuck = unanswered > 0 and not requests
    is_thin = is_stuck or (requests > 0 and not is_enough)
    extended_s = max(SOAK_EXTENSION * gate.soak_s, stuck_after_s if is_stuck else 0.0)
    if (is_thin and soaked_s < extended_s) if is_over else not (is_enough and requests):
        return Verdict()
    if requests and errors / requests > gate.max_error_share:
        return Verdict(is_final=True, problem=f"{errors} of {requests} requests failed")
    if not is_over:
        return Verdict()
    if is_stuck:
        return Verdict(is_final=True, problem=f"none of {unanswered} requests was answered in {soaked_s:.0f} s")
    if gate.max_p95_ms is not None and p95_ms is not None and p95_ms > gate.max_p95_ms:
        return Verdict(is_final=True, problem=f"p95 {p95_ms:.1f} ms is above {gate.max_p95_ms:.1f} ms")
    return Verdict(is_final=True, evidence="traffic" if is_enough and requests else "synthetic")


class Fetch(Protocol):
    """Completes a variant's part file and returns the bytes fetched for it; ``ServiceClient.download`` is one."""

    def __call__(
        self,
        variant: VariantReference,
        part: Path,
        *,
        is_cancelled: Callable[[], bool],
        wait: Callable[[float], object],
        trace_id: str | None = None,
    ) -> int: ...


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
        self._fallback: ServedModel | None = None
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
        if committed is None or self._serve_again(committed):
            return
        is_saved = previous is not None and self._serve_again(previous)
        reason = "the committed variant could not be served after a restart"
        self._end(
            S.ROLLED_BACK, committed, Outcome.VERIFY_FAILED, reason,
            committed=previous if is_saved else None, previous=None,
        )  # fmt: skip

    def attempt(self, desired: DesiredApplication, *, seen_s: float, overtaken: threading.Event) -> None:
        """Follows a decision that needs another variant or session, up to serving it: the state is then soaking.

        A failure ends in ROLLED_BACK with an outcome and the committed model serving. ``overtaken`` ends it early.
        """
        if self.record.attempts.get(desired.decision_id, 0) >= ATTEMPTS_PER_DECISION:
            logger.warning("gave up application=%s decision=%s", desired.application, desired.decision_id)
            return
        self._swap_ms, self._fetched_bytes = 0.0, 0
        try:
            attempts = self.record.attempts.get(desired.decision_id, 0) + 1
            self.record = self.record.with_attempts(desired.decision_id, attempts)
            self._save(state=S.DOWNLOADING, candidate=desired)
            self._bring(desired, overtaken)
            self._swap(desired, overtaken, seen_s)
        except Superseded as error:
            self._end(S.IDLE, desired, Outcome.SUPERSEDED, error.reason)
        except AttemptFailed as error:
            self._fail(desired, error.outcome, error.reason)
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
            self._fallback = None
            self._end(S.COMMITTED, desired, Outcome.ALREADY_RUNNING, "", committed=desired)
        else:
            self._save(state=S.SOAKING, candidate=desired)
        self._exchange(desired, served.session)

    def soak(self) -> None:
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
            self._return_to_fallback(gives_up_old=requests == errors)
        elif verdict.is_final:
            self._commit(candidate, verdict.evidence)

    def abandon(self, reason: str) -> None:
        """Gives up what is under way; what it already serves goes on until the next exchange."""
        if self.record.candidate is not None:
            self._end(S.IDLE, self.record.candidate, Outcome.SUPERSEDED, reason)

    def disown(self) -> None:
        """Forgets what was decided for another device; what runs goes on under no decision."""
        self.record = Record(application=self.record.application, model_name=self.record.model_name)
        self._fallback = None
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
        """Variants that must stay on disk: running, committed, previous, and being tried."""
        known = (self.record.committed, self.record.previous, self.record.candidate)
        served = self.executor.served
        return {desired.variant.digest for desired in known if desired} | ({served.digest} if served else set())

    # -- steps of an attempt ---------------------------------------------------------------------------------------

    def _bring(self, desired: DesiredApplication, overtaken: threading.Event) -> None:
        """downloading → verifying → staged. A variant that is on disk takes the same way, without the bytes."""
        variant = desired.variant
        with self._tools.store.bringing(variant.digest, is_cancelled=overtaken.is_set):
            is_right = self._fetch_and_verify(desired, overtaken)
            if not is_right and self._fetched_bytes < variant.size_bytes:
                # What lay here from before may be what is damaged, rather than what the service offers.
                self._save(state=S.DOWNLOADING)
                is_right = self._fetch_and_verify(desired, overtaken)
            if not is_right:
                raise AttemptFailed("size or sha256 differ from what was announced", outcome=Outcome.VERIFY_FAILED)
            self._advance(overtaken)

    def _fetch_and_verify(self, desired: DesiredApplication, overtaken: threading.Event) -> bool:
        store, variant = self._tools.store, desired.variant
        if not store.has_artifact(variant.digest):
            store.make_room(digest=variant.digest, size_bytes=variant.size_bytes, keep=self._tools.in_use())
            self._fetched_bytes = self._tools.fetch(
                variant,
                store.part(variant.digest),
                is_cancelled=overtaken.is_set,
                wait=overtaken.wait,
                trace_id=desired.trace_id,
            )
        self._advance(overtaken)
        return self._is_right(variant)

    def _is_right(self, variant: VariantReference) -> bool:
        """Whether the bytes are what was announced; they are the artifact then, and gone otherwise."""
        store = self._tools.store
        if store.has_artifact(variant.digest):
            if store.is_intact(variant.digest):
                store.touch(variant.digest)
                return True
            store.artifact(variant.digest).unlink()
            return False
        part = store.part(variant.digest)
        if part.stat().st_size != variant.size_bytes or not store.is_intact(variant.digest, part):
            store.discard_part(variant.digest)
            return False
        store.accept_part(variant.digest)
        return True

    def _swap(self, desired: DesiredApplication, overtaken: threading.Event, seen_s: float) -> None:
        """staged → warming → soaking: tried beside the running model, then exchanged by one reference."""
        self._advance(overtaken)
        running, committed = self.executor.served, self.record.committed
        warmed = self._warm_up(desired, must_match=running.session if running else None)
        if warmed.profile is not None:
            self._tools.store.save_profile(warmed.profile)
        self._advance(overtaken)
        if running is not None and committed is not None and running.decision_id == committed.decision_id:
            self._fallback = running
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
        self._fallback = None
        self._end(
            S.COMMITTED, candidate, Outcome.COMMITTED, "",
            evidence=evidence, committed=candidate, previous=previous,
        )  # fmt: skip

    def _fail(self, desired: DesiredApplication, outcome: Outcome, reason: str) -> None:
        logger.warning("attempt failed application=%s reason=%r", desired.application, reason)
        self._end(S.ROLLED_BACK, desired, outcome, reason)
        self._return_to_fallback()

    def _return_to_fallback(self, *, gives_up_old: bool = False) -> None:
        """Back to the committed model, whose session is loaded for as long as anything else serves.

        With nothing to return to, the device goes on answering with what it has.
        """
        fallback, self._fallback = self._fallback, None
        if fallback is not None and self.executor.served is not fallback:
            self._on_exchange(self.executor.swap(fallback, gives_up_old=gives_up_old), fallback)
            logger.warning("rolled back application=%s digest=%.12s", self.record.application, fallback.digest)

    def _serve_again(self, known: DesiredApplication) -> bool:
        if not self._tools.store.is_intact(known.variant.digest):
            return False
        try:
            warmed = self._warm_up(known, must_match=None)
        except AttemptFailed as error:
            logger.warning("cannot serve again digest=%.12s reason=%r", known.variant.digest, error.reason)
            return False
        self._exchange(known, warmed.session)
        return True

    def _warm_up(self, desired: DesiredApplication, *, must_match: Session | None) -> Warmed:
        """In a thread of its own, which is left behind when the variant hangs: the follower must go on."""
        ended: Future[Warmed] = Future()

        def work() -> None:
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

    def _exchange(self, desired: DesiredApplication, session: Session) -> None:
        started_s = time.monotonic()
        account = LeaseAccount(slo_p95_ms=desired.slo_p95_ms, started_s=started_s)
        if self.record.lease_closed == desired.decision_id:
            account.close(started_s)
        served = ServedModel(
            session=session,
            configuration=desired.serving,
            digest=desired.variant.digest,
            decision_id=desired.decision_id,
            account=account,
            started_s=started_s,
            lease_s=desired.lease_s,
        )
        self._on_exchange(self.executor.swap(served), served)
        self._tools.on_change()

    def _advance(self, overtaken: threading.Event) -> None:
        """Saves the next state, before anything of it is done."""
        if overtaken.is_set():
            raise Superseded("overtaken by a newer order")
        self._save(state=STEPS[self.record.state].done)

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


def _since_ms(seen_s: float) -> float:
    return (time.monotonic() - seen_s) * 1000
