"""How much nearer to the oracle would selection come in `queueing` if it learnt service times better?

The hypothesis is that times which are not known cost most of what is lost there. Ours plays with three kinds of
knowledge of service times, beside the peers that were the best with our prediction and the best without in
`benchmarks.selection`:

* learnt: our calibration, as it is.
* told the offsets' sizes: a filter like ours, but that it is told which offsets the world draws and their standard
  deviations, which devices the update changes, when and by how much on average, the noise and the share of outliers,
  and what heat, other processes and further callers do to an execution. No product could be told this. It knows no
  fleet.
* told the times: the median time of one request alone in every action, now, with what its own further callers cost. Of
  service times nothing more is learnt.

All keep our queues, and learn the tail and the CPU time as ours does. The first and the second are also played by the
calibrated argmax, which has neither horizon nor aversion to risk nor budget. No row is a strict bound: the filters see
service times only, and choose what to try as ours does. `table` is not played: there executions stall under CPU quotas,
which no offset of this kind describes.

"less learnt" is the difference to the first row, paired over seeds, with the half-width of a 95 % t interval; "/ with"
and "/ without" are regrets over those of the two peers in the same run. What would falsify the hypothesis: rows that
know more and are not better.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.contenders import CALIBRATED, OURS, contenders, named
from benchmarks.selection_report import half_width, interval
from benchmarks.selection_runs import Outcome, measured_rows, outcome, processes
from benchmarks.timing_knowledge import InformedCalibration, ToldCalibration
from selector.calibration import Calibration
from selector.simulation import play
from selector.worlds.constants import REPORTED_SEEDS, TUNING_SEEDS, make_world
from selector.worlds.simulated import SimulatedWorld

LEARNT, SIZES, TIMES = "learnt", "told the offsets' sizes", "told the times"
PEERS = ("boosted trees on residual", "LinTS")
WORLD = "queueing"
FULL, QUICK = (10, 50, 100), (2, 16, 20)
WORKERS = 2


@dataclass(frozen=True, slots=True)
class Run:
    """One contender under one kind of knowledge in one world under one seed."""

    world: str
    seed: int
    devices: int
    steps: int
    knowledge: str
    name: str


def run(task: Run) -> Outcome:
    """Play it in this process."""
    world = make_world(task.world, task.seed, task.devices, task.steps, measured_rows())
    contender = named(task.name, contenders(world))
    trace = play(world, contender, task.seed, calibration=_KNOWLEDGE[task.knowledge](world))
    return outcome(world, contender, task.seed, trace)


_KNOWLEDGE: Mapping[str, Callable[[SimulatedWorld], Calibration]] = {
    LEARNT: lambda _: Calibration(),
    SIZES: InformedCalibration,
    TIMES: ToldCalibration,
}


def report(rows: Mapping[tuple[str, str], list[Outcome]]) -> dict[str, dict[str, Any]]:
    """Print the table; what the last line says of it."""
    qoe = {key: np.array([each.qoe_pct for each in found]) for key, found in rows.items()}
    regret = {key: 100 - float(values.mean()) for key, values in qoe.items()}
    with_prediction, without = (regret[LEARNT, name] for name in PEERS)
    columns = f"{'QoE %':>7}{'less learnt':>16}{'after 5':>9}{'SLO misses':>12}{'budget viol.':>14}"
    print(f"\n{'':<44}{columns}{'/ with':>8}{'/ without':>11}")
    summary: dict[str, dict[str, Any]] = {}
    for (knowledge, name), found in rows.items():
        key = knowledge, name
        gain = qoe[key] - qoe[LEARNT, name if name in (OURS, CALIBRATED) else OURS]
        after_5, missed, below = (
            float(np.mean([getattr(each, field) for each in found]))
            for field in ("after_5_pct", "slo_missed_pct", "budget_violations_pct")
        )
        label = name if name in PEERS else f"{name}, {knowledge}"
        difference = f"{gain.mean():+.2f} ± {half_width(gain):.2f}"
        print(
            f"{label:<44}{qoe[key].mean():>7.2f}{difference:>16}{after_5:>9.2f}{missed:>12.2f}{below:>14.1f}"
            f"{regret[key] / with_prediction:>8.2f}{regret[key] / without:>11.2f}"
        )
        summary[label] = {
            "qoe_pct": round(100 - regret[key], 3),
            "less_learnt": interval(gain),
            "slo_violation_pct": round(missed, 3),
            "budget_violations_pct": round(below, 3),
            "regret_vs_best_learner_with_prior": round(regret[key] / with_prediction, 3),
            "regret_vs_best_learner_without_prior": round(regret[key] / without, 3),
        }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.timing_frontier",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a small fleet, two seeds; under 50 s")
    parser.add_argument("--tuning", action="store_true", help="the tuning instance and seeds instead of the reported")
    parser.add_argument("--seeds", type=int, help=f"default {FULL[0]}")
    options = parser.parse_args()
    count, devices, steps = QUICK if options.quick else FULL
    seeds = (TUNING_SEEDS if options.tuning else REPORTED_SEEDS)[: options.seeds or count]
    world = f"{WORLD}-tuning" if options.tuning else WORLD
    kinds = [*((each, OURS) for each in _KNOWLEDGE), (LEARNT, CALIBRATED), (SIZES, CALIBRATED)]
    kinds += [(LEARNT, name) for name in PEERS]
    tasks = [Run(world, seed, devices, steps, *kind) for seed in seeds for kind in kinds]
    started, found = time.perf_counter(), dict[Run, Outcome]()
    with processes(WORKERS) as pool:
        for task, played in zip(tasks, pool.imap(run, tasks), strict=True):
            found[task] = played
            seconds = time.perf_counter() - started
            who = task.name if task.name in PEERS else f"{task.name}, {task.knowledge}"
            print(f"[{seconds:5.0f} s] seed {task.seed}: {who}: {played.qoe_pct:.2f}", flush=True)
    print(f"\nworld {world}: {devices} devices x {steps} decisions, {len(seeds)} seeds", end="")
    rows = {kind: [found[Run(world, seed, devices, steps, *kind)] for seed in seeds] for kind in kinds}
    print(json.dumps({"world": world, "seeds": len(seeds), "devices": devices, "rows": report(rows)}))


if __name__ == "__main__":
    main()
