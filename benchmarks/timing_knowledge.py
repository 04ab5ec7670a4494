"""What `timing_frontier.py` plays with: calibrations that are told about service times.

They stand in for `selector.calibration` in simulated worlds alone, and replace its service times; the tail and the CPU
time are learnt as there.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from selector.actions import action_table
from selector.calibration import Calibration, Correction
from selector.effects import QUANTITIES, SERVICE, EffectTable
from selector.interactions import Action, Context, Interaction
from selector.latency import LatencyModel
from selector.worlds.simulated import OUTLIER_FACTOR, SimulatedWorld

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
# Standard deviation, and the mean if it is not 0.
Size = tuple[float] | tuple[float, float]

# What the line of a profile misses, with what measured batches are off; the share of outliers is the world's.
LINE_SD, OUTLIER_SHARE = 0.05, 0.05
LEAST_RATE_RPS = 1e-6
LARGEST_LOG_ODDS = 500.0
_SERVICE = QUANTITIES.index(SERVICE)


class Gaussian:
    """Independent effects, jointly learnt from noisy sums of them; a full covariance."""

    def __init__(self) -> None:
        self._position: dict[Hashable, int] = {}
        self.mean, self.covariance = np.zeros(64), np.zeros((64, 64))

    def place(self, name: Hashable, sd: float, mean: float = 0.0) -> int:
        """Where the effect of this name is; a new one has this mean and standard deviation."""
        found = self._position.get(name)
        if found is not None:
            return found
        place = self._position[name] = len(self._position)
        if place >= len(self.mean):
            self.mean = np.pad(self.mean, (0, place))
            self.covariance = np.pad(self.covariance, (0, place))
        self.mean[place], self.covariance[place, place] = mean, sd**2
        return place

    def sums(self, rows: Indices) -> tuple[Floats, Floats]:
        """Means and variances of sums of effects: ``rows`` (sums, effects of each)."""
        used, inverse = np.unique(rows, return_inverse=True)
        design = np.zeros((len(rows), len(used)))
        np.add.at(design, (np.arange(len(rows))[:, None], inverse.reshape(rows.shape)), 1.0)
        variance = np.einsum("ij,ij->i", design @ self.covariance[np.ix_(used, used)], design)
        return self.mean[rows].sum(axis=1), np.maximum(variance, 0.0)

    def learn(self, row: Indices, came: float, noise: float, doubt: float = 0.0) -> None:
        """One noisy sum; ``doubt`` is the variance of ``came`` between the explanations it is the mean of."""
        direction = self.covariance[:, row].sum(axis=1)
        scale = float(direction[row].sum()) + noise
        self.mean += direction * ((came - float(self.mean[row].sum())) / scale)
        self.covariance -= np.outer(direction, direction) * ((1.0 - doubt / scale) / scale)


class InformedCalibration(Calibration):
    """Ours, but for the service time: a filter with a matrix per class that is told the sizes of all offsets, when
    devices change, and what other conditions do."""

    def __init__(self, world: SimulatedWorld) -> None:
        super().__init__()
        self._world, self._asked = world, _Asked(world)
        self._classes: dict[str, Gaussian] = {}
        self._designs: dict[tuple[str, bool], Indices] = {}

    def correction(self, context: Context, effects: EffectTable) -> Correction:
        """As it is known at this step; asked once per device and step."""
        step, raw_ms = self._asked.step_and_raw_ms(context)
        known = super().correction(context, effects)
        mean, variance = known.mean.copy(), known.variance.copy()
        offsets, variance[_SERVICE] = self._of_class(context).sums(self._design(context, self._is_changed(context)))
        mean[_SERVICE] = offsets + self._conditions(context, step, raw_ms)
        return Correction(mean, variance)

    def _known(self, quantity: str, interaction: Interaction) -> float:
        if quantity != SERVICE:
            return super()._known(quantity, interaction)
        mean, _ = self._of_class(interaction.context).sums(self._row(interaction)[None])
        return float(mean[0]) + self._condition_then(interaction)

    def _step(self, quantity: str, interaction: Interaction, log_ratio: float, noise: float) -> bool:
        if quantity != SERVICE:
            return super()._step(quantity, interaction, log_ratio, noise)
        self._infer(interaction, self._of_class(interaction.context), self._row(interaction), log_ratio)
        return True

    def _row(self, interaction: Interaction) -> Indices:
        was_changed = self._was_changed(interaction)
        return np.asarray(self._design(interaction.context, was_changed)[interaction.chosen])

    def _infer(self, interaction: Interaction, known: Gaussian, row: Indices, came: float) -> None:
        """One lease: an outlier with the probability that its time tells."""
        came -= self._condition_then(interaction)
        (mean,), (variance,) = known.sums(row[None])
        told, slow = self._world.plan.hidden.latency_noise_sd**2 + LINE_SD**2, math.log(OUTLIER_FACTOR)
        plain, odd = (((came - mean - off) ** 2) / (variance + told) / 2 for off in (0.0, slow))
        odds = (1 - OUTLIER_SHARE) / OUTLIER_SHARE * math.exp(min(odd - plain, LARGEST_LOG_ODDS))
        share = 1.0 / (1.0 + odds)
        known.learn(row, came - share * slow, told, doubt=share * (1 - share) * slow**2)

    def _is_changed(self, context: Context) -> bool:
        device = _device(context)
        return bool(self._world.updated[device]) and self._asked.steps[device] >= self._world.drift_step

    def _was_changed(self, interaction: Interaction) -> bool:
        device = _device(interaction.context)
        return bool(self._world.updated[device]) and _step_of(interaction) >= self._world.drift_step

    def _condition_then(self, interaction: Interaction) -> float:
        conditions = self._conditions(interaction.context, _step_of(interaction), _raw_ms(interaction))
        return float(conditions[interaction.chosen])

    def _conditions(self, context: Context, step: int, raw_ms: Floats | float) -> Floats:
        """Log of what heat, other processes and further callers do, over what our prediction takes them to do."""
        slowdown = self._world.slowdown(step)[_device(context)]
        return np.asarray(np.log(slowdown * self._asked.undisturbed_ms(context) / raw_ms))

    def _of_class(self, context: Context) -> Gaussian:
        return self._classes.setdefault(context.device_class, Gaussian())

    def _design(self, context: Context, is_changed: bool) -> Indices:
        """Which effects each action has, shape (actions, effects)."""
        found = self._designs.get((context.device, is_changed))
        if found is None:
            place = self._of_class(context).place
            rows = [
                [place(name, *size) for name, size in self._effects(context.device, action, is_changed).items()]
                for action in self._world.actions
            ]
            found = self._designs[context.device, is_changed] = np.array(rows, dtype=np.intp)
        return found

    def _effects(self, device: str, action: Action, is_changed: bool) -> dict[Hashable, Size]:
        """Names, with standard deviations (and means, if not 0) before anything is known."""
        hidden, digest, bounds = self._world.plan.hidden, action.variant.digest, action.configuration
        found: dict[Hashable, Size] = {
            ("class",): (hidden.class_sd,),
            ("class", digest): (hidden.class_variant_sd,),
            ("profile", digest, bounds.threads): (hidden.profile_sd,),
            ("device", device): (hidden.device_sd,),
            ("device", device, digest): (hidden.device_variant_sd,),
            ("device", device, bounds.max_batch, bounds.max_concurrency): (hidden.device_configuration_sd,),
        }
        if is_changed:
            # An update is slower three times in four: half of the mean of a folded normal.
            mean = 0.5 * hidden.update_sd * math.sqrt(2 / math.pi)
            found["update", device] = math.sqrt(hidden.update_sd**2 - mean**2), mean
            found["update", device, digest] = (hidden.update_variant_sd,)
        return found


class ToldCalibration(Calibration):
    """Ours, but that it is told how long one request alone takes."""

    def __init__(self, world: SimulatedWorld) -> None:
        super().__init__()
        self._world, self._asked = world, _Asked(world)

    def correction(self, context: Context, effects: EffectTable) -> Correction:
        """As it is at this step; asked once per device and step."""
        known = super().correction(context, effects)
        step, raw_ms = self._asked.step_and_raw_ms(context)
        mean, variance = known.mean.copy(), known.variance.copy()
        mean[_SERVICE], variance[_SERVICE] = np.log(self._world.alone_ms(step)[_device(context)] / raw_ms), 0.0
        return Correction(mean, variance)

    def _known(self, quantity: str, interaction: Interaction) -> float:
        if quantity != SERVICE:
            return super()._known(quantity, interaction)
        alone_ms = self._world.alone_ms(_step_of(interaction))[_device(interaction.context), interaction.chosen]
        return math.log(alone_ms / _raw_ms(interaction))

    def _step(self, quantity: str, interaction: Interaction, log_ratio: float, noise: float) -> bool:
        return quantity == SERVICE or super()._step(quantity, interaction, log_ratio, noise)


class _Asked:
    """Which step it is for each device, found by counting, and what is predicted there before any correction."""

    def __init__(self, world: SimulatedWorld) -> None:
        self._models = [LatencyModel(world.profiles(device)) for device in range(world.device_count)]
        self._table = action_table(world.actions)
        self.steps = [-1] * world.device_count
        self._undisturbed: dict[int, Floats] = {}

    def step_and_raw_ms(self, context: Context) -> tuple[int, Floats]:
        """The next step, and the time of one request alone as predicted, shape (actions,)."""
        device = _device(context)
        self.steps[device] += 1
        return self.steps[device], self._alone_ms(context)

    def undisturbed_ms(self, context: Context) -> Floats:
        """What the profiles say of one request alone, shape (actions,)."""
        found = self._undisturbed.get(_device(context))
        if found is None:
            quiet = replace(context, cpu_load_share=0.0, arrival_rate_rps=LEAST_RATE_RPS)
            found = self._undisturbed[_device(context)] = self._alone_ms(quiet)
        return found

    def _alone_ms(self, context: Context) -> Floats:
        raw = self._models[_device(context)].predict(context, self._table)
        return np.asarray(raw.raw_a_ms + raw.raw_b_ms)


def _device(context: Context) -> int:
    return int(context.device.rsplit("-", 1)[1])


def _step_of(interaction: Interaction) -> int:
    return int(interaction.decision_id.split("-")[-2])


def _raw_ms(interaction: Interaction) -> float:
    prediction = interaction.candidates[interaction.chosen].prediction
    return prediction.raw_a_ms + prediction.raw_b_ms
