"""All candidates of one decision as columns. A single one becomes a value when somebody looks at it: most never are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from selector.actions import ActionTable
from selector.interactions import Candidate, Prediction

if TYPE_CHECKING:
    from selector.latency import Predicted

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Reasons = Mapping[int, tuple[str, ...]]


# Rows of the numbers; the source stands among the fields of a prediction where the bonus stands here.
_QOE, _BONUS = 5, 12
_SOURCE = _BONUS


class Candidates(Sequence[Candidate]):
    """Read-only sequence of ``Candidate``, in the order of the table's actions.

    ``hard`` and ``soft`` map indices to reasons; what is in neither may be chosen freely. Equal to any sequence of
    equal candidates.
    """

    __slots__ = ("_hard", "_numbers", "_probability", "_shortlist", "_soft", "_source", "_table")

    def __init__(
        self,
        table: ActionTable,
        predicted: Predicted,
        qoe: Floats,
        bonus: Floats,
        *,
        hard: Reasons,
        soft: Reasons,
    ) -> None:
        self._table = table
        self._source = predicted.source
        self._hard, self._soft = hard, soft
        self._shortlist: frozenset[int] = frozenset()
        self._probability: Floats = np.zeros(len(table.actions))
        # Rounded to what is worth logging, so that the log and the policy see the same numbers.
        self._numbers = np.array(
            (
                predicted.p50_ms,
                predicted.p95_ms,
                predicted.log_sd,
                predicted.cpu_ms_per_request,
                predicted.slo_violation_probability,
                qoe,
                predicted.service_ms,
                predicted.batch,
                predicted.slo_hit_share,
                predicted.raw_a_ms,
                predicted.raw_b_ms,
                predicted.raw_cpu_ms,
                bonus,
                predicted.held_back,
            )
        ).round(6)

    def sampled_with(self, probability: Floats, shortlist: frozenset[int]) -> Candidates:
        """The same candidates with their marginal probabilities, shape (actions,), and who was shortlisted."""
        made = object.__new__(Candidates)
        made._table, made._source, made._numbers = self._table, self._source, self._numbers
        made._hard, made._soft = self._hard, self._soft
        made._probability, made._shortlist = probability, shortlist
        return made

    def named(self, key: str) -> Candidate | None:
        """The candidate with this action key."""
        place = self._table.position.get(key)
        return None if place is None else self[place]

    @property
    def qoe(self) -> Floats:
        """Predicted QoE, shape (actions,)."""
        return np.asarray(self._numbers[_QOE])

    @property
    def value(self) -> Floats:
        """Predicted QoE with the bonus, shape (actions,): what choosing goes by."""
        return np.asarray(self._numbers[_QOE] + self._numbers[_BONUS])

    def __len__(self) -> int:
        return len(self._table.actions)

    @overload
    def __getitem__(self, index: int) -> Candidate: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Candidate, ...]: ...

    def __getitem__(self, index: int | slice) -> Candidate | tuple[Candidate, ...]:
        if isinstance(index, slice):
            return tuple(self.at(range(len(self))[index]))
        return self.at((range(len(self))[index],))[0]

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self.at(range(len(self))))

    def at(self, places: Sequence[int]) -> list[Candidate]:
        """The candidates in these places; cheaper than one by one."""
        table, source, wanted = self._table.actions, self._source, list(places)
        numbers: list[list[Any]] = self._numbers[:, wanted].T.tolist()
        probabilities: list[float] = self._probability[wanted].tolist()
        made = []
        for place, parts, probability in zip(wanted, numbers, probabilities, strict=True):
            parts.insert(_SOURCE, source[place])
            made.append(
                Candidate(
                    table[place],
                    Prediction(*parts),
                    self._hard.get(place, ()),
                    self._soft.get(place, ()),
                    place in self._shortlist,
                    probability,
                )
            )
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]  # as every sequence that is compared by its values

    def __repr__(self) -> str:
        return f"Candidates({len(self)})"
