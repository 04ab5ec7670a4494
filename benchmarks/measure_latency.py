"""How long do the demo's models take on this machine, by batch, threads, callers and CPU quota, and is it a·n + b?

Every raw sample is kept: `benchmarks/data/latency.npz` replays them in the table world of `benchmarks.selection`, which
is why no fitted line may stand between. The demo's four models run as they are and quantised to int8 (static, and
dynamic where that is what one would try), with ONNX Runtime on the CPU. A quota is a real control group; where none can
be made, quotas are left out and the run says so. What would falsify the claim "linear in the batch": an R² below 0.9.

    python -m benchmarks.measure_latency --quota 1.0 --output part.npz   # one quota, under three minutes on two cores
    python -m benchmarks.measure_latency --join part-*.npz --output benchmarks/data/latency.npz
    python -m benchmarks.measure_latency --show benchmarks/data/latency.npz
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from benchmarks.latency_table import load, save
from demo.limits import open_cpu_group
from demo.models import DemoModel, digits_models, load_data, parity_model
from selector.worlds.timings import TableRow

QUOTAS = (0.0, 1.0, 0.5, 0.25)  # cores; 0 is no limit
BATCHES, THREADS, CALLERS = (1, 2, 4, 8, 16), (1, 2), (1, 2)
CELL_SECONDS, FEWEST, MOST = 0.2, 6, 40
QUICK = {"batches": (1, 4, 16), "threads": (1,), "callers": (1,)}


class _Pictures(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime is not typed
    def __init__(self, model: DemoModel, inputs: NDArray[np.uint8]) -> None:
        rows = inputs[:64].reshape(-1, *model.input_shape)
        self._rows = iter([{model.input_name: row[None]} for row in rows])

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        return next(self._rows, None)


def variants(folder: Path) -> Iterator[tuple[str, Path, DemoModel]]:
    """Name, file and base model of everything that is measured; int8 files are written into the folder."""
    pictures = load_data("digits").calibration_inputs
    for model in (*digits_models(), parity_model(folder)):
        yield f"{model.name}-fp32", model.path, model
        static, dynamic = folder / f"{model.name}-static.onnx", folder / f"{model.name}-dynamic.onnx"
        if model.application == "digits":
            quantize_static(
                str(model.path),
                str(static),
                _Pictures(model, pictures),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            yield f"{model.name}-int8", static, model
        if model.name != "digits-small":
            quantize_dynamic(str(model.path), str(dynamic), per_channel=True, weight_type=QuantType.QUInt8)
            yield f"{model.name}-int8-dynamic", dynamic, model


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def samples(
    running: onnxruntime.InferenceSession, input_name: str, shape: tuple[int, ...], callers: int
) -> tuple[tuple[float, ...], float]:
    """Wall times in ms of single runs by ``callers`` at once, and CPU ms per run."""
    feed = {input_name: np.random.default_rng(shape[0]).integers(0, 255, shape, dtype=np.uint8)}
    running.run(None, feed)
    found: list[float] = []
    started, cpu = time.perf_counter(), time.process_time()

    def call() -> None:
        own = 0
        while own < FEWEST or (time.perf_counter() - started < CELL_SECONDS and own < MOST):
            start = time.perf_counter()
            running.run(None, feed)
            found.append((time.perf_counter() - start) * 1e3)
            own += 1

    workers = [threading.Thread(target=call) for _ in range(callers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return tuple(found), (time.process_time() - cpu) * 1e3 / len(found)


def prepare(folder: Path) -> None:
    """Write all variants and their list, before any quota slows this down."""
    listed = [(name, str(path), model.input_name, model.input_shape) for name, path, model in variants(folder)]
    (folder / "variants.json").write_text(json.dumps(listed))


def measure(folder: Path, quota: float, *, quick: bool = False) -> list[TableRow]:
    """All cells of what ``prepare`` wrote, under one quota that this process is already in."""
    cells = []
    batches, threads_tried, callers_tried = (
        (QUICK["batches"], QUICK["threads"], QUICK["callers"]) if quick else (BATCHES, THREADS, CALLERS)
    )
    for name, path, input_name, shape in json.loads((folder / "variants.json").read_text()):
        for threads in threads_tried:
            running = session(Path(path), threads)
            for callers in callers_tried:
                for batch in batches:
                    times, cpu_ms = samples(running, input_name, (batch, *shape), callers)
                    cells.append(TableRow(name, quota, threads, callers, batch, times, cpu_ms))
    return cells


def machine() -> dict[str, Any]:
    """What the samples depend on."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    flags: set[str] = set(next((line.split(":", 1)[1].split() for line in _cpuinfo() if line.startswith("flags")), []))
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": model,
        "cores": os.cpu_count(),
        "instructions": sorted(flags & {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16"}),
        "system": f"{platform.system()} {platform.machine()}",
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def line_fit(batches: Sequence[int], times_ms: Sequence[float]) -> tuple[float, float, float]:
    """a, b and R² of ``a n + b`` by least squares."""
    design = np.column_stack([batches, np.ones(len(batches))])
    times = np.asarray(times_ms, dtype=np.float64)
    (a, b), *_ = np.linalg.lstsq(design, times, rcond=None)
    rest = float(np.sum((times - design @ [a, b]) ** 2))
    return float(a), float(b), 1.0 - rest / max(float(np.sum((times - times.mean()) ** 2)), 1e-12)


def fits(cells: Sequence[TableRow]) -> dict[tuple[str, float, int, int], tuple[float, float, float]]:
    """a, b, R² of the medians by (variant, quota, threads, callers)."""
    groups: dict[tuple[str, float, int, int], dict[int, float]] = {}
    for cell in cells:
        key = cell.variant, cell.quota, cell.threads, cell.callers
        groups.setdefault(key, {})[cell.batch] = float(np.median(cell.samples_ms))
    return {key: line_fit(list(times), list(times.values())) for key, times in groups.items() if len(times) > 2}


def report(cells: Sequence[TableRow], about: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(about))
    print(f"{'variant':<28}{'quota':>6}{'threads':>8}{'callers':>8}{'a ms':>9}{'b ms':>9}{'R²':>8}")
    found = fits(cells)
    for (variant, quota, threads, callers), (a, b, r2) in sorted(found.items()):
        print(f"{variant:<28}{quota:>6g}{threads:>8}{callers:>8}{a:>9.3f}{b:>9.3f}{r2:>8.4f}")
    shares = np.array([r2 for _, _, r2 in found.values()])
    free = [r2 for (_, quota, _, _), (_, _, r2) in found.items() if quota == 0]
    return {
        "cells": len(cells),
        "samples": sum(len(cell.samples_ms) for cell in cells),
        "fits": len(found),
        "r2_median_without_quota": round(float(np.median(free)), 4) if free else None,
        "r2_median": round(float(np.median(shares)), 4),
        "r2_p10": round(float(np.quantile(shares, 0.1)), 4),
        "r2_below_0_99_pct": round(100 * float(np.mean(shares < 0.99)), 1),
    }


def under_quota(folder: Path, quota: float, *, quick: bool) -> list[TableRow] | None:
    """Measure in a process of its own under this quota; None where no control group can be made."""
    group = open_cpu_group(f"measure-latency-{os.getpid()}", quota) if quota else None
    if quota and group is None:
        return None
    output = folder / f"part-{quota:g}.npz"
    try:
        if group is not None:
            group.add(os.getpid())
        command = [sys.executable, "-m", "benchmarks.measure_latency", "--inside", str(quota), "--output", str(output)]
        command += ["--models", str(folder)]
        subprocess.run([*command, "--quick"] if quick else command, check=True)
    finally:
        if group is not None:
            _leave(group.folder)
            group.remove()
    return list(load(output)[0])


def _leave(folder: Path) -> None:
    """Back to the parent group, so that this one can be removed."""
    (folder.parent / "cgroup.procs").write_text(str(os.getpid()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure_latency", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quota", type=float, nargs="*", default=None, help=f"cores; default {QUOTAS}, 0 is no limit")
    parser.add_argument("--quick", action="store_true", help="fewer batches, one thread, one caller, one quota")
    parser.add_argument("--output", type=Path, help="where to save the samples (.npz)")
    parser.add_argument("--join", type=Path, nargs="+", help="join these tables instead of measuring")
    parser.add_argument("--show", type=Path, help="print the fits of this table instead of measuring")
    parser.add_argument("--inside", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside is not None:
        save(arguments.output, measure(arguments.models, arguments.inside, quick=arguments.quick), machine())
        return
    if arguments.show:
        shown, about = load(arguments.show)
        cells = list(shown)
    elif arguments.join:
        loaded = [load(path) for path in arguments.join]
        cells, about = [cell for part, _ in loaded for cell in part], loaded[0][1]
    else:
        cells, about = [], machine()
        with tempfile.TemporaryDirectory(prefix="latency-") as folder:
            prepare(Path(folder))
            for quota in arguments.quota or ((0.0,) if arguments.quick else QUOTAS):
                part = under_quota(Path(folder), quota, quick=arguments.quick)
                if part is None:
                    print(f"quota {quota:g} left out: no control group can be made here")
                cells += part or []
    if arguments.output:
        save(arguments.output, cells, about)
    print(json.dumps(report(cells, about)))


if __name__ == "__main__":
    main()
