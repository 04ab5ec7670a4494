"""How close to the oracle does selection come, against every peer, in worlds that are hard and structurally different?

Worlds and their constants are in `selector/worlds/constants.py` (docs/selection.md describes them); the reported
instances and seeds were fixed before anything was tuned. Contenders are in `contenders.py`. All numbers of a table come
from one run; under one seed all contenders meet the same devices and the same noise.

* QoE %: true expected QoE of what was chosen, less the charge for downloads, over the QoE of the best action there was
  in each context (the oracle pays nothing for switching). Mean over seeds, ± half of a 95 % t interval.
* after 5: the same for decisions 6 to 10 of each device. last 20: the last 20.
* SLO misses: share of decisions whose action's true p95 is above the SLO, or that failed. The oracle's own is printed.
* recovery: decisions per device after the OS update until the fleet's QoE, mean of three steps, all seeds pooled, is
  within 2 points of the oracle. In brackets: of the devices that the update changed. "never": not within the run; the
  JSON object then holds the number of decisions that were left.
* budget violations: share of devices whose cumulative QoE ever falls below 95 % of the baseline's after 10 decisions; a
  "!" marks that a whole fleet did in some seed.
* learning peer: every learning contender without our online calibration. ``regret_vs_best_learner_with_prior`` is
  (oracle - ours) / (oracle - best learning peer that has our prediction as a feature), ``..._without_prior`` the same
  for the best that has not, ``regret_vs_hosted_default`` for the hosted service's default, plain.
* ``ablation_no_vw_pct`` is the better one of the two ablations, the calibrated argmax and the same with learnt
  preferences. They also lack horizon, aversion to risk and budget, so ``vw_alone`` (of its own) is ours less "ours
  without Vowpal Wabbit", which lacks nothing else: points, paired over seeds, t interval.
* ``lift_over_best_per_class``: ours less the best fixed action per class in hindsight, points, paired over seeds, t
  interval. ``noise_loss_points``: ours less ours under stress (reward noise of sd 0.1, 30 % missing, every feedback 20
  decisions of its device late), paired.
* ``decision_ms_200``, ``_20``: median time of one decision of `decision_cost.py`, one thread.

* ``large``: of the fleets of 500 devices, the same keys as far as they are played there, and the missed targets.

Each finished task (world, seed) is printed at once and, with ``--journal FILE``, kept: the same command goes on after
an interruption, and refuses if the code has changed in between.

What would falsify the claim: a better peer, a hardness bound that a world misses, an interval that reaches 0.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import ANALYTIC, CALIBRATED, HOSTED, OURS, PREFERENCES, WITHOUT_VW
from benchmarks.decision_cost import calibration_loop_ms, contestants, times_ms
from benchmarks.selection_report import WorldReport, cost_verdicts, megabytes_line, verdicts
from benchmarks.selection_runs import Journal, Outcome, Task, outcomes, processes, state_megabytes
from selector.worlds.constants import REPORTED_SEEDS, TUNING_SEEDS, WORLDS
from selector.worlds.hardness import Hardness

REPORTED = tuple(name for name in WORLDS if not name.endswith("-tuning"))
FULL_SEEDS, QUICK_SEEDS = 10, 2
FULL_STEPS, LARGE_STEPS, QUICK_STEPS = 100, 20, 30
SMALL_FLEET, LARGE_FLEET, QUICK_FLEET = 50, 500, 16
QUICK_NAMES = (OURS, WITHOUT_VW, CALIBRATED, PREFERENCES, ANALYTIC, HOSTED, "LinUCB + prediction", "LinTS")
WORKERS = 2


def play_worlds(tasks: Sequence[Task], pool: Pool, journal: Journal | None) -> dict[str, WorldReport]:
    """Reports by world; each is shown when its last task is done."""
    started, found = time.perf_counter(), dict[Task, tuple[list[Outcome], Hardness]]()
    reports: dict[str, WorldReport] = {}
    for task, played in outcomes(tasks, pool, journal):
        found[task] = played
        print(_progress(task, played[0], time.perf_counter() - started), flush=True)
        of_world = [each for each in tasks if each.world == task.world]
        if all(each in found for each in of_world):
            rows = [row for each in of_world for row in found[each][0]]
            reports[task.world] = WorldReport(task.world, rows, [found[each][1] for each in of_world])
            reports[task.world].show(task.steps)
    return {world: reports[world] for world in dict.fromkeys(task.world for task in tasks)}


def _progress(task: Task, rows: Sequence[Outcome], seconds: float) -> str:
    best = sorted(rows, key=lambda row: -row.qoe_pct)[:4]
    told = ", ".join(f"{row.name} {row.qoe_pct:.2f}" for row in best)
    return f"[{seconds:5.0f} s] {task.world}, seed {task.seed}, {task.devices} devices: {told}"


def tasks_of(
    worlds: Iterable[str], seeds: Sequence[int], devices: int, steps: int, names: Mapping[str, tuple[str, ...]]
) -> list[Task]:
    """One task per world and seed; ``names`` says who plays in each world."""
    return [Task(world, seed, devices, steps, names[world]) for world in worlds for seed in seeds]


def large_names(report: WorldReport) -> tuple[str, ...]:
    """Who plays in the large fleet: ours, the ablations, and the two best peers of the small one."""
    peers = sorted(report.learning_peers(), key=lambda name: -report.mean(name, "qoe_pct"))
    return OURS, WITHOUT_VW, CALIBRATED, PREFERENCES, *peers[:2]


def large_summary(reports: Mapping[str, WorldReport]) -> dict[str, Any]:
    """What the last line says of the large fleets: what was played, and which targets were missed."""
    worlds = {}
    for name, report in reports.items():
        played = {key: value for key, value in report.summary().items() if value is not None}
        missed = [asked for asked, met, _ in report.targets() if met is False]
        worlds[name] = played | {"missed": missed, "vw_alone": report.vw_alone()}
    return {"devices": LARGE_FLEET, "decisions": LARGE_STEPS, "worlds": worlds}


def decision_times(seconds: float) -> dict[str, float]:
    """Median ms of one decision, by number of actions."""
    return {
        f"decision_ms_{count}": float(np.median(times_ms(contestants(count)["ours"], seconds))) for count in (200, 20)
    }


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.selection", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small fleets, two seeds, few contenders; under 50 s")
    parser.add_argument("--tuning", action="store_true", help="the tuning instances and seeds instead of the reported")
    parser.add_argument("--devices", type=int, help=f"devices of the small fleet, default {SMALL_FLEET}")
    parser.add_argument("--steps", type=int, help=f"decisions per device, default {FULL_STEPS}")
    parser.add_argument("--seeds", type=int, help=f"number of seeds, default {FULL_SEEDS}")
    parser.add_argument("--worlds", nargs="+", choices=REPORTED, default=list(REPORTED), help="default all")
    parser.add_argument("--only", nargs="+", default=(), help="names of the contenders that play")
    parser.add_argument("--no-large", action="store_true", help=f"leave the fleets of {LARGE_FLEET} out")
    parser.add_argument("--journal", type=Path, help="keep each finished task in this file, and go on from there")
    return parser.parse_args()


def main() -> None:
    arguments = arguments_of()
    started, quick = time.perf_counter(), arguments.quick
    worlds = [f"{name}-tuning" if arguments.tuning else name for name in arguments.worlds]
    count = arguments.seeds or (QUICK_SEEDS if quick else FULL_SEEDS)
    seeds = list(TUNING_SEEDS if arguments.tuning else REPORTED_SEEDS)[:count]
    devices = arguments.devices or (QUICK_FLEET if quick else SMALL_FLEET)
    steps = arguments.steps or (QUICK_STEPS if quick else FULL_STEPS)
    names = tuple(arguments.only) or (QUICK_NAMES if quick else ())
    journal = Journal(arguments.journal) if arguments.journal else None
    large: dict[str, WorldReport] = {}
    with processes(WORKERS) as pool:
        small = tasks_of(worlds, seeds, devices, steps, dict.fromkeys(worlds, names))
        reports = play_worlds(small, pool, journal)
        if not quick and not arguments.no_large and not arguments.only:
            chosen = {world: large_names(report) for world, report in reports.items()}
            large = play_worlds(tasks_of(worlds, seeds, LARGE_FLEET, LARGE_STEPS, chosen), pool, journal)
    summary: dict[str, Any] = {"worlds": {name: report.summary() for name, report in reports.items()}}
    summary["vw_alone"] = {name: report.vw_alone() for name, report in reports.items()}
    if large:
        summary["large"] = large_summary(large)
    summary |= {name: round(value, 3) for name, value in decision_times(0.5 if quick else 5.0).items()}
    print(f"\nfixed calibration loop: {calibration_loop_ms():.1f} ms; whole run: {time.perf_counter() - started:.0f} s")
    for line in (*verdicts(reports), *verdicts(large, f", {LARGE_FLEET} devices"), *cost_verdicts(summary)):
        print(line)
    if not quick:
        print(megabytes_line(state_megabytes(10_000)))
    missing = {key for report in summary["worlds"].values() for key, value in report.items() if value is None}
    if missing:
        why = "not played in this shortened run" if quick or names else "needs more than one seed"
        summary["not_run"] = dict.fromkeys(sorted(missing), why)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
