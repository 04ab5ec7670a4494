"""Online calibration: log multipliers on predicted service time, p95 tail and CPU time, learnt from every
lease.

Each lease's log ratio measured/predicted is a sum of effects (``effects.py``), each with its own mean and variance:
one of each kind for the device, for its class and for the fleet. One scalar Kalman step with a diagonal covariance
shares the innovation out by variance (West & Harrison, *Bayesian Forecasting and Dynamic Models*, ch. 4), which gives
shrinkage from device to class to fleet; process noise forgets; a redescending weight softens outliers (Hampel, 1974).
Two surprises on the same side reopen the device's uncertainty: its speed has changed. A diagonal covariance cannot
lose positive definiteness.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from selector.budget import Standing, baseline_candidate, standing_of
from selector.effects import (
    CPU,
    DRIFT_VARIANCE,
    KINDS,
    OVERALL,
    QUANTITIES,
    SCOPES,
    SERVICE,
    TAIL,
    EffectTable,
    names_of,
    prior_variance,
)
from selector.errors import InvalidInput
from selector.interactions import Candidate, Context, Interaction
from selector.queueing import sojourn
from selector.validation import check_interaction, check_prediction, number, whole

Floats = NDArray[np.float64]
Row = dict[str, Any]

# Noise of one lease's log ratio: what no effect explains, and what shrinks with the number of requests.
LEASE_SD = {SERVICE: 0.12, TAIL: 0.20, CPU: 0.08}
REQUEST_SD = {SERVICE: 0.30, TAIL: 1.50, CPU: 0.30}
PERCENTILE_SD = 0.20
OUTLIER_Z = 2.5
SURPRISE_Z = 1.4
TAIL_UTILISATION_LIMIT = 0.95
LARGEST_LOG_RATIO = 5.0
# No effect becomes larger, in mean or variance: all of an action together still have an exponential.
LARGEST_EFFECT = 2.0 * LARGEST_LOG_RATIO
# A shorter time was not measured, whatever was sent: its ratio may be 0, which has no logarithm.
LEAST_MEASURED_MS = 1e-6


_NOTHING: Mapping[str, Any] = {}
# Effects of one scope, and one effect in them: kind, name, level of the scope, mean, variance.
_Part = tuple[Row, str, str, int, float, float]


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
        """What is known about all actions of a table: their effects summed over kinds and over fleet, class and
        device."""
        rows = [self._rows.get(scope, _NOTHING) for scope in scopes_of(context)]
        found = (
            map(row.get(quantity, _NOTHING).get, effects.names, effects.defaults[level][place])
            for level, row in enumerate(rows)
            for place, quantity in enumerate(QUANTITIES)
        )
        count = len(effects.names)
        flat = chain.from_iterable(chain.from_iterable(found))
        shape = (len(SCOPES), len(QUANTITIES), count, 2)
        known = np.fromiter(flat, np.float64, math.prod(shape)).reshape(shape)
        total = known.sum(axis=0)[:, effects.index].sum(axis=1)
        return Correction(total[..., 0], total[..., 1])

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
            or prediction.raw_a_ms + prediction.raw_b_ms <= 0
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
        rows = [self._rows.get(scope, _NOTHING).get(quantity, _NOTHING) for scope in scopes_of(interaction.context)]
        return float(sum(row[name][0] for name in _names(interaction) for row in rows if name in row))

    def _step(self, quantity: str, interaction: Interaction, log_ratio: float, noise: float) -> bool:
        """One Kalman step over all effects of the chosen action."""
        rows = [self._rows.setdefault(scope, {"revision": 0}) for scope in scopes_of(interaction.context)]
        names = _names(interaction)
        parts: list[_Part] = []
        for level, row in enumerate(rows):
            effects = row.setdefault(quantity, {})
            for kind, name in zip(KINDS, names, strict=True):
                prior = prior_variance(quantity, kind, name)[level]
                mean, variance = effects.get(name, (0.0, prior))
                wandered = variance + DRIFT_VARIANCE[kind][level]
                parts.append((effects, kind, name, level, mean, max(min(wandered, prior), variance)))
        log_ratio = min(max(log_ratio, -LARGEST_LOG_RATIO), LARGEST_LOG_RATIO)
        innovation = log_ratio - sum(part[4] for part in parts)
        spread = math.sqrt(sum(part[5] for part in parts) + noise)
        if _is_changed(rows[-1], quantity, innovation / spread):
            parts = [_reopened(part, innovation) for part in parts]
        total = sum(part[5] for part in parts) + noise
        # What is hardly believed makes hardly surer.
        believed = min(1.0, (OUTLIER_Z * math.sqrt(total) / max(abs(innovation), 1e-12)) ** 2)
        for effects, _, name, _, mean, variance in parts:
            gain = believed * variance / total
            learnt = min(max(mean + gain * innovation, -LARGEST_EFFECT), LARGEST_EFFECT)
            effects[name] = [learnt, variance * (1.0 - gain)]
        return True


def _is_measured(time_ms: float | None) -> TypeGuard[float]:
    return time_ms is not None and time_ms >= LEAST_MEASURED_MS


def _names(interaction: Interaction) -> tuple[str, ...]:
    candidate = interaction.candidates[interaction.chosen]
    return names_of(candidate.prediction.source, candidate.action)


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


def _is_changed(row: Row, quantity: str, z: float) -> bool:
    """Whether the device has surprised twice on the same side; the memory of surprises stays in its row."""
    memory = row.setdefault("surprise", {})
    clipped = min(max(z, -2.5), 2.5)
    memory[quantity] = 0.5 * memory.get(quantity, 0.0) + 0.5 * clipped
    if abs(memory[quantity]) <= SURPRISE_Z:
        return False
    memory[quantity] = 0.0
    return True


def _reopened(part: _Part, innovation: float) -> _Part:
    """The device's overall effect made so uncertain that the innovation is no outlier any more."""
    effects, kind, name, level, mean, variance = part
    if kind == OVERALL and SCOPES[level] == "device":
        variance = max(variance, min(innovation**2, LARGEST_LOG_RATIO))
    return effects, kind, name, level, mean, variance


def _copied(row: Row) -> Row:
    return {
        key: _copied(value) if isinstance(value, dict) else list(value) if isinstance(value, list) else value
        for key, value in row.items()
    }


def _checked_row(scope: str, row: Mapping[str, Any]) -> Row:
    if not isinstance(scope, str) or (scope != "fleet" and not scope.startswith(("class:", "device:"))):
        raise InvalidInput("scope", f"must be fleet, class:<name> or device:<id>, is {str(scope)[:80]!r}")
    if not isinstance(row, Mapping):
        raise InvalidInput(scope, "must be a mapping")
    checked: Row = {"revision": int(number(f"{scope}.revision", row.get("revision", 0), 0, 2**53))}
    for quantity in QUANTITIES:
        if quantity in row:
            if not isinstance(row[quantity], Mapping):
                raise InvalidInput(f"{scope}.{quantity}", "must be a mapping")
            checked[quantity] = {
                str(name): _checked_effect(f"{scope}.{quantity}.{name}", effect)
                for name, effect in row[quantity].items()
            }
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


def _checked_effect(field: str, effect: object) -> list[float]:
    if not isinstance(effect, (list, tuple)) or len(effect) != 2:
        raise InvalidInput(field, "must be [mean, variance]")
    return [number(field, effect[0], -LARGEST_EFFECT, LARGEST_EFFECT), number(field, effect[1], 0, LARGEST_EFFECT)]
