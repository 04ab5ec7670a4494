"""The health gate, as a table."""

from __future__ import annotations

import pytest

from device_agents.health import Verdict, judge
from device_agents.wire import HealthGate

GATE = HealthGate(min_requests=10, soak_s=5, max_error_share=0.1, max_p95_ms=50)
WAIT = Verdict()


@pytest.mark.parametrize(
    ("requests", "errors", "p95_ms", "soaked_s", "expected"),
    [
        (0, 0, None, 4, WAIT),
        (0, 0, None, 5, Verdict(is_final=True, evidence="synthetic")),
        (3, 0, 10.0, 5, WAIT),
        (3, 0, 10.0, 15, Verdict(is_final=True, evidence="synthetic")),
        (10, 0, 10.0, 4, WAIT),
        (10, 0, 10.0, 5, Verdict(is_final=True, evidence="traffic")),
        (10, 1, 10.0, 5, Verdict(is_final=True, evidence="traffic")),
        (10, 2, 10.0, 1, Verdict(is_final=True, problem="2 of 10 requests failed")),
        (3, 3, None, 15, Verdict(is_final=True, problem="3 of 3 requests failed")),
        (10, 0, 51.0, 4, WAIT),
        (10, 0, 51.0, 5, Verdict(is_final=True, problem="p95 51.0 ms is above 50.0 ms")),
    ],
)
def test_the_health_gate(requests: int, errors: int, p95_ms: float | None, soaked_s: float, expected: Verdict) -> None:
    assert judge(GATE, requests=requests, errors=errors, p95_ms=p95_ms, soaked_s=soaked_s) == expected


@pytest.mark.parametrize(
    ("requests", "soaked_s", "expected"),
    [
        (0, 5, WAIT),
        (0, 14, WAIT),
        (0, 15, Verdict(is_final=True, problem="none of 2 requests was answered in 15 s")),
        (10, 5, Verdict(is_final=True, evidence="traffic")),
    ],
)
def test_the_health_gate_with_requests_waiting(requests: int, soaked_s: float, expected: Verdict) -> None:
    assert judge(GATE, requests=requests, errors=0, p95_ms=None, soaked_s=soaked_s, unanswered=2) == expected
