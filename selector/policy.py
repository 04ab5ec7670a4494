"""What a policy is, and the one sampler. A policy gives probabilities; it never draws, so the logged
propensity is right."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from selector.errors import InvalidInput, PolicyFailure
from selector.interactions import Candidate, Context, Interaction

SUM_TOLERANCE = 1e-3


@runtime_checkable
class Policy(Protocol):
    """Maps (context, candidates) to probabilities and learns from closed decisions.

    ``probabilities`` returns float64 of shape (len(candidates),), strictly positive, summing to 1. ``learn``
    raises InvalidInput, unchanged, for what must not be learnt. ``from_bytes`` raises CorruptPolicy.
    """

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        """The distribution over these candidates."""
        ...

    def learn(self, interaction: Interaction) -> None:
        """Take one closed decision into account."""
        ...

    def to_bytes(self) -> bytes:
        """The whole state; the same log gives the same bytes."""
        ...

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The policy that ``to_bytes`` wrote."""
        ...


def seed_of(decision_id: str) -> int:
    """Seed of one decision: 63 bits of SHA-256, so that it fits a signed database integer.

    >>> seed_of("d-1") == seed_of("d-1") != seed_of("d-2")
    True
    """
    return int.from_bytes(hashlib.sha256(decision_id.encode()).digest()[:8], "big") >> 1


def uniform_of(seed: int, purpose: str = "action") -> float:
    """A number in [0, 1) with 53 random bits; independent for each purpose, the same on every platform."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 9007199254740992.0


def sample(probabilities: NDArray[np.float64] | Sequence[float], seed: int, purpose: str = "action") -> int:
    """Draw one index with these probabilities: the only place in the product that draws an action.

    An index whose probability is 0 is never drawn.

    >>> sample([0.0, 1.0, 0.0], seed_of("d-1"))
    1
    """
    weights = np.asarray(probabilities, dtype=np.float64)
    if weights.ndim != 1 or weights.size == 0 or not weights.min() >= 0:  # NaN is not at least 0 either
        raise InvalidInput("probabilities", "must be a non-empty vector of finite numbers, none negative")
    ladder = weights.cumsum()
    if not 1 - SUM_TOLERANCE <= ladder[-1] <= 1 + SUM_TOLERANCE:
        raise InvalidInput("probabilities", f"must sum to 1, sum to {ladder[-1]:g}")
    return int(ladder.searchsorted(uniform_of(seed, purpose) * ladder[-1], side="right"))


def checked(probabilities: NDArray[np.float64] | Sequence[float], count: int) -> NDArray[np.float64]:
    """The distribution, renormalised, if it is one over ``count`` candidates and leaves none out; else
    PolicyFailure."""
    weights = np.asarray(probabilities, dtype=np.float64)
    if weights.shape != (count,):
        raise PolicyFailure(f"{weights.size} probabilities for {count} candidates")
    if not np.isfinite(weights).all():
        raise PolicyFailure("probabilities are not finite")
    total = float(weights.sum())
    if abs(total - 1) > SUM_TOLERANCE:
        raise PolicyFailure(f"probabilities sum to {total:g}")
    if weights.min() <= 0:
        raise PolicyFailure("a candidate has no probability")
    return weights / total
