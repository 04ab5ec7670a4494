"""How much nearer to the oracle would selection come if it learnt times better?

In `queueing` and `table` tastes hardly matter: regret comes from times that are not known. Ours plays under three
kinds of knowledge of them, all else equal, beside the best peer with our prediction and the best without:

* learnt: our calibration, as in `benchmarks.selection`.
* told the offsets' sizes: which offsets of time the world has and their standard deviations, which devices the update
  changes, when and by how much on average, how measurements err, and what heat, other processes and further callers do
  to an execution, exactly. Inference is exact: Kalman's filter with the full covariance of all offsets of a class. No
  product could be told this, and none could infer more from the same leases; it still chooses what to try as ours does.
* told the times: how long one request alone takes in every action, now. Nothing about times is left to learn but what
  queues, large batches and quotas add, and the energy.

Both frontiers keep our queues, the learnt correction of the tail, and the learnt CPU time. Each is played by ours and
by the argmax, which has neither budget nor aversion to risk. Ratios are regrets over that of the best peer in the same
run.

What would falsify the claim that a target is out of reach: a frontier with a smaller ratio.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from benchmarks.contenders import CALIBRATED, OURS, contenders, named
from benchmarks.selection_report import half_width
from benchmarks.selection_runs import Outcome, measured_rows, outcome, processes
from selector.actions import action_table
from selector.calibration import Calibration, Correction
from selector.effects import SERVICE, EffectTable
from selector.interactions import Action, Context, Interaction
from selector.latency import LatencyModel
from selector.simulation import play
from selector.worlds.constants import REPORTED_SEEDS, TUNING_SEEDS, make_world
from selector.worlds.simulated import OUTLIER_FACTOR, SimulatedWorld

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

LEARNT, SIZES, TIMES = "learnt", "told the offsets' sizes", "told the times"
PEERS = ("boosted trees on residual", "LinTS")
WORLDS = ("queueing", "table")
FULL, QUICK = (10, 50, 100), (1, 16, 20)
# Beyond the noise of measured times: mean batches are measured with an error, and are not the batches' mean time.
BATCH_SD = 0.05
OUTLIER_SHARE = 0.05
LEAST_RATE_RPS = 1e-6
WORKERS = 2


class Gaussian:
    """Independent effects, jointly learnt from noisy sums of them; a full covariance."""

    def __init__(self) -> None:
        self._position: dict[Hashable, int] = {}
        self.mean, self.covariance = np.zeros(64), np.zeros((64, 64))

    def place(self, name: Hashable, sd: float) -> int:
        """Where the effect of this name is; a new one has mean 0 and this standard deviation."""
        found = self._position.get(name)
        if found is not None:
            return found
        place = self._position[name] = len(self._position)
        if place >= len(self.mean):
            self.mean = np.pad(self.mean, (0, place))
            self.covariance = np.pad(self.covariance, (0, place))
        self.covariance[place, place] = sd**2
        return place

    def shift(self, name: Hashable, mean: float, variance: float) -> None:
        """An effect that is there has changed by something of this mean and variance."""
        place = self._position.get(name)
        if place is not None:
            self.mean[place] += mean
            self.covariance[place, place] += variance

    def sums(self, rows: Indices) -> tuple[Floats, Floats]:
        """Means and variances of sums of effects: ``rows`` (sums, effects of each)."""
        used, inverse = np.unique(rows, return_inverse=True)
        design = np.zeros((len(rows), len(used)))
        np.add.at(design, (np.arange(len(rows))[:, None], inverse.reshape(rows.shape)), 1.0)
        variance = np.einsum("ij,ij->i", design @ self.covariance[np.ix_(used, used)], design)
        return self.mean[rows].sum(axis=1), np.maximum(variance, 0.0)

    def learn(self, row: Indices, came: float, noise: float) -> None:
        """One noisy sum."""
        direction = self.covariance[:, row].sum(axis=1)
        scale = float(direction[row].sum()) + noise
        self.mean += direction * ((came - float(self.mean[row].sum())) / scale)
        self.covariance -= np.outer(direction, direction) / scale


class InformedCalibration(Calibration):
    """Ours, but for the service time, which is inferred exactly from what is told, or told itself."""

    def __init__(self, world: SimulatedWorld, *, is_told_times: bool) -> None:
        super().__init__()
        self._world, self._is_told_times = world, is_told_times
        self._classes: dict[str, Gaussian] = {}
        self._asked: dict[int, int] = {}
        self._raw = [LatencyModel(world.profiles(device)) for device in range(world.device_count)]
        self._table = action_table(world.actions)
        self._designs: dict[int, Indices] = {}
        self._profiled: dict[int, Floats] = {}

    def correction(self, context: Context, effects: EffectTable) -> Correction:
        """What is known about all actions; asked once per device and step."""
        known = super().correction(context, effects)
        device = _device(context)
        step = self._asked[device] = self._asked.get(device, -1) + 1
        if step == self._world.drift_step and self._world.updated[device]:
            self._update(context, device)
        mean, variance = known.mean.copy(), known.variance.copy()
        raw = self._raw[device].predict(context, self._table)
        raw_ms = raw.raw_a_ms + raw.raw_b_ms
        if self._is_told_times:
            mean[0], variance[0] = np.log(self._world.alone_ms(step)[device] / raw_ms), 0.0
        else:
            mean[0], variance[0] = self._of_class(context).sums(self._design(context, device))
            mean[0] += self._conditions(context, step, raw_ms)
        return Correction(mean, variance)

    def _known(self, quantity: str, interaction: Interaction) -> float:
        if quantity != SERVICE:
            return super()._known(quantity, interaction)
        context, chosen = interaction.context, interaction.chosen
        device, step, raw_ms = _device(context), _step(interaction), _raw_ms(interaction)
        if self._is_told_times:
            return math.log(self._world.alone_ms(step)[device, chosen] / raw_ms)
        mean, _ = self._of_class(context).sums(self._design(context, device)[chosen : chosen + 1])
        return float(mean[0] + self._conditions(context, step, raw_ms)[chosen])

    def _step(self, quantity: str, interaction: Interaction, log_ratio: float, noise: float) -> bool:
        if quantity != SERVICE:
            return super()._step(quantity, interaction, log_ratio, noise)
        if self._is_told_times:
            return True
        context, chosen = interaction.context, interaction.chosen
        row = self._design(context, _device(context))[chosen]
        came = log_ratio - float(self._conditions(context, _step(interaction), _raw_ms(interaction))[chosen])
        filtered = self._of_class(context)
        (mean,), (variance,) = filtered.sums(row[None])
        told = self._world.plan.hidden.latency_noise_sd**2 + BATCH_SD**2
        # Which outliers there are is told as well: the likelier of both is taken for true.
        slow = math.log(OUTLIER_FACTOR)
        plain, odd = (((came - mean - off) ** 2) / (variance + told) for off in (0.0, slow))
        is_outlier = math.log(OUTLIER_SHARE / (1 - OUTLIER_SHARE)) - odd / 2 > -plain / 2
        filtered.learn(row, came - slow * is_outlier, told)
        return True

    def _conditions(self, context: Context, step: int, raw_ms: Floats | float) -> Floats:
        """Log of what heat, other processes and further callers do, over what our prediction takes them to do."""
        device = _device(context)
        slowdown = self._world.slowdown(step)[device]
        return np.asarray(np.log(slowdown * self._undisturbed_ms(context, device) / raw_ms))

    def _undisturbed_ms(self, context: Context, device: int) -> Floats:
        """What the profiles say of one request alone, shape (actions,)."""
        found = self._profiled.get(device)
        if found is None:
            undisturbed = replace(context, cpu_load_share=0.0, arrival_rate_rps=LEAST_RATE_RPS)
            raw = self._raw[device].predict(undisturbed, self._table)
            found = self._profiled[device] = raw.raw_a_ms + raw.raw_b_ms
        return found

    def _of_class(self, context: Context) -> Gaussian:
        return self._classes.setdefault(context.device_class, Gaussian())

    def _design(self, context: Context, device: int) -> Indices:
        """Which effects each action has, shape (actions, effects)."""
        found = self._designs.get(device)
        if found is None:
            place = self._of_class(context).place
            rows = [
                [place(name, sd) for name, sd in self._effects(device, action).items()]
                for action in self._world.actions
            ]
            found = self._designs[device] = np.array(rows, dtype=np.intp)
        return found

    def _effects(self, device: int, action: Action) -> dict[Hashable, float]:
        """Names and true standard deviations."""
        hidden, digest, bounds = self._world.plan.hidden, action.variant.digest, action.configuration
        return {
            "class": hidden.class_sd,
            ("variant", digest): hidden.class_variant_sd,
            ("profile", digest, bounds.threads): hidden.profile_sd,
            ("device", device): hidden.device_sd,
            ("device", device, digest): hidden.device_variant_sd,
            ("device", device, bounds.max_batch, bounds.max_concurrency): hidden.device_configuration_sd,
        }

    def _update(self, context: Context, device: int) -> None:
        """An update is slower three times in four: its mean and variance are told, not its size."""
        hidden, known = self._world.plan.hidden, self._of_class(context)
        mean = 0.5 * hidden.update_sd * math.sqrt(2 / math.pi)
        known.shift(("device", device), mean, hidden.update_sd**2 - mean**2)
        for digest in {action.variant.digest for action in self._world.actions}:
            known.shift(("device", device, digest), 0.0, hidden.update_variant_sd**2)


def _device(context: Context) -> int:
    return int(context.device.rsplit("-", 1)[1])


def _step(interaction: Interaction) -> int:
    return int(interaction.decision_id.split("-")[-2])


def _raw_ms(interaction: Interaction) -> float:
    prediction = interaction.candidates[interaction.chosen].prediction
    return prediction.raw_a_ms + prediction.raw_b_ms


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
    SIZES: partial(InformedCalibration, is_told_times=False),
    TIMES: partial(InformedCalibration, is_told_times=True),
}


def lines_of(world: str, rows: Mapping[tuple[str, str], list[Outcome]]) -> dict[str, dict[str, float]]:
    """Print the table of one world; what the last line says of it."""
    qoe = {key: np.array([each.qoe_pct for each in found]) for key, found in rows.items()}
    regret = {key: 100 - float(values.mean()) for key, values in qoe.items()}
    boosted, without = (regret[LEARNT, name] for name in PEERS)
    print(f"\nworld {world}: {len(next(iter(rows.values())))} seeds")
    print(f"{'':<52}{'QoE %':>7}{'±':>6}{'after 5':>9}{'SLO misses':>12}{'/ with':>8}{'/ without':>11}")
    for (knowledge, name), found in rows.items():
        key = knowledge, name
        after_5, missed = (
            float(np.mean([getattr(each, f) for each in found])) for f in ("after_5_pct", "slo_missed_pct")
        )
        label = name if name in PEERS else f"{name}, {knowledge}"
        print(
            f"{label:<52}{qoe[key].mean():>7.2f}{half_width(qoe[key]):>6.2f}{after_5:>9.2f}{missed:>12.2f}"
            f"{regret[key] / boosted:>8.2f}{regret[key] / without:>11.2f}"
        )
    return {
        f"{name}, {knowledge}": {
            "qoe_pct": round(100 - regret[knowledge, name], 3),
            "regret_vs_best_learner_with_prior": round(regret[knowledge, name] / boosted, 3),
            "regret_vs_best_learner_without_prior": round(regret[knowledge, name] / without, 3),
        }
        for knowledge, name in rows
        if name not in PEERS
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.timing_frontier",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a small fleet, one seed; under 60 s")
    parser.add_argument("--tuning", action="store_true", help="the tuning instances and seeds instead of the reported")
    parser.add_argument("--seeds", type=int, help=f"default {FULL[0]}")
    options = parser.parse_args()
    count, devices, steps = QUICK if options.quick else FULL
    seeds = (TUNING_SEEDS if options.tuning else REPORTED_SEEDS)[: options.seeds or count]
    kinds = [(knowledge, name) for knowledge in _KNOWLEDGE for name in (OURS, CALIBRATED)]
    kinds += [(LEARNT, name) for name in PEERS]
    worlds = [f"{name}-tuning" if options.tuning else name for name in WORLDS]
    tasks = [
        Run(world, seed, devices, steps, knowledge, name)
        for world in worlds
        for seed in seeds
        for knowledge, name in kinds
    ]
    started, found = time.perf_counter(), dict[Run, Outcome]()
    with processes(WORKERS) as pool:
        for task, played in zip(tasks, pool.imap(run, tasks), strict=True):
            found[task] = played
            seconds = time.perf_counter() - started
            who = f"{task.world}, seed {task.seed}: {task.name}, {task.knowledge}"
            print(f"[{seconds:5.0f} s] {who}: {played.qoe_pct:.2f}", flush=True)
    summary = {
        world: lines_of(
            world,
            {(k, n): [found[Run(world, seed, devices, steps, k, n)] for seed in seeds] for k, n in kinds},
        )
        for world in worlds
    }
    print(json.dumps({"worlds": summary}))


if __name__ == "__main__":
    main()
