"""The exploration budget: an operator's "mean QoE not below the baseline's by more than x", per device and fleet.

A conservative bandit in the sense of Wu, Shariff, Lattimore & Szepesvári, *Conservative Bandits* (ICML 2016): what was
earned above the allowance is credit; an action may be tried if even its cautious estimate leaves the credit positive.
What was earned is learnt with the calibration, in the same rows and order. No probabilities here: ``ranking.py`` lowers
those of what the budget does not cover.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selector.candidates import Candidates
from selector.errors import InvalidInput
from selector.interactions import Candidate, Interaction
from selector.validation import number

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

# Credit older than about so many decisions of a device is forgotten, so that a good year does not pay for a bad month.
WINDOW = 100.0
# The allowance of a device's first decisions is there from the start: an early loss has to be earned back by then.
GRANTED_DECISIONS = 5.0
# The fleet's own standing counts from so many decisions on.
FLEET_DECISIONS = 10.0
# What a mean residual is shrunk by, in decisions, and by how much a cautious estimate lies below the mean.
SHRINKAGE = 4.0
CAUTION = 0.03


@dataclass(frozen=True, slots=True)
class Standing:
    """How a scope stands against its baseline over the last ``WINDOW`` decisions of each of its devices or so.

    ``reward`` and ``baseline`` are sums over ``decisions``: what was earned, and what the baseline would have earned.
    ``baseline_residual`` is the mean of reward less prediction where the baseline ran (``baseline_decisions``),
    ``residual`` the same for all other actions (``other_decisions``).
    """

    decisions: float = 0.0
    reward: float = 0.0
    baseline: float = 0.0
    baseline_decisions: float = 0.0
    baseline_residual: float = 0.0
    other_decisions: float = 0.0
    residual: float = 0.0

    @classmethod
    def from_row(cls, field: str, row: object) -> Standing:
        """The standing that ``as_row`` wrote; raises InvalidInput naming the field."""
        if row is None:
            return cls()
        if not isinstance(row, (list, tuple)) or len(row) != len(cls.__slots__):
            raise InvalidInput(field, f"must be {len(cls.__slots__)} numbers")
        standing = cls(*(number(field, value, -1e15, 1e15) for value in row))
        if min(standing.decisions, standing.baseline_decisions, standing.other_decisions) < 0:
            raise InvalidInput(field, "must not count fewer than no decisions")
        return standing

    def as_row(self) -> list[float]:
        """JSON-able; exact."""
        return list(astuple(self))

    def after(self, reward: float, predicted: float, baseline: float, is_baseline: bool, devices: int = 1) -> Standing:
        """The standing of so many devices after one more closed decision; ``baseline`` is what was predicted of the
        baseline then."""
        kept = 1.0 - 1.0 / (WINDOW * devices)
        own, others = self.baseline_decisions * kept, self.other_decisions * kept
        own_residual, other_residual = self.baseline_residual, self.residual
        if is_baseline:
            own += 1.0
            own_residual += (reward - predicted - own_residual) / own
        else:
            others += 1.0
            other_residual += (reward - predicted - other_residual) / others
        expected = reward if is_baseline else baseline + _shrunk(own_residual, own)
        return Standing(
            self.decisions * kept + 1.0,
            self.reward * kept + reward,
            self.baseline * kept + expected,
            own,
            own_residual,
            others,
            other_residual,
        )

    def learnt(self, interaction: Interaction, baseline: Candidate, devices: int = 1) -> Standing:
        """The standing of so many devices after this closed decision of one, whose candidates held this baseline."""
        chosen = interaction.candidates[interaction.chosen]
        is_baseline = chosen.action.key == baseline.action.key
        return self.after(interaction.reward, chosen.prediction.qoe, baseline.prediction.qoe, is_baseline, devices)

    def credit(self, share: float) -> float:
        """QoE earned above ``(1 - share)`` of the baseline's; negative when the budget is overdrawn.

        >>> Standing(decisions=10, reward=7.9, baseline=8.0).credit(0.05) > 0
        True
        """
        return self.reward - (1.0 - share) * self.baseline


def _shrunk(mean: float, count: float) -> float:
    return mean * count / (count + SHRINKAGE)


def uncovered(cautious: Floats, owed: float, baseline: int, share: float, standings: tuple[Standing, Standing]) -> Mask:
    """Which actions the budget does not cover now, shape (actions,); never the baseline.

    ``cautious`` is the QoE of each action if the device is slower than expected, ``owed`` what is expected of the
    baseline (an index); ``share`` is the allowed loss in [0, 1]; ``standings`` are the fleet's and the device's.

    >>> uncovered(np.array([0.8, 0.85, 0.3]), 0.8, 0, 0.05, (Standing(), Standing())).tolist()
    [False, False, True]
    """
    fleet, device = standings
    allowance = (1.0 - share) * (owed + _shrunk(device.baseline_residual, device.baseline_decisions))
    worst = cautious + min(_shrunk(device.residual, device.other_decisions), 0.0) - CAUTION
    grant = share * owed * max(GRANTED_DECISIONS - device.decisions, 0.0)
    credit = device.credit(share) + grant
    if fleet.decisions >= FLEET_DECISIONS:
        credit = min(credit, fleet.credit(share) + share * min(fleet.baseline, WINDOW * owed) / 2)
    mask: Mask = (worst < allowance) & (credit + worst < allowance)
    mask[baseline] = False
    return mask


def baseline_candidate(candidates: Sequence[Candidate], key: str | None) -> Candidate | None:
    """The baseline among the candidates."""
    if key is None:
        return None
    if isinstance(candidates, Candidates):
        return candidates.named(key)
    return next((each for each in candidates if each.action.key == key), None)


def standing_of(row: Mapping[str, Any]) -> Standing:
    """The standing that a row of the calibration holds, which was checked when it was loaded."""
    known = row.get("standing")
    return Standing() if known is None else Standing(*known)
