"""Tables, summaries and targets of `python -m benchmarks.selection`; definitions are in its docstring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.contenders import ANALYTIC, CALIBRATED, HOSTED, OURS, PREFERENCES, WITHOUT_VW
from benchmarks.selection_runs import STRESSED, UNGUARDED, Outcome
from selector.worlds.hardness import Hardness

RECOVERED_PCT = 98.0
SMOOTHED_STEPS = 3
RECOVERY_DECISIONS = 10
# A world counts if none of these is missed.
BOUNDS = {"random": 60.0, "best fixed": 90.0, "best per class": 96.0, "analytic": 94.0}
LEAST_CHANGED_PCT = 25.0
# Worlds in which preferences and quirks show only in ratings.
RATED_WORLDS = ("quirks", "quirks-tuning")
EQUAL_POINTS = 0.3


class WorldReport:
    """All outcomes of one world and size of fleet."""

    def __init__(self, world: str, rows: Sequence[Outcome], hard: Sequence[Hardness]) -> None:
        self.world, self._hard = world, hard
        self._rows: dict[str, list[Outcome]] = {}
        for row in rows:
            self._rows.setdefault(row.name, []).append(row)

    def has(self, name: str) -> bool:
        """Whether this contender played."""
        return name in self._rows

    def values(self, name: str, field: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """One number per seed, in the order of the seeds."""
        return np.array([getattr(row, field) for row in self._rows[name]], dtype=np.float64)

    def mean(self, name: str, field: str) -> float:
        """Mean over seeds."""
        return float(self.values(name, field).mean())

    def reference(self, field: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """One number of the hardness row per seed."""
        return np.array([getattr(each, field) for each in self._hard], dtype=np.float64)

    def learning_peers(self, *, with_prediction: bool | None = None) -> list[str]:
        """Names of those that learn without our calibration."""
        return [
            name
            for name, (row, *_) in self._rows.items()
            if row.role in ("peer", "hosted") and (with_prediction is None or row.uses_prediction == with_prediction)
        ]

    def best(self, names: Sequence[str]) -> str | None:
        """The name with the highest QoE."""
        played = [name for name in names if self.has(name)]
        return max(played, key=lambda name: self.mean(name, "qoe_pct")) if played else None

    def recovery(self, name: str, field: str = "drift_pct") -> int | None:
        """Decisions per device until back within 2 points of the oracle; None if not within the run."""
        pooled = np.mean([getattr(row, field) for row in self._rows[name]], axis=0)
        width = min(SMOOTHED_STEPS, len(pooled))
        smooth = np.convolve(pooled, np.ones(width) / width, mode="valid")
        back = np.flatnonzero(smooth >= RECOVERED_PCT)
        return int(back[0]) if len(back) else None

    def hardness_row(self) -> dict[str, float]:
        """The bounds' numbers, in %."""
        row = {
            "random": float(self.reference("random_pct").mean()),
            "best fixed": float(self.reference("best_fixed_pct").mean()),
            "best per class": float(self.reference("best_per_class_pct").mean()),
            "changed": float(self.reference("changed_pct").mean()),
        }
        return row | ({"analytic": self.mean(ANALYTIC, "qoe_pct")} if self.has(ANALYTIC) else {})

    def is_hard(self) -> bool | None:
        """Whether the world meets every bound; None if the analytic reference was not played."""
        row = self.hardness_row()
        if "analytic" not in row:
            return None
        return row["changed"] >= LEAST_CHANGED_PCT and all(row[name] <= bound for name, bound in BOUNDS.items())

    def show(self, steps: int) -> None:
        """Print the table and the hardness row."""
        first = next(iter(self._rows.values()))
        print(f"\nworld {self.world}: {first[0].devices} devices x {steps} decisions, {len(first)} seeds")
        print(
            f"{'':<34}{'QoE %':>7}{'±':>6}{'after 5':>9}{'last 20':>9}{'SLO misses':>12}{'out of mem':>12}"
            f"{'recovery':>14}{'budget viol.':>14}{'µs':>7}"
        )
        for name in sorted(self._rows, key=lambda each: -self.mean(each, "qoe_pct")):
            self._show_row(name)
        for label, field in (("best fixed per device, hindsight", "best_per_device_pct"), ("baseline", "baseline_pct")):
            print(f"{label:<34}{self.reference(field).mean():>7.2f}{half_width(self.reference(field)):>6.2f}")
        print(f"oracle misses the SLO in {self.reference('oracle_slo_missed_pct').mean():.2f} % of its decisions")
        row, hard = self.hardness_row(), self.is_hard()
        bounds = ", ".join(f"{name} {row[name]:.1f} (<= {bound:g})" for name, bound in BOUNDS.items() if name in row)
        says = "not known" if hard is None else "hard enough" if hard else "NOT hard enough, does not count"
        print(f"hardness: {bounds}, changed {row['changed']:.0f} (>= {LEAST_CHANGED_PCT:g}): {says}")

    def _show_row(self, name: str) -> None:
        qoe = self.values(name, "qoe_pct")
        fields = ("after_5_pct", "last_20_pct", "slo_missed_pct", "out_of_memory_pct")
        after_5, last_20, missed, memory = (self.mean(name, field) for field in fields)
        everyone, updated = (_steps(self.recovery(name, field)) for field in ("drift_pct", "drift_updated_pct"))
        budget = f"{self.mean(name, 'budget_violations_pct'):.1f}{'!' if self._fleet_violates(name) else ''}"
        print(
            f"{name:<34}{qoe.mean():>7.2f}{half_width(qoe):>6.2f}{after_5:>9.2f}{last_20:>9.2f}{missed:>12.2f}"
            f"{memory:>12.2f}{f'{everyone} ({updated})':>14}{budget:>14}{self.mean(name, 'microseconds'):>7.0f}"
        )

    def _fleet_violates(self, name: str) -> bool:
        return any(row.fleet_violates for row in self._rows[name])

    def summary(self) -> dict[str, Any]:
        """The object of the last line; None for what was not played."""
        hosted = HOSTED if self.has(HOSTED) else None
        stressed = self._paired(OURS, STRESSED)
        ablation = self.best((CALIBRATED, PREFERENCES))
        lift = self.values(OURS, "qoe_pct") - self.reference("best_per_class_pct") if self.has(OURS) else None
        return {
            "ours_pct": self._rounded(OURS, "qoe_pct"),
            "ours_pct_after_5": self._rounded(OURS, "after_5_pct"),
            "ablation_no_vw_pct": self._rounded(ablation, "qoe_pct"),
            "random_pct": _rounded(self.hardness_row()["random"]),
            "best_fixed_pct": _rounded(self.hardness_row()["best fixed"]),
            "best_per_class_pct": _rounded(self.hardness_row()["best per class"]),
            "analytic_pct": self._rounded(ANALYTIC, "qoe_pct"),
            "best_learner_pct": self._rounded(self.best(self.learning_peers()), "qoe_pct"),
            "hosted_default_pct": self._rounded(hosted, "qoe_pct"),
            "regret_vs_best_learner_with_prior": self._regret(self.best(self.learning_peers(with_prediction=True))),
            "regret_vs_best_learner_without_prior": self._regret(self.best(self.learning_peers(with_prediction=False))),
            "regret_vs_hosted_default": self._regret(hosted),
            "lift_over_best_per_class": None if lift is None else interval(lift),
            "slo_violation_pct": self._rounded(OURS, "slo_missed_pct"),
            "drift_recovery_decisions": self._recovery_or_all() if self.has(OURS) else None,
            "noise_loss_points": None if stressed is None else _rounded(float(stressed.mean())),
            "budget_violations_pct": self._rounded(OURS, "budget_violations_pct"),
        }

    def vw_alone(self) -> dict[str, float | None] | None:
        """Ours less the same without Vowpal Wabbit, points, with its interval; None if not played."""
        gain = self._paired(OURS, WITHOUT_VW)
        return None if gain is None else interval(gain)

    def targets(self) -> Iterator[tuple[str, bool | None, str]]:
        """Each target: what it asks, whether it is met (None: not played), and the number."""
        found = self.summary()
        yield _at_least("QoE >= 97 % of the oracle", found["ours_pct"], 97)
        yield _at_least("after 5 decisions >= 94", found["ours_pct_after_5"], 94)
        yield _at_most("regret <= 0.5x of the best learner with our prediction", found, "with_prior", 0.5)
        yield _at_most("regret <= 0.3x of the best learner without", found, "without_prior", 0.3)
        yield _at_most("regret <= 0.12x of the hosted default", found, "regret_vs_hosted_default", 0.12)
        yield from self._vowpal_targets()
        lift = found["lift_over_best_per_class"]
        known = lift is not None and lift["low"] is not None
        yield "better than best per class, interval clear of 0", lift["low"] > 0 if known else None, str(lift)
        yield _at_most("SLO misses <= 1.5 %", found, "slo_violation_pct", 1.5)
        yield self._slo_target()
        yield self._recovery_target()
        yield _at_most("budget violations <= 5 % of devices", found, "budget_violations_pct", 5.0)
        if self.has(OURS):
            violates = self._fleet_violates(OURS)
            yield "budget never violated fleet-wide", not violates, "violated" if violates else "kept"
        cost = self._paired(UNGUARDED, OURS)
        points = None if cost is None else float(cost.mean())
        yield "the guard costs <= 0.5 points", None if points is None else points <= 0.5, _points(points)
        yield _at_most("noise, missing and delay cost <= 2 points", found, "noise_loss_points", 2.0)

    def _vowpal_targets(self) -> Iterator[tuple[str, bool | None, str]]:
        for name in (CALIBRATED, PREFERENCES):
            gain = self._paired(OURS, name)
            points = None if gain is None else float(gain.mean())
            yield f"not worse than {name} by > 0.3", None if points is None else points >= -0.3, _points(points)
        if self.world in RATED_WORLDS:
            gain = self._paired(OURS, CALIBRATED)
            found = None if gain is None else interval(gain)
            is_clear = None if found is None or found["low"] is None else found["low"] > 0
            yield f"better than {CALIBRATED}, interval clear of 0", is_clear, str(found)

    def _recovery_target(self) -> tuple[str, bool | None, str]:
        """Not judged where ours is not back, but fewer decisions than that were left."""
        asked = f"back within 2 points of the oracle in <= {RECOVERY_DECISIONS} decisions"
        if not self.has(OURS):
            return asked, None, "not played"
        found, left = self.recovery(OURS), len(self._rows[OURS][0].drift_pct)
        if found is None:
            return asked, False if left > RECOVERY_DECISIONS else None, f"not within {left}"
        return asked, found <= RECOVERY_DECISIONS, str(found)

    def _slo_target(self) -> tuple[str, bool | None, str]:
        asked = "no peer at equal QoE misses the SLO less often"
        if not self.has(OURS):
            return asked, None, "not played"
        level, missed = self.mean(OURS, "qoe_pct") - EQUAL_POINTS, self.mean(OURS, "slo_missed_pct")
        better = [
            name
            for name in self.learning_peers()
            if self.mean(name, "qoe_pct") >= level and self.mean(name, "slo_missed_pct") < missed
        ]
        return asked, not better, ", ".join(better) or "none"

    def _paired(self, one: str, other: str) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        if not self.has(one) or not self.has(other):
            return None
        return np.asarray(self.values(one, "qoe_pct") - self.values(other, "qoe_pct"))

    def _recovery_or_all(self) -> int:
        """Where ours is never back, all decisions after the update: at least so many it takes."""
        found = self.recovery(OURS)
        return len(self._rows[OURS][0].drift_pct) if found is None else found

    def _regret(self, peer: str | None) -> float | None:
        if peer is None or not self.has(OURS):
            return None
        return _rounded((100 - self.mean(OURS, "qoe_pct")) / max(100 - self.mean(peer, "qoe_pct"), 1e-9))

    def _rounded(self, name: str | None, field: str) -> float | None:
        return _rounded(self.mean(name, field)) if name is not None and self.has(name) else None


def verdicts(reports: Mapping[str, WorldReport], fleet: str = "") -> Iterator[str]:
    """One line per target and world; ``fleet`` is named in each."""
    for name, report in reports.items():
        for asked, met, number in report.targets():
            yield _line(f"{name}{fleet}: {asked}", met, number)
        yield f"{'':<11}{name}{fleet}: what Vowpal Wabbit alone adds: {report.vw_alone()}"


def cost_verdicts(summary: Mapping[str, Any]) -> Iterator[str]:
    """The targets for the time of one decision."""
    for key, bound in (("decision_ms_200", 0.5), ("decision_ms_20", 0.2)):
        yield _line(f"{key} <= {bound:g}", summary[key] <= bound, f"{summary[key]:.3f}")


def megabytes_line(megabytes: float) -> str:
    """The target for the state of 10,000 devices."""
    return _line("state of 10,000 devices <= 200 MB", megabytes <= 200, f"{megabytes:.0f}")


def half_width(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Half of a 95 % t interval of the mean; NaN for one value."""
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def interval(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float | None]:
    """Mean with its 95 % t interval; one value has no interval."""
    mean, half = float(values.mean()), half_width(values)
    if np.isnan(half):
        return {"mean": _rounded(mean), "low": None, "high": None}
    return {"mean": _rounded(mean), "low": _rounded(mean - half), "high": _rounded(mean + half)}


def _at_least(asked: str, value: float | None, bound: float) -> tuple[str, bool | None, str]:
    return asked, None if value is None else value >= bound, "not played" if value is None else f"{value:.2f}"


def _at_most(asked: str, found: Mapping[str, Any], key: str, bound: float) -> tuple[str, bool | None, str]:
    value = found[key] if key in found else found[f"regret_vs_best_learner_{key}"]
    return asked, None if value is None else value <= bound, "not played" if value is None else f"{value:.3f}"


def _line(asked: str, met: bool | None, number: str) -> str:
    return f"{'met' if met else 'not judged' if met is None else 'MISSED':<11}{asked}: {number}"


def _points(points: float | None) -> str:
    return "not played" if points is None else f"{points:+.2f}"


def _steps(count: int | None) -> str:
    return "never" if count is None else str(count)


def _rounded(value: float) -> float:
    return round(value, 3)
