"""What came more or less than expected, as running means: of each device, its variants and actions, and each group.

The cheap way to tell a learner with a fixed number of columns which device it decides for. Means are shrunk towards
zero and taken level by level: what a device does as a whole says nothing about one of its variants.

>>> from selector.residuals import Residuals
>>> Residuals().columns("device-1", "staff", ["3f2a"], ["3f2a/b1c1t1"]).tolist()
[[0.0, 0.0, 0.0, 0.0]]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from selector.validation import name, number

Floats = NDArray[np.float64]

COLUMNS = 4
LARGEST = 2.0
# A mean counts as if so many leases had come as expected before.
SHRINKAGE = 2.0
# Later leases weigh at least so much, so that drift is followed.
LEAST_GAIN = 0.05
_KINDS = ("fleet", "device", "variant", "group", "action")
_Table = dict[str, tuple[int, float]]


class Residuals:
    """Counts and means by kind, owner and what of the owner's: ``variant`` and ``action`` are a device's own."""

    def __init__(self) -> None:
        self._tables: dict[str, dict[str, _Table]] = {kind: {} for kind in _KINDS}

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            kind: {owner: {what: list(pair) for what, pair in table.items()} for owner, table in owners.items()}
            for kind, owners in self._tables.items()
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """Raises InvalidInput, ValueError or KeyError for what ``state`` does not write."""
        made = cls()
        for kind, owners in state.items():
            for owner, table in owners.items():
                made._tables[kind][owner] = {
                    what: (int(number("count", count, 1, 1e15)), number("mean", mean, -LARGEST, LARGEST))
                    for what, (count, mean) in table.items()
                }
        return made

    def columns(self, device: str, group: str, digests: Sequence[str], keys: Sequence[str]) -> Floats:
        """Shape (actions, COLUMNS), in QoE: of the device, of its variant, of the group's variant, of its action."""
        own, shared, single = self._all("variant", device), self._all("group", group), self._all("action", device)
        made = np.empty((len(keys), COLUMNS))
        made[:, 0] = self._of("device", device)
        made[:, 1] = [own.get(digest, 0.0) for digest in digests]
        made[:, 2] = [shared.get(digest, 0.0) for digest in digests]
        made[:, 3] = [single.get(key, 0.0) for key in keys]
        return made

    def learn(self, device: str, group: str, digest: str, key: str, residual: float) -> None:
        """One lease, in QoE: each level takes what those above it leave."""
        left = min(max(residual, -1.0), 1.0) - self._learn("fleet", "", "", min(max(residual, -1.0), 1.0))
        left -= self._learn("device", device, "", left)
        self._learn("group", group, digest, left)
        left -= self._learn("variant", device, digest, left)
        self._learn("action", device, key, left)

    def _learn(self, kind: str, owner: str, what: str, came: float) -> float:
        """The shrunk mean before this."""
        table = self._tables[kind].setdefault(name(kind, owner) if owner else owner, {})
        count, mean = table.get(what, (0, 0.0))
        table[what] = count + 1, mean + (came - mean) * max(1.0 / (count + 1), LEAST_GAIN)
        return _shrunk(count, mean)

    def _of(self, kind: str, owner: str) -> float:
        return _shrunk(*self._tables[kind].get(owner, {}).get("", (0, 0.0)))

    def _all(self, kind: str, owner: str) -> dict[str, float]:
        return {what: _shrunk(*pair) for what, pair in self._tables[kind].get(owner, {}).items()}


def _shrunk(count: int, mean: float) -> float:
    return mean * count / (count + SHRINKAGE)
