"""Online calibration: log multipliers on predicted service time, p95 tail and CPU time, learnt from every
lease.

Each lease's log ratio measured/predicted is a sum of effects (``effects.py``): one of each kind for the device, for its
class and for the fleet, and one of each condition, learnt jointly (``hierarchy.py``), which gives shrinkage from device
to class to fleet; process noise forgets; what surprises is as noisy as makes it no outlier (Hampel, 1974). Surprises in
a row on the same side reopen the device's uncertainty: its speed has changed. What is known of a device is known beside
its class, so one that comes back as another class starts anew.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from selector.budget import Standing, baseline_candidate, standing_of
from selector.effects import (
    CONDITIONS,
    CPU,
    OVERALL,
    QUANTITIES,
    SCOPES,
    SERVICE,
    TAIL,
    EffectTable,
    conditions_of,
    kind_of,
    names_of,
)
from selector.errors import InvalidInput
from selector.hierarchy import LARGEST_SUM, Level, learn, shares, sums
from selector.interactions import Candidate, Context, Interaction
from selector.queueing import sojourn
from selector.validation import check_interaction, check_prediction, name, number, whole

Floats = NDArray[np.float64]
Row = dict[str, Any]

# Noise of one lease's log ratio: what no effect explains, and what shrinks with the number of requests.
LEASE_SD = {SERVICE: 0.08, TAIL: 0.20, CPU: 0.08}
REQUEST_SD = {SERVICE: 0.30, TAIL: 1.50, CPU: 0.30}
PERCENTILE_SD = 0.20
OUTLIER_Z = 2.5
SURPRISE_Z = 1.7
TAIL_UTILISATION_LIMIT = 0.95
LARGEST_LOG_RATIO = 5.0
# A shorter time was not measured, whatever was sent: its ratio may be 0, which has no logarithm.
LEAST_MEASURED_MS = 1e-6

_NOTHING: Mapping[str, Any] = {}
_UNHEARD = tuple(Level(depth) for depth in range(len(SCOPES)))


@dataclass(frozen=True, slots=True)
class Correction:
    """Log multipliers, shape (quantities, actions) in the order of ``QUANTITIES``."""

    mean: Floats
    variance: Floats


def scopes_of(context: Context) -> tuple[str, str, str]:
    """Keys of the rows that a context reads and writes.

    >>> scopes_of(Context("pi-7", "pi4", "digits", 1.0, 50.0))
    ('fleet', 'class:pi4', 'device:pi-7')
    """
    return "fleet", f"class:{context.device_class}", f"device:{context.device}"


class Calibration:
    """Effects of all scopes that were loaded. Rows are JSON-able and carry the whole state, each with a
    revision.

    >>> Calibration().revisions(Context("pi-7", "pi4", "digits", 1.0, 50.0))
    {'fleet': 0, 'class:pi4': 0, 'device:pi-7': 0}
    """

    def __init__(self) -> None:
        self._rows: dict[str, Row] = {}

    @classmethod
    def from_rows(cls, rows: Mapping[str, Mapping[str, Any]]) -> Calibration:
        """The calibration that ``rows`` wrote; raises InvalidInput naming what is not a row."""
        if not isinstance(rows, Mapping):
            raise InvalidInput("rows", "must map scopes to rows")
        calibration = cls()
        for scope, row in rows.items():
            calibration._rows[scope] = _checked_row(scope, row)
        return calibration

    def rows(self, scopes: Iterable[str] | None = None) -> dict[str, Row]:
        """Copies of these rows (all by default) to be stored as JSON; a scope never learnt has revision 0."""
        wanted = list(self._rows) if scopes is None else scopes
        return {scope: _copied(self._rows.get(scope, {"revision": 0})) for scope in wanted}

    def revisions(self, context: Context) -> dict[str, int]:
        """Which state a prediction for this context uses."""
        return {scope: int(self._rows.get(scope, {}).get("revision", 0)) for scope in scopes_of(context)}

    def correction(self, context: Context, effects: EffectTable) -> Correction:
        """What is known about all actions of a table under these conditions."""
        return Correction(*sums(self._known_levels(context), effects, conditions_of(context)))

    def update(self, interaction: Interaction) -> set[str]:
        """Learn from one closed lease; returns the scopes that changed.

        Uses only what the interaction records: raw predictions, context, measurement, and the reward for the standing
        against the baseline. Without anything to compare (no requests, no measured time, an old record without raw
        predictions, no baseline) nothing is learnt. Raises InvalidInput.
        """
        check_interaction(interaction)
        baseline = baseline_candidate(interaction.candidates, interaction.context.baseline)
        if baseline is not None:
            check_prediction(baseline, "candidates[baseline]")
        scopes = scopes_of(interaction.context)
        has_effects = self._learn_effects(interaction)
        changed = set(scopes) if has_effects else set()
        if baseline is not None:
            changed |= {scopes[0], scopes[-1]}
        for scope in changed:
            self._rows.setdefault(scope, {"revision": 0})["revision"] += 1
        if baseline is not None:
            self._learn_standings(interaction, baseline)
        return changed

    def _learn_standings(self, interaction: Interaction, baseline: Candidate) -> None:
        """The device's and the fleet's. Rows say how many devices stand in them, so that the fleet's remembers as much
        of each as the device's own."""
        scopes = scopes_of(interaction.context)
        fleet, device = self._rows[scopes[0]], self._rows[scopes[-1]]
        if not device.get("devices"):
            device["devices"] = 1
            fleet["devices"] = fleet.get("devices", 0) + 1
        for row in (fleet, device):
            devices = max(row.get("devices", 1), 1)
            row["standing"] = standing_of(row).learnt(interaction, baseline, devices).as_row()

    def _learn_effects(self, interaction: Interaction) -> bool:
        prediction = interaction.candidates[interaction.chosen].prediction
        if (
            interaction.measurement.requests <= 0
            or not prediction.source
            or not _is_measured(prediction.raw_a_ms + prediction.raw_b_ms)
        ):
            return False
        learnt = self._learn_service(interaction), self._learn_tail(interaction), self._learn_cpu(interaction)
        return any(learnt)

    def standings(self, context: Context) -> tuple[Standing, Standing]:
        """How the fleet and the device stand against their baseline."""
        fleet, _, device = scopes_of(context)
        return standing_of(self._rows.get(fleet, _NOTHING)), standing_of(self._rows.get(device, _NOTHING))

    def _learn_service(self, interaction: Interaction) -> bool:
        measurement = interaction.measurement
        prediction = interaction.candidates[interaction.chosen].prediction
        if _is_measured(measurement.service_ms):
            batch = max(measurement.batch_mean or prediction.batch, 1.0)
            ratio = math.log(measurement.service_ms / (prediction.raw_a_ms * batch + prediction.raw_b_ms))
            noise = LEASE_SD[SERVICE] ** 2 + REQUEST_SD[SERVICE] ** 2 * batch / measurement.requests
        elif _is_measured(measurement.p50_ms):
            known = self._known(SERVICE, interaction)
            p50_ms = [_expected(interaction, known + step)[0] for step in (-0.1, 0.0, 0.1)]
            slope = max((math.log(p50_ms[2]) - math.log(p50_ms[0])) / 0.2, 1.0)
            ratio = known + (math.log(measurement.p50_ms) - math.log(p50_ms[1])) / slope
            noise = PERCENTILE_SD**2 + REQUEST_SD[SERVICE] ** 2 / measurement.requests
        else:
            return False
        return self._step(SERVICE, interaction, ratio, noise)

    def _learn_tail(self, interaction: Interaction) -> bool:
        measured = interaction.measurement.p95_ms
        if not _is_measured(measured):
            return False
        _, p95_ms, utilisation = _expected(interaction, self._known(SERVICE, interaction))
        if utilisation > TAIL_UTILISATION_LIMIT:
            return False
        noise = LEASE_SD[TAIL] ** 2 + REQUEST_SD[TAIL] ** 2 / interaction.measurement.requests
        return self._step(TAIL, interaction, math.log(measured / p95_ms), noise)

    def _learn_cpu(self, interaction: Interaction) -> bool:
        measured = interaction.measurement.cpu_ms_per_request
        raw = interaction.candidates[interaction.chosen].prediction.raw_cpu_ms
        if not _is_measured(measured) or raw <= 0:
            return False
        noise = LEASE_SD[CPU] ** 2 + REQUEST_SD[CPU] ** 2 / interaction.measurement.requests
        return self._step(CPU, interaction, math.log(measured / raw), noise)

    def _known(self, quantity: str, interaction: Interaction) -> float:
        """Log multiplier of the chosen action as it is known now."""
        found = shares(self._known_levels(interaction.context), QUANTITIES.index(quantity), _weights(interaction))
        known = sum(share.mean for share in found)
        return min(max(known, -LARGEST_SUM), LARGEST_SUM)

    def _step(self, quantity: str, interaction: Interaction, log_ratio: float, noise: float) -> bool:
        """Learn one log ratio of the chosen action."""
        place, weights = QUANTITIES.index(quantity), _weights(interaction)
        levels = self._levels(interaction, weights)
        for level in levels:
            level.wander(place, weights)
        found = shares(levels, place, weights)
        log_ratio = min(max(log_ratio, -LARGEST_LOG_RATIO), LARGEST_LOG_RATIO)
        innovation = log_ratio - sum(share.mean for share in found)
        known = sum(share.variance for share in found)
        device = self._rows[scopes_of(interaction.context)[-1]]
        if _is_changed(device, quantity, innovation / math.sqrt(known + noise)):
            overall = next(name for name in weights if kind_of(name) == OVERALL)
            levels[-1].widen(place, overall, innovation**2)
            found = shares(levels, place, weights)
            known = sum(share.variance for share in found)
        learn(place, found, log_ratio, max(noise, (innovation / OUTLIER_Z) ** 2 - known))
        return True

    def _known_levels(self, context: Context) -> list[Level]:
        """From the fleet down; not to be written to."""
        rows = [self._rows.get(scope, _NOTHING) for scope in scopes_of(context)]
        if _is_of_another_class(rows[-1], context):
            rows[-1] = _NOTHING
        return [row.get("effects") or _UNHEARD[depth] for depth, row in enumerate(rows)]

    def _levels(self, interaction: Interaction, weights: Collection[str]) -> list[Level]:
        """From the fleet down, to be written to; all have heard of these effects."""
        context = interaction.context
        rows = [self._rows.setdefault(scope, {"revision": 0}) for scope in scopes_of(context)]
        if _is_of_another_class(rows[-1], context):
            rows[-1].pop("effects", None)
            rows[-1].pop("surprise", None)
        rows[-1]["class"] = sys.intern(context.device_class)
        levels = [row.setdefault("effects", Level(depth)) for depth, row in enumerate(rows)]
        for depth, level in enumerate(levels):
            level.hear_of(weights, rows[depth]["revision"], levels[:depth])
        return levels


def _is_measured(time_ms: float | None) -> TypeGuard[float]:
    return time_ms is not None and time_ms >= LEAST_MEASURED_MS


def _weights(interaction: Interaction) -> dict[str, float]:
    """The effects of the chosen action by name, and how much each counts."""
    candidate = interaction.candidates[interaction.chosen]
    weights = dict.fromkeys(names_of(candidate.prediction.source, candidate.action), 1.0)
    return weights | dict(zip(CONDITIONS, conditions_of(interaction.context), strict=True))


def _expected(interaction: Interaction, log_multiplier: float) -> tuple[float, float, float]:
    """What queueing expects of the chosen action at this service speed: p50 ms, p95 ms, utilisation."""
    candidate = interaction.candidates[interaction.chosen]
    factor = math.exp(log_multiplier)
    bounds = candidate.action.configuration
    queue = sojourn(
        candidate.prediction.raw_a_ms * factor,
        candidate.prediction.raw_b_ms * factor,
        bounds.max_batch,
        bounds.max_concurrency,
        interaction.context.arrival_rate_rps,
        held_back=candidate.prediction.held_back,
    )
    return float(queue.p50_ms), float(queue.p95_ms), float(queue.utilisation)


def _is_of_another_class(device: Mapping[str, Any], context: Context) -> bool:
    return bool(device.get("class", context.device_class) != context.device_class)


def _is_changed(row: Row, quantity: str, z: float) -> bool:
    """Whether the device has surprised in a row on the same side; the memory of surprises stays in its row."""
    memory = row.setdefault("surprise", {})
    clipped = min(max(z, -2.5), 2.5)
    memory[quantity] = 0.5 * memory.get(quantity, 0.0) + 0.5 * clipped
    if abs(memory[quantity]) <= SURPRISE_Z:
        return False
    memory[quantity] = 0.0
    return True


def _copied(row: Row) -> Row:
    return {key: value.as_row() if isinstance(value, Level) else deepcopy(value) for key, value in row.items()}


def _checked_row(scope: str, row: Mapping[str, Any]) -> Row:
    kind = scope.partition(":")[0] if isinstance(scope, str) else ""
    if kind not in SCOPES or (scope == kind) != (kind == SCOPES[0]):
        raise InvalidInput("scope", f"must be fleet, class:<name> or device:<id>, is {str(scope)[:80]!r}")
    if not isinstance(row, Mapping):
        raise InvalidInput(scope, "must be a mapping")
    checked: Row = {"revision": int(number(f"{scope}.revision", row.get("revision", 0), 0, 2**53))}
    if "effects" in row:
        checked["effects"] = Level.from_row(f"{scope}.effects", SCOPES.index(kind), row["effects"])
    if "class" in row:
        checked["class"] = sys.intern(name(f"{scope}.class", row["class"]))
    if "devices" in row:
        checked["devices"] = whole(f"{scope}.devices", row["devices"], 0, 2**53)
    if "standing" in row:
        checked["standing"] = Standing.from_row(f"{scope}.standing", row["standing"]).as_row()
    if "surprise" in row:
        if not isinstance(row["surprise"], Mapping):
            raise InvalidInput(f"{scope}.surprise", "must be a mapping")
        checked["surprise"] = {
            str(name): number(f"{scope}.surprise", value, -3, 3) for name, value in row["surprise"].items()
        }
    return checked
