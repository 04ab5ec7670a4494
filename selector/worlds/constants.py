"""The constants of the simulated worlds: for each kind one instance for tuning and one that is reported.

Both instances of a kind are alike in structure and differ in every number; seeds are disjoint as well. The reported
instances are fixed: a test holds their digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from selector.errors import InvalidInput
from selector.interactions import Configuration
from selector.reward import QoeFormula
from selector.worlds.fleets import Application, DeviceClass, Turbulence
from selector.worlds.hidden import Hidden, Tastes
from selector.worlds.simulated import Plan, SimulatedWorld
from selector.worlds.timings import Member, TableRow, formula_timing, table_timing

TUNING_SEEDS = range(100, 200)
REPORTED_SEEDS = range(1000, 1100)
FORMULA_CONFIGURATIONS = tuple(
    Configuration(batch, callers, 1) for batch in (1, 2, 4, 8, 16, 32) for callers in (1, 2, 4)
)


@dataclass(frozen=True, slots=True)
class FormulaWorld:
    """A plan, a family of variants, and how batches behave: the shares of a fixed cost, and the cache cliff."""

    plan: Plan
    members: tuple[Member, ...]
    fixed_shares: tuple[float, ...]
    cliff: float
    seed: int


@dataclass(frozen=True, slots=True)
class TableWorld:
    """A plan, variants named in a measured table, and each class's CPU quota."""

    plan: Plan
    members: tuple[Member, ...]
    quotas: tuple[float, ...]


def _family(
    scale: float, spread: float, accuracies: tuple[float, float, float, float], new: tuple[str, str], gone: str
) -> tuple[Member, ...]:
    """Four sizes in three precisions; two come later, one is withdrawn."""
    sizes = (("large", 60.0 * spread**2, 160), ("medium", 24.0 * spread, 50), ("small", 8.0, 14), ("tiny", 2.2, 4))
    loss = {"fp32": 0.0, "fp16": 0.001, "int8": 0.008}
    share = {"fp32": 1.0, "fp16": 0.5, "int8": 0.27}
    return tuple(
        Member(
            name=f"{size}-{precision}",
            one_ms=scale * one_ms,
            accuracy=accuracy - loss[precision],
            precision=precision,
            size_bytes=int(megabytes * share[precision] * 1e6),
            memory_bytes=int((3.0 * megabytes * share[precision] + 18) * 1e6),
            available_from=0.4 if f"{size}-{precision}" in new else 0.0,
            available_until=0.75 if f"{size}-{precision}" == gone else 1.0,
        )
        for (size, one_ms, megabytes), accuracy in zip(sizes, accuracies, strict=True)
        for precision in ("fp32", "fp16", "int8")
    )


_NEW, _GONE = ("medium-int8", "small-fp16"), "medium-fp16"

QUEUEING_TUNING = FormulaWorld(
    plan=Plan(
        classes=(
            DeviceClass("server", 0.16, 0.30, 1.20, 8, 3e9, 0.05, 0.40, 6.5),
            DeviceClass("notebook", 0.33, 0.55, 1.25, 4, 1.0e9, 0.30, 0.45, 3.0),
            DeviceClass("box", 0.60, 0.60, 0.95, 4, 6e8, 0.20, 0.60, 1.7),
            DeviceClass("handset", 0.80, 0.50, 0.60, 6, 5e8, 0.50, 0.65, 1.2),
            DeviceClass("slate", 1.30, 0.65, 0.70, 4, 3.0e8, 0.40, 0.75, 0.8),
            DeviceClass("single-board", 1.80, 1.00, 1.10, 4, 2.5e8, 0.55, 0.75, 0.5),
            DeviceClass("doorbell", 3.30, 1.40, 1.40, 2, 1.5e8, 0.35, 0.85, 0.24),
            DeviceClass("sensor", 4.40, 1.70, 1.80, 1, 7e7, 0.15, 0.95, 0.13),
        ),
        applications=(
            Application("alarms", QoeFormula(1, 3.2, 0.9, 0.3, 1.1, 48.0, 0.68, 22.0), 22.0),
            Application("reading", QoeFormula(1, 5.2, 2.8, 0.2, 1.0, 130.0, 0.68, 45.0), 42.0),
            Application("sorting", QoeFormula(1, 2.6, 1.0, 1.7, 0.8, 280.0, 0.68, 11.0), 75.0),
        ),
        turbulence=Turbulence(0.95, 0.35, 0.10, 2.9, 0.22, 0.65),
        hidden=Hidden(class_sd=0.2, device_sd=0.58, class_variant_sd=0.27, device_variant_sd=0.25),
        tastes=Tastes(weights_sd=0.25, noise_sd=0.14),
    ),
    members=_family(1.05, 2.0, (0.95, 0.90, 0.815, 0.70), _NEW, _GONE),
    fixed_shares=(0.08, 0.25, 0.45, 0.6),
    cliff=1.3,
    seed=5,
)
QUEUEING_REPORTED = FormulaWorld(
    plan=Plan(
        classes=(
            DeviceClass("workstation", 0.13, 0.36, 1.30, 8, 3.4e9, 0.05, 0.35, 7.7),
            DeviceClass("laptop", 0.27, 0.45, 1.15, 4, 1.3e9, 0.25, 0.50, 3.7),
            DeviceClass("mini-pc", 0.50, 0.70, 1.00, 4, 7e8, 0.15, 0.55, 2.0),
            DeviceClass("phone", 0.70, 0.42, 0.55, 6, 4.3e8, 0.60, 0.70, 1.4),
            DeviceClass("tablet", 1.10, 0.75, 0.60, 4, 3.4e8, 0.45, 0.65, 0.9),
            DeviceClass("board", 2.10, 0.90, 1.05, 4, 2.6e8, 0.50, 0.80, 0.5),
            DeviceClass("camera", 3.80, 1.25, 1.60, 2, 1.4e8, 0.30, 0.90, 0.22),
            DeviceClass("hub", 4.80, 1.90, 1.70, 1, 7e7, 0.20, 1.00, 0.12),
        ),
        applications=(
            Application("alarms", QoeFormula(1, 3.4, 0.95, 0.3, 1.0, 50.0, 0.68, 20.0), 28.0),
            Application("reading", QoeFormula(1, 5.6, 2.9, 0.2, 1.0, 130.0, 0.68, 50.0), 48.0),
            Application("sorting", QoeFormula(1, 2.7, 1.0, 1.6, 0.75, 300.0, 0.68, 10.0), 95.0),
        ),
        turbulence=Turbulence(0.9, 0.3, 0.12, 2.8, 0.25, 0.65),
        hidden=Hidden(class_sd=0.25, device_sd=0.6, class_variant_sd=0.32, device_variant_sd=0.25),
        tastes=Tastes(weights_sd=0.25, noise_sd=0.14),
    ),
    members=_family(1.05, 2.0, (0.955, 0.90, 0.815, 0.69), _NEW, _GONE),
    fixed_shares=(0.05, 0.2, 0.4, 0.65),
    cliff=1.35,
    seed=11,
)

# Here ratings decide: they weigh nearly as much as latency, and timing is known from each device's own profile.
QUIRKS_TUNING = FormulaWorld(
    plan=Plan(
        classes=QUEUEING_TUNING.plan.classes,
        applications=(
            Application("captions", QoeFormula(1, 2.7, 1.0, 0.3, 2.4, 55.0, 0.68, 22.0), 19.0),
            Application("sorting", QoeFormula(1, 3.2, 1.4, 0.3, 2.8, 130.0, 0.68, 45.0), 34.0),
            Application("counting", QoeFormula(1, 2.4, 0.9, 1.0, 2.2, 300.0, 0.68, 28.0), 66.0),
        ),
        turbulence=Turbulence(0.8, 0.3, 0.10, 2.6, 0.20, 0.6),
        hidden=Hidden(0.08, 0.16, 0.08, 0.06, 0.04, 0.3, 0.12, 0.1, 0.05),
        tastes=Tastes(0.26, 0.11, 0.05, 0.17, 0.35, 0.02, 0.35, 0.27, 0.09),
        profiled_by_device=True,
    ),
    members=_family(1.0, 2.0, (0.95, 0.90, 0.82, 0.70), _NEW, _GONE),
    fixed_shares=(0.08, 0.25, 0.45, 0.6),
    cliff=1.3,
    seed=17,
)
QUIRKS_REPORTED = FormulaWorld(
    plan=Plan(
        classes=QUEUEING_REPORTED.plan.classes,
        applications=(
            Application("captions", QoeFormula(1, 2.8, 0.9, 0.3, 2.4, 52.0, 0.68, 20.0), 24.0),
            Application("sorting", QoeFormula(1, 3.2, 1.4, 0.3, 2.8, 140.0, 0.68, 50.0), 44.0),
            Application("counting", QoeFormula(1, 2.4, 0.9, 1.0, 2.2, 320.0, 0.68, 30.0), 84.0),
        ),
        turbulence=Turbulence(0.8, 0.3, 0.10, 2.5, 0.20, 0.6),
        hidden=Hidden(0.08, 0.15, 0.08, 0.06, 0.04, 0.3, 0.12, 0.1, 0.05),
        tastes=Tastes(0.30, 0.11, 0.05, 0.17, 0.38, 0.02, 0.35, 0.30, 0.09),
        profiled_by_device=True,
    ),
    members=_family(1.0, 2.0, (0.95, 0.895, 0.82, 0.695), _NEW, _GONE),
    fixed_shares=(0.05, 0.2, 0.4, 0.65),
    cliff=1.35,
    seed=23,
)


def _measured(accuracies: tuple[float, ...]) -> tuple[Member, ...]:
    """The measured variants; accuracies are made up so that sizes differ in it as they do in larger tasks."""
    return (
        Member("digits-large-fp32", 5.5, accuracies[0], "fp32", 4_046_000, 130_000_000),
        Member("digits-large-int8", 1.5, accuracies[0] - 0.002, "int8", 1_060_000, 70_000_000, 0.4),
        Member("digits-large-int8-dynamic", 5.0, accuracies[0] - 0.003, "int8", 1_060_000, 75_000_000),
        Member("digits-medium-fp32", 0.66, accuracies[1], "fp32", 1_230_000, 60_000_000),
        Member("digits-medium-int8", 0.21, accuracies[1] - 0.001, "int8", 330_000, 42_000_000, 0.0, 0.75),
        Member("digits-medium-int8-dynamic", 0.72, accuracies[1] - 0.002, "int8", 330_000, 45_000_000),
        Member("digits-small-fp32", 0.02, accuracies[2], "fp32", 50_000, 17_000_000),
        Member("digits-small-int8", 0.03, accuracies[2] - 0.004, "int8", 20_000, 16_000_000, 0.4),
        Member("parity-dense-fp32", 0.75, accuracies[3], "fp32", 33_650_000, 75_000_000),
        Member("parity-dense-int8-dynamic", 0.11, accuracies[3] - 0.015, "int8", 8_450_000, 34_000_000),
    )


TABLE_TUNING = TableWorld(
    plan=Plan(
        classes=(
            DeviceClass("blade", 1.2, cores=2, memory_bytes=3.4e8, heating=0.05, sharing=0.3, traffic=3.5),
            DeviceClass("desk", 2.6, cores=2, memory_bytes=2.6e8, heating=0.2, sharing=0.5, traffic=1.6),
            DeviceClass("counter", 1.1, cores=2, memory_bytes=1.9e8, heating=0.1, sharing=0.4, traffic=1.9),
            DeviceClass("display", 3.2, cores=2, memory_bytes=1.1e8, heating=0.3, sharing=0.6, traffic=0.7),
            DeviceClass("bridge", 1.0, cores=2, memory_bytes=1.0e8, heating=0.2, sharing=0.5, traffic=1.1),
            DeviceClass("reader", 3.2, cores=2, memory_bytes=7e7, heating=0.4, sharing=0.7, traffic=0.4),
            DeviceClass("counter-small", 1.6, cores=2, memory_bytes=5.5e7, heating=0.2, sharing=0.6, traffic=0.4),
            DeviceClass("tag", 3.8, cores=2, memory_bytes=3.8e7, heating=0.3, sharing=0.8, traffic=0.13),
        ),
        applications=(
            Application("reading", QoeFormula(1, 3.8, 1.3, 0.3, 0.0, 26.0, 0.72, 4.0), 75.0),
            Application("checking", QoeFormula(1, 4.3, 2.9, 0.3, 0.0, 75.0, 0.72, 8.0), 125.0),
            Application("archiving", QoeFormula(1, 2.7, 1.2, 1.7, 0.0, 190.0, 0.72, 5.0), 290.0),
        ),
        turbulence=Turbulence(0.9, 0.35, 0.10, 3.2, 0.22, 0.7),
        hidden=Hidden(0.24, 0.6, 0.24, 0.25, 0.05, 0.45, 0.2, accuracy_noise_sd=0.027),
        tastes=Tastes(),
    ),
    members=_measured((0.955, 0.91, 0.785, 0.868)),
    quotas=(0.0, 0.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25),
)
TABLE_REPORTED = TableWorld(
    plan=Plan(
        classes=(
            DeviceClass("rack", 1.0, cores=2, memory_bytes=3.6e8, heating=0.05, sharing=0.3, traffic=4.0),
            DeviceClass("kiosk", 3.0, cores=2, memory_bytes=2.7e8, heating=0.2, sharing=0.5, traffic=1.5),
            DeviceClass("till", 1.0, cores=2, memory_bytes=1.8e8, heating=0.1, sharing=0.4, traffic=2.0),
            DeviceClass("panel", 3.0, cores=2, memory_bytes=1.1e8, heating=0.3, sharing=0.6, traffic=0.8),
            DeviceClass("gateway", 1.2, cores=2, memory_bytes=9e7, heating=0.2, sharing=0.5, traffic=1.0),
            DeviceClass("scanner", 3.5, cores=2, memory_bytes=7.2e7, heating=0.4, sharing=0.7, traffic=0.35),
            DeviceClass("meter", 1.4, cores=2, memory_bytes=5.4e7, heating=0.2, sharing=0.6, traffic=0.4),
            DeviceClass("badge", 4.0, cores=2, memory_bytes=3.6e7, heating=0.3, sharing=0.8, traffic=0.12),
        ),
        applications=(
            Application("reading", QoeFormula(1, 3.7, 1.3, 0.3, 0.0, 22.0, 0.72, 4.0), 80.0),
            Application("checking", QoeFormula(1, 4.2, 3.0, 0.3, 0.0, 60.0, 0.72, 8.0), 120.0),
            Application("archiving", QoeFormula(1, 2.7, 1.2, 1.8, 0.0, 200.0, 0.72, 5.0), 300.0),
        ),
        turbulence=Turbulence(0.9, 0.3, 0.12, 3.0, 0.25, 0.7),
        hidden=Hidden(0.27, 0.62, 0.3, 0.25, 0.05, 0.45, 0.2, accuracy_noise_sd=0.025),
        tastes=Tastes(),
    ),
    members=_measured((0.959, 0.912, 0.78, 0.87)),
    quotas=(0.0, 0.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25),
)

WORLDS: Mapping[str, FormulaWorld | TableWorld] = {
    "queueing": QUEUEING_REPORTED,
    "table": TABLE_REPORTED,
    "quirks": QUIRKS_REPORTED,
    "queueing-tuning": QUEUEING_TUNING,
    "table-tuning": TABLE_TUNING,
    "quirks-tuning": QUIRKS_TUNING,
}


def make_world(
    name: str,
    seed: int,
    devices: int = 50,
    steps: int = 100,
    rows: tuple[TableRow, ...] = (),
) -> SimulatedWorld:
    """The world of this name; one whose name ends in ``-tuning`` is for tuning. Table worlds need measured ``rows``."""
    if name not in WORLDS:
        raise InvalidInput("name", f"must be one of {', '.join(WORLDS)}, is {name[:40]!r}")
    constants = WORLDS[name]
    plan = constants.plan
    if isinstance(constants, TableWorld):
        timing = table_timing(plan.classes, constants.quotas, constants.members, rows)
    else:
        timing = formula_timing(
            classes=plan.classes,
            members=constants.members,
            configurations=FORMULA_CONFIGURATIONS,
            fixed_shares=constants.fixed_shares,
            cliff=constants.cliff,
            seed=constants.seed,
        )
    return SimulatedWorld(name, plan, timing, seed=seed, devices=devices, steps=steps)
