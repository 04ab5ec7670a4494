"""Does delivery hold when things break: swaps under load, kill -9, network cuts, full disks, clocks, backlog, push?

Real agent processes and real sockets; the service of the fault scenarios is a small one that can be made slow, the one
of the push measurement is the product's own web process. There are no peers: no other delivery client serves a model.
What would falsify the claim: a failed request in a swap, a boot to anything but what the store says was committed, an
answer by a model whose bytes were never verified, more bytes on the line than the file and one chunk per break.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import delivery_faults as faults
from benchmarks.decision_cost import calibration_loop_ms
from benchmarks.delivery_swaps import swaps

KEYS = (
    "failed_requests_in_swaps",
    "swap_p99_ratio",
    "kills",
    "boots_to_committed",
    "unverified_served",
    "overfetch_chunks_per_break",
    "wakeup_p95_s_1000",
)


@dataclass
class Report:
    """What was found, for the table and for the last line."""

    summary: dict[str, Any] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)

    def row(self, name: str, found: str, target: str, *, holds: bool) -> None:
        """One line of the table."""
        print(f"{name:<46}{found:>34}   {target:<26}{'' if holds else 'MISSED'}", flush=True)
        if not holds:
            self.missed.append(name)


def run_swaps(folder: Path, report: Report, *, is_quick: bool) -> None:
    found = swaps(folder, count=2 if is_quick else 40)
    report.summary |= {"failed_requests_in_swaps": found.failed, "swap_p99_ratio": round(found.p99_ratio, 2)}
    report.row(
        f"swaps at {found.rate_rps:.0f} requests/s",
        f"{found.committed} of {found.swaps}, {found.failed} of {found.requests} failed",
        "all, 0 failed",
        holds=found.committed == found.swaps and not found.failed,
    )
    report.row(
        "p50, p99 while swapping (steady), ms",
        f"{found.swap_p50_ms:.1f}, {found.swap_p99_ms:.1f} ({found.steady_p50_ms:.1f}, {found.steady_p99_ms:.1f})",
        "p99 at most 2 x steady",
        holds=found.p99_ratio <= 2,
    )


def run_kills(folder: Path, report: Report, *, is_quick: bool) -> None:
    per_state, arbitrary = (1, 1) if is_quick else (20, 100)
    found = faults.kills(folder, per_state=per_state, arbitrary=arbitrary)
    _count_unverified(report, found.unverified_served)
    report.summary |= {"kills": found.kills, "boots_to_committed": found.boots_to_committed}
    reached = {state.value: found.reached[state.value] for state in faults.S}
    print("states on disk after kill -9:", ", ".join(f"{name} {count}" for name, count in reached.items()))
    report.row(
        "kill -9: fewest in one state, in all",
        f"{min(reached.values())}, {found.kills}",
        f"{per_state}, and {arbitrary} at any moment",
        holds=min(reached.values()) >= per_state,
    )
    report.row(
        "boots to the committed digest",
        f"{found.boots_to_committed} of {found.kills}",
        "all",
        holds=found.boots_to_committed == found.kills,
    )
    report.row(
        "answers by unverified models",
        f"{found.unverified_served} of {found.answers}",
        "0",
        holds=not found.unverified_served,
    )


def run_cuts(folder: Path, report: Report, *, is_quick: bool) -> None:
    downloads, cuts_each = (1, 3) if is_quick else (20, 5)
    found = faults.cuts(folder, downloads=downloads, cuts_each=cuts_each)
    _count_unverified(report, found.unverified_served)
    report.summary["overfetch_chunks_per_break"] = round(found.overfetch_chunks_per_break, 3)
    report.row(
        f"{found.cuts} network cuts: downloads that committed",
        f"{found.committed} of {found.downloads}",
        "all",
        holds=found.committed == found.downloads and found.cuts == downloads * cuts_each,
    )
    report.row(
        "bytes beyond the file, 64 KiB chunks per break",
        f"{found.overfetch_chunks_per_break:.3f}",
        "at most 1",
        holds=found.overfetch_chunks_per_break <= 1,
    )


def run_disk(folder: Path, report: Report, *, is_quick: bool) -> None:
    del is_quick
    found = {"RLIMIT_FSIZE": faults.full_disk_by_limit(folder), "tmpfs": faults.full_disk_by_tmpfs(folder)}
    for name, checks in found.items():
        _checks(report, f"full disk ({name})", checks, without="mounting a tmpfs is not permitted here")
    report.summary["full_disk_holds"] = all(all(checks.values()) for checks in found.values() if checks is not None)


def run_clocks(folder: Path, report: Report, *, is_quick: bool) -> None:
    checks = faults.clock_jumps(folder, years=(-20,) if is_quick else (-20, 10))
    _checks(report, "clock jumps", checks, without="no C compiler for the preloaded clock")
    report.summary["clock_jumps_hold"] = None if checks is None else all(checks.values())


def run_backlog(folder: Path, report: Report, *, is_quick: bool) -> None:
    found = faults.backlog(folder, records=5_000 if is_quick else 100_000)
    report.summary["ready_with_backlog_s"] = round(found.ready_s, 2)
    report.row(
        f"ready with {found.records} spooled records (without), s",
        f"{found.ready_s:.2f} ({found.ready_empty_s:.2f})",
        "below 2",
        holds=found.ready_s < 2,
    )
    report.row(
        f"drained in {found.drained_s:.0f} s: lost, repeated",
        f"{found.lost}, {found.repeated}",
        "0, 0",
        holds=not found.lost and not found.repeated,
    )


def run_push(folder: Path, report: Report, *, is_quick: bool) -> None:
    from benchmarks.fleet import ALL_BACKENDS, QUICK_BACKENDS, measure  # noqa: PLC0415 - the only part with a service

    devices, backends = (100, QUICK_BACKENDS) if is_quick else (1000, ALL_BACKENDS)
    for found in measure(folder, devices=devices, backends=backends):
        print(f"-- {found.devices} connected agents, {found.backend}")
        for name, value, limit in found.rows():
            report.row(name, f"{value:.2f}", f"at most {limit:g}", holds=value <= limit)
        if not is_quick:
            worst = max(report.summary.get("wakeup_p95_s_1000") or 0.0, found.wake_up_p95_s)
            report.summary["wakeup_p95_s_1000"] = round(worst, 3)
    if is_quick:
        report.not_run["wakeup_p95_s_1000"] = "--quick connects 100 agents"


PARTS: dict[str, Callable[..., None]] = {
    "swaps": run_swaps,
    "kills": run_kills,
    "cuts": run_cuts,
    "disk": run_disk,
    "clocks": run_clocks,
    "backlog": run_backlog,
    "push": run_push,
}
PART_OF = dict(zip(KEYS, ("swaps", "swaps", "kills", "kills", "kills", "cuts", "push"), strict=True))


def _count_unverified(report: Report, count: int) -> None:
    report.summary["unverified_served"] = report.summary.get("unverified_served", 0) + count


def _checks(report: Report, name: str, checks: dict[str, bool] | None, *, without: str) -> None:
    if checks is None:
        print(f"{name}: not run, {without}")
        report.not_run[name] = without
        return
    for what, holds in checks.items():
        report.row(f"{name}: {what}"[:80], "yes" if holds else "no", "yes", holds=holds)


def main() -> None:
    """Runs the parts that are asked for, and prints the table and the line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.delivery", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a sample of each part, within 50 s")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    options = parser.parse_args()
    chosen = [part.strip() for part in options.parts.split(",")]
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    report, started_s = Report(), time.monotonic()
    report.summary["calibration_loop_ms"] = round(calibration_loop_ms(), 2)
    print(f"{'':<46}{'found':>34}   target")
    with tempfile.TemporaryDirectory(prefix="delivery-", ignore_cleanup_errors=True) as folder:
        for part in chosen:
            PARTS[part](Path(folder), report, is_quick=options.quick)
    for key in KEYS:
        if report.summary.setdefault(key, None) is None:
            report.not_run.setdefault(key, f"--parts leaves out {PART_OF[key]}")
    report.summary |= {"took_s": round(time.monotonic() - started_s), "missed": report.missed}
    print(json.dumps(report.summary | ({"not_run": report.not_run} if report.not_run else {})))
    with suppress(BrokenPipeError):
        sys.stdout.flush()


if __name__ == "__main__":
    main()
