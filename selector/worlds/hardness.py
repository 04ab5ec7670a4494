"""How hard a simulated world is: what choosing without learning would reach there, in % of the oracle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selector.simulation import World, available

Floats = NDArray[np.float64]

# Of the time before the drift, of the time after it: how much a device must gain by changing its action to count.
LEAST_GAIN = 0.005


@dataclass(frozen=True, slots=True)
class Hardness:
    """Shares of the oracle's QoE in %, and the share of devices in % whose best action changes at the drift."""

    random_pct: float
    best_fixed_pct: float
    best_per_class_pct: float
    best_per_device_pct: float
    changed_pct: float
    oracle_slo_missed_pct: float
    baseline_pct: float


def hardness(world: World) -> Hardness:
    """References in hindsight. A fixed choice that is not there at a step earns nothing at that step."""
    count, steps = world.device_count, world.steps
    before, after = np.zeros((count, len(world.actions))), np.zeros((count, len(world.actions)))
    oracle = drawn = missed = baseline = 0.0
    position = {action.key: index for index, action in enumerate(world.actions)}
    every = np.arange(count)
    fixed = np.array([position[world.context(device, 0).baseline or ""] for device in range(count)])
    for step in range(steps):
        there = available(world, step)
        qoe = np.where(there, world.expected_qoe(step), 0.0)
        best = np.argmax(qoe, axis=1)
        oracle += float(qoe[every, best].sum())
        missed += float(world.slo_missed(step)[every, best].sum())
        drawn += float(qoe[:, there].mean(axis=1).sum())
        baseline += float(qoe[every, fixed].sum())
        if step < world.drift_step:
            before += qoe
        else:
            after += qoe
    total = before + after
    classes = np.array([world.device_class(device) for device in range(count)])
    by_class = sum(float(total[classes == each].sum(axis=0).max()) for each in np.unique(classes))
    stay = after[every, np.argmax(before, axis=1)]
    changed = after.max(axis=1) - stay > LEAST_GAIN * (steps - world.drift_step)
    return Hardness(
        random_pct=100 * drawn / oracle,
        best_fixed_pct=100 * float(total.sum(axis=0).max()) / oracle,
        best_per_class_pct=100 * by_class / oracle,
        best_per_device_pct=100 * float(total.max(axis=1).sum()) / oracle,
        changed_pct=100 * float(changed.mean()),
        oracle_slo_missed_pct=100 * missed / (count * steps),
        baseline_pct=100 * baseline / oracle,
    )
