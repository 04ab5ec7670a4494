"""How far what was learnt may be believed: as far as it foretold the leases that came after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from selector.validation import number

KEPT = 0.999
# The prior fades; without anything foretold the share would become 0/0 in the end.
LEAST_SQUARE = 1e-300


@dataclass(slots=True)
class Trust:
    """How much of a learnt residual is real: the slope of what came on what was foretold, over recent leases.

    Each lease is foretold before it is learnt (progressive validation: Blum, Kalai & Langford, COLT 1999). ``product``
    and ``square`` are forgetting sums, alike in the beginning: the larger, the longer the benefit of the doubt. Only
    what tells actions apart counts, not the level of a device.
    """

    product: float = 0.1
    square: float = 0.1

    @property
    def share(self) -> float:
        """In [0, 1]: 0 ignores the residual."""
        return min(max(self.product / self.square, 0.0), 1.0)

    def learn(self, foretold: float, came: float) -> None:
        """One lease: the residual that was foretold for its action, and the one that came, both in QoE."""
        self.product = KEPT * self.product + foretold * came
        self.square = max(KEPT * self.square + foretold**2, LEAST_SQUARE)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Raises InvalidInput, KeyError or TypeError for what no learning leads to."""
        product = number("trust.product", record["product"], -1e9, 1e9)
        return cls(product, number("trust.square", record["square"], LEAST_SQUARE, 1e9))
