"""What nobody is told in a simulated world: how times differ from their profiles, and what users like."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selector.worlds.fleets import DAYPARTS, GROUPS, Fleet
from selector.worlds.timings import Timing

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Hidden:
    """Standard deviations of what no profile tells: log offsets of times, of CPU time, and of profiles; and of what a
    lease measures: times (log), and accuracy on a small labelled sample, 0 for none."""

    class_sd: float = 0.15
    device_sd: float = 0.25
    class_variant_sd: float = 0.15
    device_variant_sd: float = 0.12
    device_configuration_sd: float = 0.05
    update_sd: float = 0.35
    update_variant_sd: float = 0.15
    energy_sd: float = 0.1
    profile_sd: float = 0.1
    latency_noise_sd: float = 0.1
    accuracy_noise_sd: float = 0.0


@dataclass(frozen=True, slots=True)
class Tastes:
    """What only ratings show. ``weights_sd``: log spread of each device's users around the declared weights; the others
    are in rating points: by group and variant, by class and variant, by group and precision, at random by device and
    variant (``quirk_share`` of the pairs), and how much the time of day changes what accuracy and energy are worth."""

    weights_sd: float = 0.2
    group_variant_sd: float = 0.0
    class_variant_sd: float = 0.0
    class_dislike_share: float = 0.0
    class_dislike: float = 0.0
    quirk_share: float = 0.0
    quirk: float = 0.0
    daypart: float = 0.0
    noise_sd: float = 0.08


class Offsets:
    """Log offsets: of times by device and variant before and after the OS update, by device and configuration, and of
    CPU time by device."""

    def __init__(self, hidden: Hidden, fleet: Fleet, timing: Timing, classes: int, rng: np.random.Generator) -> None:
        devices, variants = len(fleet.device_class), len(timing.members)
        draw = rng.standard_normal
        self.by_class = hidden.class_sd * draw((classes, 1)) + hidden.class_variant_sd * draw((classes, variants))
        before = self.by_class[fleet.device_class] + hidden.device_sd * draw((devices, 1))
        before = before + hidden.device_variant_sd * draw((devices, variants))
        update = np.abs(hidden.update_sd * draw((devices, 1))) * np.where(rng.random((devices, 1)) < 0.75, 1.0, -1.0)
        update = update + hidden.update_variant_sd * draw((devices, variants))
        self._log_time = before, before + np.where(fleet.updated[:, None], update, 0.0)
        self.log_configuration = hidden.device_configuration_sd * draw((devices, int(timing.configuration.max()) + 1))
        self.log_cpu = hidden.energy_sd * draw(devices)

    def log_time(self, is_updated: bool) -> Floats:
        """Shape (devices, variants)."""
        return self._log_time[int(is_updated)]


class Likes:
    """True user weights (latency, accuracy, energy), shape (devices, 3), and rating points by device and variant."""

    def __init__(
        self, tastes: Tastes, *, declared: Floats, fleet: Fleet, timing: Timing, classes: int, rng: np.random.Generator
    ) -> None:
        devices, variants = len(fleet.device_class), len(timing.members)
        draw = rng.standard_normal
        self.weights = declared[:, :3] * np.exp(tastes.weights_sd * draw((devices, 3)))
        by_group = tastes.group_variant_sd * draw((len(GROUPS), variants))
        disliked = rng.random((classes, variants)) < tastes.class_dislike_share
        by_class = tastes.class_variant_sd * draw((classes, variants)) - tastes.class_dislike * disliked
        quirks = -tastes.quirk * (rng.random((devices, variants)) < tastes.quirk_share)
        self.points = by_group[fleet.group] + by_class[fleet.device_class] + quirks
        # At night energy is worth more and accuracy less, in the morning the other way round; in the office more so.
        wave = np.array([-1.0, 1.0, 0.3, -0.3])[: len(DAYPARTS)]
        strength = np.array([1.4, 0.8, 0.8])[: len(GROUPS)]
        self.daypart = tastes.daypart * wave[fleet.daypart] * strength[fleet.group]
