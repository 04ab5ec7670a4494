"""Single runs of `python -m benchmarks.selection`: what is played, what is kept of it, and in which process."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

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
FRONTIER = "told the tastes (frontier)"
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


Played = tuple[list[Outcome], Hardness]


class Journal:
    """Finished tasks, one JSON object a line, written at once: an interrupted run goes on where it stopped.

    The first line holds the digest of the code that played; other code does not go on. Raises ValueError for it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[Task, Played] = {}
        header = {"code": code_digest()}
        if path.exists():
            text = path.read_text()
            lines = [json.loads(line) for line in text.split("\n")[:-1]]
            path.write_text(text[: text.rfind("\n") + 1])  # what was cut off is played again
            if not lines or lines[0] != header:
                raise ValueError(f"{path} was written by other code: name another file")
            self._known = dict(map(_entry, lines[1:]))
        else:
            path.write_text(json.dumps(header) + "\n")

    def known(self, task: Task) -> Played | None:
        """What came of this task, if it was played before."""
        return self._known.get(task)

    def add(self, task: Task, played: Played) -> None:
        """Keep one finished task."""
        rows, hard = played
        entry = {"task": asdict(task), "outcomes": [asdict(row) for row in rows], "hardness": asdict(hard)}
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def _entry(line: dict[str, Any]) -> tuple[Task, Played]:
    task, rows = line["task"], line["outcomes"]
    steps = ("drift_pct", "drift_updated_pct")
    outcomes = [Outcome(**row | {field: tuple(row[field]) for field in steps}) for row in rows]
    return Task(**task | {"names": tuple(task["names"])}), (outcomes, Hardness(**line["hardness"]))


def code_digest() -> str:
    """SHA-256 over the sources of the selector, its worlds, and everyone who plays."""
    root = Path(__file__).parent
    players = [root / f"{name}.py" for name in ("contenders", "frontier", "latency_table", "peers", "selection_runs")]
    sources = sorted((root.parent / "selector").rglob("*.py")) + players
    return hashlib.sha256(b"\0".join(each.read_bytes() for each in sources)).hexdigest()


def processes(count: int) -> Pool:
    """So many processes of one thread each; they import the code once, when they start."""
    os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    return multiprocessing.get_context("spawn").Pool(count)


def outcomes(tasks: Sequence[Task], pool: Pool, journal: Journal | None = None) -> Iterator[tuple[Task, Played]]:
    """Play all tasks that the journal does not know; each is kept before it is given.

    First come those that it knows, then the others in their order.
    """
    found = {task: journal.known(task) for task in tasks} if journal else {}
    yield from ((task, played) for task, played in found.items() if played)
    left = [task for task in tasks if not found.get(task)]
    for task, played in zip(left, pool.imap(run, left), strict=True):
        if journal:
            journal.add(task, played)
        yield task, played


def run(task: Task) -> Played:
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
    """The learner that is told the structure of tastes, on our calibrated prediction."""
    formulas = declared_formulas(world)
    exploration = replace(ours.exploration, shortlist_size=40, budget=1.0)
    return replace(
        ours, name=FRONTIER, role="reference", make_policy=lambda _: InformedPolicy(formulas), exploration=exploration
    )


def state_megabytes(devices: int, known: int = 50, steps: int = 100) -> float:
    """Memory that the state of so many devices takes: the calibration's rows and the policy's tastes after a run of
    ``known`` devices, loaded and scaled up, and the model's bytes."""
    world, calibration = make_world("quirks-tuning", 100, known, steps), Calibration()
    contender = next(each for each in contenders(world) if each.name == OURS)
    policy = contender.make_policy(0)
    play(world, replace(contender, make_policy=lambda _: policy), 0, calibration=calibration)
    text, data = json.dumps(calibration.rows()), policy.to_bytes()
    tracemalloc.start()
    loaded, same = Calibration.from_rows(json.loads(text)), type(policy).from_bytes(data)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (loaded.rows().keys(), same.to_bytes()) == (calibration.rows().keys(), data)
    return (size * devices / known + len(data)) / 1e6


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
