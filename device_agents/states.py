"""The update state machine as one table: states, where each leads, and what a restart makes of it. Does nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from device_agents.wire import Outcome, UpdateState


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

ATTEMPTS_PER_DECISION = 3
# Trying the same decision again cannot end better; the other outcomes may, when the document is read again.
TERMINAL = frozenset({Outcome.ROLLED_BACK, Outcome.VERIFY_FAILED, Outcome.INCOMPATIBLE})


def is_under_way(state: UpdateState) -> bool:
    """Whether an attempt is in progress."""
    return state not in AT_REST
