"""Single runs of `python -m benchmarks.selection`: what is played, what is kept of it, and in which process."""

from __future__ import annotations

import json
import multiprocessing
import os
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from benchmarks.contenders import BEST_FIXED, BEST_PER_CLASS, OURS, RANDOM, contenders, declared_formulas
from benchmarks.frontier import InformedPolicy
from benchmarks.latency_table import load
from selector.calibration import Calibration
from selector.simulation import STRESS, Contender, Feedback, Trace, play
from selector.worlds.constants import make_world
from selector.worlds.hardness import Hardness, hardness
from selector.worlds.simulated import SimulatedWorld
from selector.worlds.timings import TableRow

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

# These need no run: what they earn is summed up exactly from the world's truth.
EXACT = (RANDOM, BEST_FIXED, BEST_PER_CLASS)
FRONTIER = "informed learner (frontier)"
UNGUARDED, STRESSED = f"{OURS}, no budget", f"{OURS}, stress"
BUDGET = 0.05
WARM_UP = 10


@dataclass(frozen=True, slots=True)
class Task:
    """All contenders of these names (none: all but the exact ones) in one world under one seed."""

    world: str
    seed: int
    devices: int
    steps: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is kept of one run. Shares in %; ``drift_pct`` is the QoE per step from the drift on, of all devices and of
    those that the update changed."""

    world: str
    seed: int
    devices: int
    name: str
    role: str
    calibrates: bool
    uses_prediction: bool
    qoe_pct: float
    after_5_pct: float
    last_20_pct: float
    slo_missed_pct: float
    out_of_memory_pct: float
    budget_violations_pct: float
    fleet_violates: bool
    microseconds: float
    drift_pct: tuple[float, ...]
    drift_updated_pct: tuple[float, ...]


def outcomes(tasks: Sequence[Task], workers: int) -> Iterator[tuple[list[Outcome], Hardness]]:
    """Play all tasks in so many processes; each process uses one core."""
    os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(run, tasks)


def run(task: Task) -> tuple[list[Outcome], Hardness]:
    """Play one task in this process."""
    world = make_world(task.world, task.seed, task.devices, task.steps, measured_rows())
    chosen = [each for each in lineup(world) if not task.names or each[0].name in task.names]
    found = [
        outcome(world, contender, task.seed, play(world, contender, task.seed, feedback))
        for contender, feedback in chosen
    ]
    return found, hardness(world)


def lineup(world: SimulatedWorld) -> list[tuple[Contender, Feedback]]:
    """Everyone who plays, and the conditions: ours also without its budget and under stress, and the frontier."""
    everyone = [each for each in contenders(world) if each.name not in EXACT]
    ours = next(each for each in everyone if each.name == OURS)
    plain = [(each, Feedback()) for each in everyone]
    if ours.exploration.budget < 1:
        unguarded = replace(ours, name=UNGUARDED, exploration=replace(ours.exploration, budget=1.0))
        plain.append((unguarded, Feedback()))
    return [*plain, (replace(ours, name=STRESSED), STRESS), (frontier(world, ours), Feedback())]


def frontier(world: SimulatedWorld, ours: Contender) -> Contender:
    """The learner that is told the structure of the world, on our calibrated prediction."""
    formulas = declared_formulas(world)
    exploration = replace(ours.exploration, shortlist_size=40, budget=1.0)
    return replace(
        ours, name=FRONTIER, role="reference", make_policy=lambda _: InformedPolicy(formulas), exploration=exploration
    )


def state_megabytes(devices: int, known: int = 50, steps: int = 100) -> float:
    """Memory that the state of so many devices takes: the calibration's rows after a run of ``known`` devices, loaded
    and scaled up, and the policy's bytes."""
    world, calibration = make_world("quirks-tuning", 100, known, steps), Calibration()
    contender = next(each for each in contenders(world) if each.name == OURS)
    policy = contender.make_policy(0)
    play(world, replace(contender, make_policy=lambda _: policy), 0, calibration=calibration)
    text = json.dumps(calibration.rows())
    tracemalloc.start()
    loaded = Calibration.from_rows(json.loads(text))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loaded.rows().keys() == calibration.rows().keys()
    return (size * devices / known + len(policy.to_bytes())) / 1e6


@lru_cache(maxsize=1)
def measured_rows() -> tuple[TableRow, ...]:
    """The committed table."""
    return load()[0]


def outcome(world: SimulatedWorld, contender: Contender, seed: int, trace: Trace) -> Outcome:
    """The measures of one trace."""
    below, fleet = budget_violations(trace)
    drifted = slice(world.drift_step, None)
    return Outcome(
        world=world.name,
        seed=seed,
        devices=world.device_count,
        name=contender.name,
        role=contender.role,
        calibrates=contender.calibrates,
        uses_prediction=contender.uses_prediction,
        qoe_pct=share(trace, slice(None)),
        after_5_pct=share(trace, slice(5, 10)),
        last_20_pct=share(trace, slice(-20, None)),
        slo_missed_pct=100 * float(trace.slo_missed.mean()),
        out_of_memory_pct=100 * float(trace.out_of_memory.mean()),
        budget_violations_pct=100 * float(below.mean()),
        fleet_violates=fleet,
        microseconds=1e6 * trace.seconds / trace.qoe.size,
        drift_pct=_by_step(trace.qoe[drifted], trace.oracle[drifted]),
        drift_updated_pct=_by_step(trace.qoe[drifted][:, world.updated], trace.oracle[drifted][:, world.updated]),
    )


def share(trace: Trace, steps: slice) -> float:
    """QoE of these steps in % of the oracle's."""
    return 100 * float(trace.qoe[steps].sum() / trace.oracle[steps].sum())


def budget_violations(trace: Trace, budget: float = BUDGET) -> tuple[Mask, bool]:
    """Which devices, and whether the fleet, ever had a cumulative QoE below (1 - budget) times the baseline's after the
    warm-up."""
    earned, owed = np.cumsum(trace.qoe, axis=0), (1 - budget) * np.cumsum(trace.baseline, axis=0)
    below: Mask = (earned < owed)[WARM_UP:]
    fleet = (earned.sum(axis=1) < owed.sum(axis=1))[WARM_UP:]
    return np.asarray(below.any(axis=0)), bool(fleet.any())


def _by_step(qoe: Floats, oracle: Floats) -> tuple[float, ...]:
    return tuple((100 * qoe.sum(axis=1) / np.maximum(oracle.sum(axis=1), 1e-12)).tolist())
