"""When the selector says that an action misses its SLO with probability p, how often does it?

In each simulated world the selector decides as in `benchmarks.selection`; of every closed decision, the probabilities
logged for all actions that could be taken are compared with whether the true p95 is above the SLO, and so are the same
predictions without online calibration. Shown: reliability curve, Brier score (beside that of always forecasting the
share of misses), expected calibration error. What would falsify the claim of calibrated risk: a Brier score no better
than that of the uncalibrated prediction, or a calibration error above 0.05.

All true p95 count, not only those of chosen actions: nobody chooses what looks risky, so chosen actions alone would
flatter. Risk is also shown for the chosen ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.contenders import ours
from benchmarks.latency_table import load
from selector.actions import action_table
from selector.interactions import Candidate, Context, Interaction
from selector.latency import LatencyModel
from selector.reliability import Bin, brier_score, calibration_error, reliability_curve
from selector.simulation import Contender, Feedback, play
from selector.vw import VowpalWabbitPolicy
from selector.worlds.constants import REPORTED_SEEDS, make_world
from selector.worlds.simulated import SimulatedWorld

Floats = NDArray[np.float64]
WORLDS = ("queueing", "table", "quirks")


class Recorder(VowpalWabbitPolicy):
    """Ours, keeping of each closed decision which device at which step, its context, and the risk of every action."""

    def __init__(self, world: SimulatedWorld) -> None:
        super().__init__()
        self._world = world
        self.calibrated: list[Floats] = []
        self.uncalibrated: list[Floats] = []
        self.missed: list[NDArray[np.bool_]] = []
        self.chosen: list[tuple[float, bool]] = []

    def learn(self, interaction: Interaction) -> None:
        """Note forecasts and truth, then learn."""
        step, device = (int(each) for each in interaction.decision_id.split("-")[-2:])
        candidates: Sequence[Candidate] = interaction.candidates
        feasible = np.array([each.is_feasible for each in candidates])
        risk = np.array([each.prediction.slo_violation_probability for each in candidates])
        missed = self._world.slo_missed(step)[device]
        self.calibrated.append(risk[feasible])
        self.uncalibrated.append(self._without_calibration(interaction.context, device)[feasible])
        self.missed.append(missed[feasible])
        self.chosen.append((float(risk[interaction.chosen]), bool(missed[interaction.chosen])))
        super().learn(interaction)

    def _without_calibration(self, context: Context, device: int) -> Floats:
        table = action_table(self._world.actions)
        return LatencyModel(self._world.profiles(device)).predict(context, table).slo_violation_probability


def measure(name: str, seed: int, devices: int, steps: int) -> Recorder:
    """One run of ours in one world."""
    world = make_world(name, seed, devices, steps, load()[0] if name == "table" else ())
    recorder = Recorder(world)
    plays = Contender("ours", lambda _: recorder, calibrates=True, exploration=ours().exploration)
    play(world, plays, seed, Feedback(late_share=0.0, missing_share=0.0))
    return recorder


def report(name: str, recorders: Sequence[Recorder]) -> dict[str, Any]:
    """Print one world's curve; its numbers for the last line."""
    risk = np.concatenate([each for recorder in recorders for each in recorder.calibrated])
    raw = np.concatenate([each for recorder in recorders for each in recorder.uncalibrated])
    missed = np.concatenate([each for recorder in recorders for each in recorder.missed])
    taken = [pair for recorder in recorders for pair in recorder.chosen]
    curve = reliability_curve(risk, missed)
    base = float(missed.mean())
    found = {
        "brier": brier_score(risk, missed),
        "brier_uncalibrated": brier_score(raw, missed),
        "brier_constant": base * (1 - base),
        "calibration_error": calibration_error(curve),
        "calibration_error_uncalibrated": calibration_error(reliability_curve(raw, missed)),
        "chosen_forecast_pct": 100 * float(np.mean([forecast for forecast, _ in taken])),
        "chosen_missed_pct": 100 * float(np.mean([came for _, came in taken])),
    }
    print(f"\n{name}: {len(missed):,} forecasts, {100 * base:.1f} % of them missed")
    for each in curve:
        print(f"  {_row(each)}")
    print("  " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()))
    return {key: round(value, 4) for key, value in found.items()}


def _row(each: Bin) -> str:
    numbers = f"forecast {each.forecast:.3f}  came {each.observed:.3f}  {each.count:>9,}"
    return f"{each.low:.1f}-{each.high:.1f}  {numbers}  {'#' * round(40 * each.observed)}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slo_risk", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, 20 devices, 40 decisions each")
    quick = parser.parse_args().quick
    seeds, devices, steps = (1, 20, 40) if quick else (3, 50, 100)
    summary = {
        name: report(name, [measure(name, seed, devices, steps) for seed in REPORTED_SEEDS[:seeds]]) for name in WORLDS
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
