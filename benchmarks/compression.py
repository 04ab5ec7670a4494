"""Does one ONNX file in give honest compressed variants out, and are they better than what others make by default?

Beside ONNX Runtime's own quantisers and Olive's passes, each with every default, on five kinds of network that read the
same digits: same 256 calibration pictures, same 1 800 held-out ones, all measured in turns by one process on one
thread. Then one 10 MB model through the whole product, one of the same size with eight times the arithmetic, and more
than 200 broken or hostile files through its sandbox.

What would falsify the claim: a peer's file that is faster than all of ours (by 3 %) or more accurate (beyond the 95 %
interval of the paired difference); a recommended variant slower than the fp32 model it came from; a file that kills
or hangs the process that hands it in. The networks are small and trained by us (benchmarks/compression_models.py,
demo/training.py); the demo's CNN was widened by copying channels, which flatters pruning, so it is also judged by
int8 alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "qoe_service.settings")

from benchmarks import compression_fronts as fronts
from benchmarks import compression_hostile as hostile
from benchmarks import compression_peers as peers
from benchmarks.compression_cases import Case, cases, ten_megabytes
from demo import models
from qoe_service.catalogue.passes import FAMILY
from qoe_service.catalogue.sandboxed.runtime import instruction_sets

CASES = ("cnn", "residual", "mlp", "transformer", "recurrent")
QUICK_SAMPLES = 300
QUICK_CHAINS = {
    "cnn": ("static-int8",),
    "mlp": ("static-int8", "dynamic-int8", "prune-hard", "low-rank", "prune-hard+static-int8"),
}
MOST_POINTS_LOST = 0.005
HOSTILE, HOSTILE_QUICK = 240, 8
PARTS = ("fronts", "family", "heavy", "hostile")
NEEDS_FULL_RUN = "left out of --quick"


def calibration_loop_ms() -> float:
    """A fixed piece of pure Python: how fast this machine is just now."""
    start = time.perf_counter()
    sum(number * number for number in range(1_000_000))
    return (time.perf_counter() - start) * 1e3


def write_data(folder: Path) -> Path:
    """The demo's pictures as a data set of the catalogue."""
    data, path = models.load_data("digits"), folder / "data.npz"
    np.savez(
        path,
        calibration_inputs=data.calibration_inputs,
        heldout_inputs=data.heldout_inputs,
        heldout_labels=data.heldout_labels,
    )
    return path


def compete(case: Case, data: Path, folder: Path, *, quick: bool) -> list[fronts.Result]:
    """Everybody's files of one model, measured. Olive takes part in full runs."""
    mine, refused = peers.ours(case, data, folder, QUICK_CHAINS[case.name] if quick else FAMILY)
    others = peers.runtime_defaults(case, folder)
    others += [] if quick else peers.olive_defaults(case, data, folder)
    base = peers.Contestant("fp32", peers.BASE, case.path)
    results = fronts.measure(case, [base, *others, *mine], 0.3 if quick else 1.0)
    print(f"\n{case.name}: {len(mine)} variants of ours, {len(set(refused))} passes refused, {len(others)} of peers")
    show(results)
    return results


def show(results: Sequence[fronts.Result]) -> None:
    """One line per contestant, fastest first."""
    base = next(each for each in results if each.contestant.side == peers.BASE)
    print(f"  {'':<6}{'':<30}{'ms':>9}{'faster':>8}{'size':>7}{'accuracy':>10}  lost, 95 % interval of the difference")
    for each in sorted(results, key=lambda result: result.latency_ms):
        gain, low, high = each.gain_over(base)
        print(
            f"  {each.contestant.side:<6}{each.contestant.name:<30}{each.latency_ms:>9.4f}"
            f"{base.latency_ms / each.latency_ms:>7.2f}x{each.size_bytes / base.size_bytes:>7.2f}{each.accuracy:>10.4f}"
            f"  {-100 * gain:+.2f} points [{-100 * high:+.2f}, {-100 * low:+.2f}]"
        )


def best_int8(results: Sequence[fronts.Result], *, pruned: bool) -> fronts.Result | None:
    """The fastest 8-bit variant of ours that loses at most half a point; without pruning or with."""
    base = next(each for each in results if each.contestant.side == peers.BASE)
    chosen = [
        each
        for each in results
        if each.contestant.precision == "int8"
        and (pruned or "+" not in each.contestant.name)
        and each.accuracy >= base.accuracy - MOST_POINTS_LOST
    ]
    return min(chosen, key=lambda each: each.latency_ms, default=None)


def recommended_but_slower(results: Sequence[fronts.Result]) -> list[str]:
    """Variants that the product's own rule would recommend although they are slower than the fp32 model."""
    from qoe_service.catalogue import pareto  # noqa: PLC0415 - needs Django's models

    base = next(each for each in results if each.contestant.side == peers.BASE)
    _, _, high = _interval(base)
    points = [
        pareto.Point(
            name=each.contestant.name,
            digest=each.contestant.digest,
            accuracy=each.accuracy,
            accuracy_high=high,
            latency_ms=each.latency_ms,
            size_bytes=each.size_bytes,
            root="fp32",
        )
        for each in results
        if each.contestant.side != peers.PEER
    ]
    slower = {each.name for each in points if each.latency_ms > base.latency_ms * (1 + pareto.SAME_SPEED)}
    chosen = pareto.recommended(points)
    allowed = {each.name for each in chosen if each.accuracy > high}  # slower, but truly more accurate
    print(f"  recommended: {', '.join(each.name for each in chosen)}")
    return [each.name for each in chosen if each.name in slower - allowed]


def _interval(result: fronts.Result) -> tuple[float, float, float]:
    from qoe_service.catalogue.evaluation import wilson_interval  # noqa: PLC0415 - needs Django's models

    return result.accuracy, *wilson_interval(int(result.right.sum()), len(result.right))


def measure_family(folder: Path, data: Path, kind: str) -> dict[str, Any]:
    """A 10 MB CNN of this kind through the product with two workers."""
    place = folder / kind
    place.mkdir()
    path = place / "cnn-10-mb.onnx"
    onnx.save(ten_megabytes(kind), path)
    command = [sys.executable, "-m", "benchmarks.compression_family", str(place / "service"), str(path), str(data)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two networks, few passes, 300 held-out pictures")
    parser.add_argument("--only", action="append", choices=PARTS, help="only these parts")
    parser.add_argument("--case", action="append", help="only these networks")
    arguments = parser.parse_args()
    parts = set(arguments.only or PARTS)
    summary: dict[str, Any] = {
        "int8_speedup": None,
        "int8_accuracy_loss_points": None,
        "slower_than_fp32_recommended": None,
        "fronts": None,
        "family_seconds": None,
        "heavy_family_seconds": None,
        "refusals": None,
        "crashes": None,
    }
    summary |= {"isa": instruction_sets(), "calibration_loop_ms": round(calibration_loop_ms(), 1)}
    with tempfile.TemporaryDirectory(prefix="qoe-compression-") as name:
        folder = Path(name)
        os.environ.setdefault("DATA_DIR", str(folder / "django"))
        data = write_data(folder)
        if "fronts" in parts:
            summary |= run_fronts(folder, data, quick=arguments.quick, names=arguments.case)
        if "family" in parts and not arguments.quick:
            summary |= measure_family(folder, data, "usual")
        if "heavy" in parts and not arguments.quick:
            summary["heavy_family_seconds"] = measure_family(folder, data, "heavy")["family_seconds"]
        if "hostile" in parts:
            summary |= run_hostile(data, quick=arguments.quick)
    reason = NEEDS_FULL_RUN if arguments.quick else "not asked for"
    summary["not_run"] = {key: reason for key, value in summary.items() if value is None}
    print(json.dumps(summary))


def run_fronts(folder: Path, data: Path, *, quick: bool, names: Sequence[str] | None) -> dict[str, Any]:
    """Every case against the peers."""
    import django  # noqa: PLC0415 - the product's rule for recommending knows its models

    django.setup()
    wanted = names or (tuple(QUICK_CHAINS) if quick else CASES)
    found: dict[str, Any] = {"fronts": {}, "slower_than_fp32_recommended": 0}
    for case in cases(folder, wanted, samples=QUICK_SAMPLES if quick else None):
        place = folder / case.name
        place.mkdir()
        results = compete(case, data, place, quick=quick)
        found["fronts"][case.name] = fronts.verdict(results)
        found["slower_than_fp32_recommended"] += len(recommended_but_slower(results))
        print(f"  {found['fronts'][case.name]}")
        if case.name == "cnn":
            found |= _headline(results)
    return found


def _headline(results: Sequence[fronts.Result]) -> dict[str, Any]:
    base = next(each for each in results if each.contestant.side == peers.BASE)
    plain, pruned = best_int8(results, pruned=False), best_int8(results, pruned=True)
    if plain is None or pruned is None:
        return {"int8_speedup": 0.0}
    gain, low, high = plain.gain_over(base)
    return {
        "int8_speedup": round(base.latency_ms / plain.latency_ms, 2),
        "int8_accuracy_loss_points": round(-100 * gain, 2),
        "int8_accuracy_loss_interval": [round(-100 * high, 2), round(-100 * low, 2)],
        "int8_with_pruning_speedup": round(base.latency_ms / pruned.latency_ms, 2),
        "int8_with_pruning": pruned.contestant.name,
    }


def run_hostile(data: Path, *, quick: bool) -> dict[str, Any]:
    """Files that should be refused, and what became of them."""
    valid = (Path(models.MODELS_FOLDER) / "digits-small.onnx").read_bytes()
    count = HOSTILE_QUICK if quick else HOSTILE
    started = time.monotonic()
    outcomes = hostile.try_all(hostile.hostile_models(valid, count), data)
    print(f"\nhostile: {count} files in {time.monotonic() - started:.0f} s: {outcomes}")
    return {
        "refusals": outcomes.refusals,
        "crashes": outcomes.crashes,
        "hangs": outcomes.hangs,
        "unexplained": outcomes.unexplained,
        "hostile_files": count,
        "accepted": outcomes.accepted,
        "children_that_died": outcomes.died_inside,
    }


if __name__ == "__main__":
    main()
