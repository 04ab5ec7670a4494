"""The health gate: what a soaking variant must have shown before it is committed. Arithmetic on counts, no clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from device_agents.wire import HealthGate

SOAK_EXTENSION = 3.0
STUCK_AFTER_S = 5.0

Evidence = Literal["traffic", "synthetic", "none"]


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
