"""Context and candidates as rows of numbers, for learners that want a dense vector of a fixed length.

One row per candidate: the action crossed with the load, with the device class and with telemetry, one column per
variant, whether it runs or is on the device already, and, if wanted, what came of earlier leases (``residuals.py``;
and whether the action is the baseline) and what was predicted. Names become columns in the order in which they were
learnt; a name beyond the columns there are, or never learnt, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from selector.interactions import Action, Candidate, Context
from selector.residuals import COLUMNS, Residuals
from selector.validation import LONGEST_NAME, name

Floats = NDArray[np.float64]

CLASSES, VARIANTS, PRECISIONS, TELEMETRY = 8, 16, 3, 12
_ACTION = 7 + PRECISIONS
_LOAD = 4
_BY_TELEMETRY = 2
_BY_CLASS = 3 + PRECISIONS
_PREDICTED = 5
_HISTORY = COLUMNS + 1
_MOST_KEPT, _MOST_ACTIONS = 256, 4096
# Where the sum of the column counts puts the prediction: always last.
QOE_FROM_END = _PREDICTED


class Features:
    """Turns (context, candidates) into an array of shape (candidates, width). Learns names and, ``with_history``,
    what came of each device's, its variants', its actions' and its group's leases."""

    def __init__(self, with_prediction: bool, with_history: bool = False) -> None:
        self._with_prediction = with_prediction
        self._residuals = Residuals() if with_history else None
        self._slots = {"class": _Slots(CLASSES), "variant": _Slots(VARIANTS)}
        self._slots |= {"precision": _Slots(PRECISIONS), "telemetry": _Slots(TELEMETRY)}
        self._kept: dict[tuple[int, ...], tuple[tuple[Action, ...], _Actions]] = {}
        self._single: dict[int, tuple[Action, list[float]]] = {}

    @property
    def with_prediction(self) -> bool:
        """Whether the last columns are the prediction, the predicted QoE first among them."""
        return self._with_prediction

    @property
    def with_history(self) -> bool:
        """Whether columns say what came of earlier leases."""
        return self._residuals is not None

    @property
    def width(self) -> int:
        """Number of columns; never changes."""
        fixed = _ACTION * _LOAD + CLASSES * _BY_CLASS + VARIANTS + TELEMETRY * _BY_TELEMETRY + 2
        return fixed + (_HISTORY if self.with_history else 0) + (_PREDICTED if self._with_prediction else 0)

    def state(self) -> dict[str, Any]:
        """The names by kind, in column order, and the residuals."""
        names: dict[str, Any] = {kind: list(slots.names) for kind, slots in self._slots.items()}
        return names | ({} if self._residuals is None else {"residuals": self._residuals.state()})

    @classmethod
    def from_state(cls, with_prediction: bool, state: dict[str, Any]) -> Self:
        """Features with these names and residuals. Raises InvalidInput, ValueError or KeyError."""
        features = cls(with_prediction, "residuals" in state)
        if "residuals" in state:
            features._residuals = Residuals.from_state(state["residuals"])
        for kind in features._slots:
            for each in state[kind]:
                features._slots[kind].take(name(kind, each))
        return features

    def learn(self, context: Context, candidate: Candidate) -> None:
        """Give the names of this decision their columns, while there are any left."""
        self._slots["class"].take(context.device_class)
        for key, _ in _telemetry(context):
            self._slots["telemetry"].take(key)
        variant = candidate.action.variant
        named = self._slots["variant"].take(variant.digest[:12]), self._slots["precision"].take(variant.precision)
        if any(named):
            self._kept.clear()
            self._single.clear()

    def remember(self, context: Context, candidate: Candidate, reward: float) -> None:
        """What came of this lease; after its row was taken, so that no row knows its own reward."""
        if self._residuals is not None:
            expected = candidate.prediction.qoe if self._with_prediction else 0.0
            action = candidate.action
            self._residuals.learn(context.device, _group(context), action.variant.digest, action.key, reward - expected)

    def rows(self, context: Context, candidates: Sequence[Candidate]) -> Floats:
        """Shape (len(candidates), width), every entry within about ±3; a new array."""
        actions = self._actions(tuple(candidate.action for candidate in candidates))
        action, variant = actions.rows[:, :_ACTION], actions.rows[:, _ACTION:]
        count = len(candidates)
        by_class = np.zeros((count, CLASSES * _BY_CLASS))
        slot = self._slots["class"].names.get(context.device_class)
        if slot is not None:
            by_class[:, slot * _BY_CLASS : (slot + 1) * _BY_CLASS] = _for_class(action)
        load = (action[:, :, None] * _load(context)).reshape(count, _ACTION * _LOAD)
        telemetry = (action[:, [1, 5], None] * self._telemetry(context)).reshape(count, _BY_TELEMETRY * TELEMETRY)
        parts = [load, by_class, variant, telemetry, _switch(context, actions)]
        if self._residuals is not None:
            parts.append(self._residuals.columns(context.device, _group(context), actions.digests, actions.keys))
            parts.append(np.array([[key == context.baseline] for key in actions.keys], dtype=np.float64))
        if self._with_prediction:
            parts.append(_predicted(context, candidates))
        return np.concatenate(parts, axis=1)

    def _actions(self, actions: tuple[Action, ...]) -> _Actions:
        """What depends on the actions alone, kept by their identities."""
        identities = tuple(map(id, actions))
        found = self._kept.get(identities)
        if found is not None:
            return found[1]
        made = _Actions(
            np.array([self._kept_action(action) for action in actions], dtype=np.float64),
            [action.key for action in actions],
            [action.variant.digest for action in actions],
        )
        if len(self._kept) >= _MOST_KEPT:
            self._kept.clear()
        # The actions are kept too: an identity is only unique while its object lives.
        self._kept[identities] = actions, made
        return made

    def _kept_action(self, action: Action) -> list[float]:
        found = self._single.get(id(action))
        if found is not None and found[0] is action:
            return found[1]
        if len(self._single) >= _MOST_ACTIONS:
            self._single.clear()
        made = self._action(action)
        self._single[id(action)] = action, made
        return made

    def _action(self, action: Action) -> list[float]:
        bounds, variant = action.configuration, action.variant
        batch, callers = math.log2(bounds.max_batch) / 5, math.log2(bounds.max_concurrency) / 2
        size = (math.log10(max(variant.size_bytes, 1)) - 6.5) / 1.5
        numbers = [1.0, size, batch, callers, math.log2(bounds.threads) / 3, variant.accuracy * 5 - 4, batch * batch]
        precision = self._slots["precision"].one_hot(variant.precision)
        return [*numbers, *precision, *self._slots["variant"].one_hot(variant.digest[:12])]

    def _telemetry(self, context: Context) -> Floats:
        values = np.zeros(TELEMETRY)
        for key, value in _telemetry(context):
            slot = self._slots["telemetry"].names.get(key)
            if slot is not None:
                values[slot] = value
        return values


@dataclass(frozen=True, slots=True)
class _Actions:
    """Of each action: its numbers, shape (actions, _ACTION + VARIANTS), key and variant."""

    rows: Floats
    keys: list[str]
    digests: list[str]


class _Slots:
    """Columns given to names in the order of their arrival, as long as there are any."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.names: dict[str, int] = {}

    def take(self, name: str) -> bool:
        """Whether the name got a column just now."""
        is_new = name not in self.names and len(self.names) < self._size
        if is_new:
            self.names[name] = len(self.names)
        return is_new

    def one_hot(self, name: str) -> list[float]:
        row = [0.0] * self._size
        if name in self.names:
            row[self.names[name]] = 1.0
        return row


def _load(context: Context) -> Floats:
    rate = math.log10(max(context.arrival_rate_rps, 1e-3)) - 1
    slo = math.log10(context.slo_p95_ms) - 2
    return np.array([1.0, rate, slo, context.cpu_load_share]).clip(-3.0, 3.0)


def _telemetry(context: Context) -> list[tuple[str, float]]:
    """Names and values of the context's features; a text is a name of its own with the value 1."""
    found = []
    for key in sorted(context.features):
        value = context.features[key]
        if isinstance(value, str):
            found.append((f"{key}={value}"[:LONGEST_NAME], 1.0))
        else:
            found.append((key, math.copysign(min(math.log1p(abs(value)), 3.0), value)))
    return found


def _group(context: Context) -> str:
    """The group of users that the device reports; those who report none are one."""
    found = context.features.get("group", "")
    return found if isinstance(found, str) else ""


def _for_class(action: Floats) -> Floats:
    """The columns of an action that a class of devices may treat in its own way: 1, size, batch, precision."""
    return np.concatenate((action[:, :3], action[:, 7 : 7 + PRECISIONS]), axis=1)


def _switch(context: Context, actions: _Actions) -> Floats:
    """Whether the action runs already, and whether its variant is on the device, shape (actions, 2)."""
    switch = np.zeros((len(actions.keys), 2))
    if context.incumbent is not None:
        switch[:, 0] = [key == context.incumbent for key in actions.keys]
    if context.cached_digests:
        switch[:, 1] = [digest in context.cached_digests for digest in actions.digests]
    return switch


def _predicted(context: Context, candidates: Sequence[Candidate]) -> Floats:
    columns = np.array(
        [
            (
                each.prediction.qoe,
                each.prediction.slo_hit_share,
                each.prediction.slo_violation_probability,
                each.prediction.p95_ms,
                each.prediction.cpu_ms_per_request,
            )
            for each in candidates
        ],
        dtype=np.float64,
    )
    columns[:, 0] = np.clip(columns[:, 0], 0.0, 1.0)
    columns[:, 3] = np.clip(np.log(np.maximum(columns[:, 3], 1e-3) / context.slo_p95_ms), -3.0, 3.0) / 3.0
    columns[:, 4] = 50.0 / (50.0 + columns[:, 4])
    return columns
