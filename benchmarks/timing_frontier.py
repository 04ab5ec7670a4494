"""How much nearer to the oracle would selection come if it learnt times better?

In `queueing` and `table` tastes hardly matter: regret comes from times that are not known. Ours plays with four
kinds of knowledge of service times, all else equal, beside the best peer with our prediction and the best without:

* learnt: our calibration, as in `benchmarks.selection`: a filter with a diagonal covariance.
* exact inference: told nothing, but the covariance of all offsets of a class and its devices is kept in full (Kalman's
  filter), so that a lease tells as much as it can. Our kinds of effects and our prior sizes, but no fleet; a device
  that surprises twice is taken to have changed, as ours does. The state grows with the square of a class's devices.
* told the offsets' sizes: exact inference, told besides which offsets the world has and their standard deviations,
  which devices the update changes, when and by how much on average, how measurements err, and what heat, other
  processes and further callers do to an execution, exactly. No product could be told this, and none could infer more
  from the same leases; it still chooses what to try as ours does.
* told the times: how long one request alone takes in every action, now. Nothing about times is left to learn but what
  queues, large batches and quotas add, and the energy.

All keep our queues, the learnt correction of the tail, and the learnt CPU time. The two that are told are also played
by the argmax, which has neither budget nor aversion to risk. Ratios are regrets over that of the best peer in the same
run.

What would falsify the claim that better learning of times is what is missing: a frontier that is no better than ours.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.contenders import CALIBRATED, OURS, contenders, named
from benchmarks.selection_report import half_width
from benchmarks.selection_runs import Outcome, measured_rows, outcome, processes
from selector.actions import action_table
from selector.calibration import LEASE_SD, OUTLIER_Z, Calibration, Correction
from selector.effects import BATCH, CALLERS, OVERALL, PRECISION, PRIOR_SD, SERVICE, THREADS, VARIANT, EffectTable
from selector.interactions import Action, Context, Interaction
from selector.latency import LatencyModel
from selector.simulation import play
from selector.worlds.constants import REPORTED_SEEDS, TUNING_SEEDS, make_world
from selector.worlds.simulated import OUTLIER_FACTOR, SimulatedWorld

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

LEARNT, EXACT, SIZES, TIMES = "learnt", "exact inference", "told the offsets' sizes", "told the times"
PEERS = ("boosted trees on residual", "LinTS")
WORLDS = ("queueing", "table")
FULL, QUICK = (10, 50, 100), (1, 16, 20)
# Beyond the noise of measured times: mean batches are measured with an error, and are not the batches' mean time.
BATCH_SD = 0.05
OUTLIER_SHARE = 0.05
# Exact inference is surprised less easily: its variances are larger. What changes is the device and its variants.
CHANGED_Z, CHANGED_VARIANT_SD = 1.7, 0.15
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


class ExactCalibration(Calibration):
    """Ours, but for the service time, whose effects are jointly inferred: one covariance for a class and its
    devices."""

    def __init__(self, world: SimulatedWorld) -> None:
        super().__init__()
        self._world = world
        self._classes: dict[str, Gaussian] = {}
        self._designs: dict[str, Indices] = {}
        self._surprise: dict[str, float] = {}

    def correction(self, context: Context, effects: EffectTable) -> Correction:
        """What is known about all actions of the world."""
        known = super().correction(context, effects)
        mean, variance = known.mean.copy(), known.variance.copy()
        mean[0], variance[0] = self._of_class(context).sums(self._design(context))
        return Correction(mean, variance)

    def _known(self, quantity: str, interaction: Interaction) -> float:
        if quantity != SERVICE:
            return super()._known(quantity, interaction)
        mean, _ = self._of_class(interaction.context).sums(self._design(interaction.context)[[interaction.chosen]])
        return float(mean[0])

    def _step(self, quantity: str, interaction: Interaction, log_ratio: float, noise: float) -> bool:
        if quantity != SERVICE:
            return super()._step(quantity, interaction, log_ratio, noise)
        row = self._design(interaction.context)[interaction.chosen]
        self._infer(interaction, self._of_class(interaction.context), row, log_ratio)
        return True

    def _infer(self, interaction: Interaction, known: Gaussian, row: Indices, came: float) -> None:
        """One lease; who surprises twice on the same side may have changed by as much."""
        device, told = interaction.context.device, LEASE_SD[SERVICE] ** 2
        (mean,), (variance,) = known.sums(row[None])
        innovation = came - mean
        z = innovation / math.sqrt(variance + told)
        surprise = 0.5 * self._surprise.get(device, 0.0) + 0.5 * min(max(z, -OUTLIER_Z), OUTLIER_Z)
        self._surprise[device] = surprise
        if abs(surprise) > CHANGED_Z:
            self._surprise[device] = 0.0
            known.shift(("device", device), 0.0, innovation**2)
            for digest in self._digests():
                known.shift(("device", device, digest), 0.0, CHANGED_VARIANT_SD**2)
            _, (variance,) = known.sums(row[None])
        # An outlier is as noisy as makes it none.
        believed = min(1.0, OUTLIER_Z**2 * (variance + told) / max(innovation**2, 1e-12))
        known.learn(row, came, told / believed)

    def _of_class(self, context: Context) -> Gaussian:
        return self._classes.setdefault(context.device_class, Gaussian())

    def _design(self, context: Context) -> Indices:
        """Which effects each action has, shape (actions, effects)."""
        found = self._designs.get(context.device)
        if found is None:
            place = self._of_class(context).place
            rows = [
                [place(name, sd) for name, sd in self._effects(context.device, action).items()]
                for action in self._world.actions
            ]
            found = self._designs[context.device] = np.array(rows, dtype=np.intp)
        return found

    def _effects(self, device: str, action: Action) -> dict[Hashable, float]:
        """Names and standard deviations before anything is known."""
        digest, bounds = action.variant.digest, action.configuration
        names: dict[str, tuple[Hashable, ...]] = {
            OVERALL: (),
            PRECISION: (PRECISION, action.variant.precision),
            VARIANT: (digest,),
            BATCH: (BATCH, bounds.max_batch),
            CALLERS: (CALLERS, bounds.max_concurrency),
            THREADS: (THREADS, bounds.threads),
        }
        sizes = PRIOR_SD[SERVICE]
        of_class: dict[Hashable, float] = {("class", *name): sizes[kind][1] for kind, name in names.items()}
        return of_class | {("device", device, *name): sizes[kind][2] for kind, name in names.items()}

    def _digests(self) -> set[str]:
        return {action.variant.digest for action in self._world.actions}


class InformedCalibration(ExactCalibration):
    """Exact inference that is told the sizes of all offsets, when devices change, and what other conditions do."""

    def __init__(self, world: SimulatedWorld) -> None:
        super().__init__(world)
        self._asked = _Asked(world)

    def correction(self, context: Context, effects: EffectTable) -> Correction:
        """As it is known at this step; asked once per device and step."""
        step, raw_ms = self._asked.step_and_raw_ms(context)
        if step == self._world.drift_step and self._world.updated[_device(context)]:
            self._update(context)
        known = super().correction(context, effects)
        known.mean[0] += self._conditions(context, step, raw_ms)
        return known

    def _known(self, quantity: str, interaction: Interaction) -> float:
        known = super()._known(quantity, interaction)
        return known + self._condition_then(interaction) if quantity == SERVICE else known

    def _infer(self, interaction: Interaction, known: Gaussian, row: Indices, came: float) -> None:
        """One lease; which outliers there are is told as well: the likelier of both is taken for true."""
        came -= self._condition_then(interaction)
        (mean,), (variance,) = known.sums(row[None])
        told = self._world.plan.hidden.latency_noise_sd**2 + BATCH_SD**2
        slow = math.log(OUTLIER_FACTOR)
        plain, odd = (((came - mean - off) ** 2) / (variance + told) for off in (0.0, slow))
        is_outlier = math.log(OUTLIER_SHARE / (1 - OUTLIER_SHARE)) - odd / 2 > -plain / 2
        known.learn(row, came - slow * is_outlier, told)

    def _condition_then(self, interaction: Interaction) -> float:
        conditions = self._conditions(interaction.context, _step_of(interaction), _raw_ms(interaction))
        return float(conditions[interaction.chosen])

    def _conditions(self, context: Context, step: int, raw_ms: Floats | float) -> Floats:
        """Log of what heat, other processes and further callers do, over what our prediction takes them to do."""
        slowdown = self._world.slowdown(step)[_device(context)]
        return np.asarray(np.log(slowdown * self._asked.undisturbed_ms(context) / raw_ms))

    def _effects(self, device: str, action: Action) -> dict[Hashable, float]:
        hidden, digest, bounds = self._world.plan.hidden, action.variant.digest, action.configuration
        return {
            ("class",): hidden.class_sd,
            ("class", digest): hidden.class_variant_sd,
            ("profile", digest, bounds.threads): hidden.profile_sd,
            ("device", device): hidden.device_sd,
            ("device", device, digest): hidden.device_variant_sd,
            ("device", device, bounds.max_batch, bounds.max_concurrency): hidden.device_configuration_sd,
        }

    def _update(self, context: Context) -> None:
        """An update is slower three times in four: its mean and variance are told, not its size."""
        hidden, known = self._world.plan.hidden, self._of_class(context)
        mean = 0.5 * hidden.update_sd * math.sqrt(2 / math.pi)
        known.shift(("device", context.device), mean, hidden.update_sd**2 - mean**2)
        for digest in self._digests():
            known.shift(("device", context.device, digest), 0.0, hidden.update_variant_sd**2)


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
        mean[0], variance[0] = np.log(self._world.alone_ms(step)[_device(context)] / raw_ms), 0.0
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
        self._steps = [-1] * world.device_count
        self._undisturbed: dict[int, Floats] = {}

    def step_and_raw_ms(self, context: Context) -> tuple[int, Floats]:
        """The next step, and the time of one request alone as predicted, shape (actions,)."""
        device = _device(context)
        self._steps[device] += 1
        return self._steps[device], self._alone_ms(context)

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
    EXACT: ExactCalibration,
    SIZES: InformedCalibration,
    TIMES: ToldCalibration,
}


def lines_of(world: str, rows: Mapping[tuple[str, str], list[Outcome]]) -> dict[str, dict[str, float]]:
    """Print the table of one world; what the last line says of it."""
    qoe = {key: np.array([each.qoe_pct for each in found]) for key, found in rows.items()}
    regret = {key: 100 - float(values.mean()) for key, values in qoe.items()}
    boosted, without = (regret[LEARNT, name] for name in PEERS)
    print(f"\nworld {world}: {len(next(iter(rows.values())))} seeds")
    columns = f"{'QoE %':>7}{'±':>6}{'after 5':>9}{'SLO misses':>12}{'budget viol.':>14}{'/ with':>8}{'/ without':>11}"
    print(f"{'':<48}{columns}")
    for (knowledge, name), found in rows.items():
        key = knowledge, name
        after_5 = np.mean([each.after_5_pct for each in found])
        missed = np.mean([each.slo_missed_pct for each in found])
        below = np.mean([each.budget_violations_pct for each in found])
        label = name if name in PEERS else f"{name}, {knowledge}"
        print(
            f"{label:<48}{qoe[key].mean():>7.2f}{half_width(qoe[key]):>6.2f}{after_5:>9.2f}{missed:>12.2f}"
            f"{below:>14.1f}{regret[key] / boosted:>8.2f}{regret[key] / without:>11.2f}"
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
    kinds = [*((each, OURS) for each in _KNOWLEDGE), (SIZES, CALIBRATED), (TIMES, CALIBRATED)]
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
