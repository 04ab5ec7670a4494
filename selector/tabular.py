"""Classic bandits without features: a table of means per group, shared with nobody. References to beat.

The UCB1 index is Auer, Cesa-Bianchi & Fischer, "Finite-time analysis of the multiarmed bandit problem" (2002),
with the width as a setting; Thompson sampling with Gaussian posteriors is Agrawal & Goyal, "Further optimal
regret bounds for Thompson sampling" (2013).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from selector.errors import InvalidInput
from selector.interactions import Candidate, Context, Interaction
from selector.stored import LEAST_SHARE, Stored, mostly, uniform
from selector.validation import check_candidates, check_context, check_interaction, number

Floats = NDArray[np.float64]
GROUPINGS = ("device", "device_class", "application")
DRAWS = 128


class _TablePolicy(Stored):
    """Count and mean reward by action key in each group: whoever agrees in the fields named by ``by`` shares one."""

    def __init__(self, by: Sequence[str]) -> None:
        if isinstance(by, str) or not by or any(field not in GROUPINGS for field in by):
            raise InvalidInput("by", f"must name one or more of {', '.join(GROUPINGS)}")
        self._by = tuple(by)
        self._tables: dict[str, dict[str, tuple[int, float]]] = {}

    def state(self) -> dict[str, Any]:
        """The tables."""
        return {"by": list(self._by), "tables": {group: dict(table) for group, table in self._tables.items()}}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """Checks every entry."""
        tables = state.pop("tables")
        policy = cls(**state)
        for group, table in tables.items():
            policy._tables[group] = {
                key: (int(number("count", count, 1, 1e15)), number("mean", mean, 0, 1))
                for key, (count, mean) in table.items()
            }
        return policy

    def learn(self, interaction: Interaction) -> None:
        """Moves the mean of the chosen action in its group."""
        check_interaction(interaction)
        table = self._tables.setdefault(self._group(interaction.context), {})
        key = interaction.candidates[interaction.chosen].action.key
        count, mean = table.get(key, (0, 0.0))
        table[key] = (count + 1, mean + (interaction.reward - mean) / (count + 1))

    def _columns(self, context: Context, candidates: Sequence[Candidate]) -> tuple[Floats, Floats]:
        """Counts and means, each of shape (candidates,); 0 where an action was never tried."""
        check_context(context)
        check_candidates(candidates)
        table = self._tables.get(self._group(context), {})
        rows = np.array([table.get(candidate.action.key, (0, 0.0)) for candidate in candidates], dtype=np.float64)
        return rows[:, 0], rows[:, 1]

    def _group(self, context: Context) -> str:
        return "\n".join(getattr(context, field) for field in self._by)


class Ucb1Policy(_TablePolicy):
    """Tries every action of a group once, then takes the highest mean + ``width * sqrt(2 ln t / n)``."""

    kind = "ucb1"

    def __init__(
        self, width: float = 1.0, epsilon: float = LEAST_SHARE, by: Sequence[str] = ("device", "application")
    ) -> None:
        super().__init__(by)
        self._width = number("width", width, 0, 100)
        self._epsilon = number("epsilon", epsilon, LEAST_SHARE, 1)

    def state(self) -> dict[str, Any]:
        """Settings and tables."""
        return {**super().state(), "width": self._width, "epsilon": self._epsilon}

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> Floats:
        """Nearly all on the highest index, spread over the untried while there are any."""
        counts, means = self._columns(context, candidates)
        untried = counts == 0
        if untried.any():
            shares: Floats = self._epsilon * uniform(len(counts)) + (1.0 - self._epsilon) * untried / untried.sum()
            return shares
        index = means + self._width * np.sqrt(2.0 * np.log(counts.sum()) / counts)
        return mostly(int(np.argmax(index)), len(counts), self._epsilon)


class ThompsonPolicy(_TablePolicy):
    """Normal posterior per action: mean of ``prior`` and the rewards, variance ``noise_sd² / (n + 1)``.

    Probabilities are shares of a fixed set of posterior draws, so that asking twice gives the same answer.
    """

    kind = "thompson"

    def __init__(
        self,
        noise_sd: float = 0.2,
        prior: float = 0.5,
        epsilon: float = LEAST_SHARE,
        by: Sequence[str] = ("device", "application"),
    ) -> None:
        super().__init__(by)
        self._noise_sd = number("noise_sd", noise_sd, 1e-4, 10)
        self._prior = number("prior", prior, 0, 1)
        self._epsilon = number("epsilon", epsilon, LEAST_SHARE, 1)

    def state(self) -> dict[str, Any]:
        """Settings and tables."""
        settings = {"noise_sd": self._noise_sd, "prior": self._prior, "epsilon": self._epsilon}
        return {**super().state(), **settings}

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> Floats:
        """How often each candidate is the best of a posterior draw, mixed with ``epsilon`` uniform."""
        counts, means = self._columns(context, candidates)
        centre = (self._prior + counts * means) / (counts + 1.0)
        draws = centre + self._noise_sd / np.sqrt(counts + 1.0) * normals(DRAWS, len(counts))
        return shares_of_best(draws, self._epsilon)


@lru_cache(maxsize=256)
def normals(draws: int, width: int) -> Floats:
    """Standard normal numbers of shape (draws, width); always the same, not to be written to."""
    numbers = np.random.default_rng(7).standard_normal((draws, width))
    numbers.flags.writeable = False
    return numbers


def shares_of_best(scores: Floats, epsilon: float) -> Floats:
    """Share of rows of ``scores`` (draws, candidates) in which each candidate is the best, mixed with uniform.

    >>> shares_of_best(np.array([[1.0, 0.0], [1.0, 2.0]]), 0.2).tolist()
    [0.5, 0.5]
    """
    draws, count = scores.shape
    wins = np.bincount(np.argmax(scores, axis=1), minlength=count)
    shares: Floats = epsilon * uniform(count) + (1.0 - epsilon) * wins / draws
    return shares
