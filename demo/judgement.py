"""What a measured grid says about the demo's promises. Pure; the grid is measured by `grid.py`."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from demo.grid import Cell

P95_RATIO, BEST_ACTIONS, FIXED_GAP, CPU_SHARE = 3.0, 3, 0.05, 0.60
# Two actions this close are equally good: measuring again could turn them round.
TIE = 0.02

Grid = Mapping[str, Mapping[str, Cell]]


@dataclass(frozen=True)
class Finding:
    """One promise, and what was measured."""

    name: str
    promise: str
    value: float
    is_kept: bool
    detail: str


def judge(grid: Grid) -> list[Finding]:
    """The promises about how the devices differ."""
    key, ratio = largest_ratio(grid)
    needed = fewest_covering(grid)
    fixed, gap = fixed_gap(grid)
    return [
        Finding(
            "p95_ratio",
            "the same variant's p95 differs at least threefold",
            ratio,
            ratio >= P95_RATIO,
            f"{ratio:.1f}× with {key}",
        ),
        Finding(
            "best_actions",
            f"at least three different best actions (within {TIE} is a tie)",
            len(needed),
            len(needed) >= BEST_ACTIONS,
            "; ".join(needed),
        ),
        Finding(
            "fixed_gap",
            "the best single fixed action is at least 0.05 QoE below the best per device",
            gap,
            gap >= FIXED_GAP,
            f"{gap:.3f} with {fixed}",
        ),
    ]


def cpu_finding(share: float) -> Finding:
    return Finding(
        "baseline_cpu_share",
        "with the safe baseline everywhere at most 60 % of two cores",
        share,
        share <= CPU_SHARE,
        f"{share:.0%}",
    )


def largest_ratio(grid: Grid) -> tuple[str, float]:
    """The action whose p95 differs most between the fastest and the slowest device."""
    ratios = {
        key: max(row[key].p95_ms for row in grid.values()) / min(row[key].p95_ms for row in grid.values())
        for key in next(iter(grid.values()))
    }
    key = max(ratios, key=lambda each: ratios[each])
    return key, ratios[key]


def best(row: Mapping[str, Cell]) -> str:
    return max(row, key=lambda key: row[key].qoe)


def fewest_covering(grid: Grid) -> tuple[str, ...]:
    """The fewest actions among which every device finds one as good as its best."""
    good = {device: {key for key in row if row[key].qoe >= row[best(row)].qoe - TIE} for device, row in grid.items()}
    keys = sorted(set().union(*good.values()))
    for count in range(1, len(grid) + 1):
        for chosen in itertools.combinations(keys, count):
            if all(good[device] & set(chosen) for device in grid):
                return chosen
    return ()


def fixed_gap(grid: Grid) -> tuple[str, float]:
    """The best action for all devices alike, and how much QoE it loses against the best per device."""
    means = {key: statistics.fmean(row[key].qoe for row in grid.values()) for key in next(iter(grid.values()))}
    fixed = max(means, key=lambda key: means[key])
    return fixed, statistics.fmean(row[best(row)].qoe for row in grid.values()) - means[fixed]


def table(grid: Grid) -> str:
    """QoE and p95 in milliseconds of every action on every device; the best of a device has a star."""
    keys = list(next(iter(grid.values())))
    width = max(map(len, keys))
    lines = [" " * width + "".join(f"{device:>16}" for device in grid)]
    for key in keys:
        cells = []
        for row in grid.values():
            star = "*" if key == best(row) else " "
            cells.append(f"{row[key].qoe:>7.3f}{star}{row[key].p95_ms:>6.0f}ms")
        lines.append(f"{key:<{width}}" + "".join(cells))
    return "\n".join(lines)
