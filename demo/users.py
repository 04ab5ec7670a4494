"""Simulated users: how content each persona is with the answers of one moment. Pure arithmetic; nobody real is meant.

    speed  = mean over the requests of 1 / (1 + (latency_ms / patience_ms) ** steepness)
    trust  = max(0, 1 - strictness * share of wrong answers)
    rating = speed ** haste * trust ** care          in [0, 1]

A request that failed or was refused counts as infinitely slow and wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Experience:
    """One request as its user saw it: time from when it should have been sent, and whether the answer was right."""

    latency_ms: float
    is_correct: bool


REFUSED = Experience(latency_ms=math.inf, is_correct=False)


@dataclass(frozen=True)
class Persona:
    """What a simulated user values. `patience_ms` is the latency that halves the speed term."""

    name: str
    patience_ms: float
    steepness: float
    strictness: float
    haste: float = 1.0
    care: float = 1.0

    def speed(self, latency_ms: float) -> float:
        """1 at once, 0.5 at `patience_ms`, towards 0 beyond."""
        return 0.0 if math.isinf(latency_ms) else 1 / (1 + (latency_ms / self.patience_ms) ** self.steepness)

    def trust(self, wrong_share: float) -> float:
        """1 without a mistake, 0 from a share of 1 / strictness on."""
        return max(0.0, 1 - self.strictness * wrong_share)

    def rate(self, experiences: Sequence[Experience]) -> float:
        """The rating in [0, 1] of some requests, of which there must be one at least."""
        wrong_share = sum(not one.is_correct for one in experiences) / len(experiences)
        return self.expect([one.latency_ms for one in experiences], wrong_share)

    def expect(self, latencies_ms: Sequence[float], wrong_share: float) -> float:
        """The rating of requests with these latencies when the share of wrong answers is known otherwise."""
        speed = sum(map(self.speed, latencies_ms)) / len(latencies_ms)
        return float(speed**self.haste * self.trust(wrong_share) ** self.care)


PERSONAS = {
    persona.name: persona
    for persona in (
        Persona("impatient", patience_ms=15, steepness=3.0, strictness=1.0),
        Persona("careful", patience_ms=120, steepness=2.0, strictness=4.0),
        Persona("easygoing", patience_ms=80, steepness=1.5, strictness=2.5),
    )
}
