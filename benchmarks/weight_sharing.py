"""What does it cost, and what does it save, if two sessions share their weights?

While a candidate is tried beside the running variant, two sessions are loaded. Each arrangement is measured in a
process of its own: two sessions of one model (square matrix products), the memory beyond what the process had before
that it shares with nobody, and the median of runs at batch 1 and 8. What would falsify "not worth it": an arrangement
with far less private memory than one file as usual, and runs that take no longer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

WIDTH, LAYERS = 1448, 6
BATCHES = (1, 8)
ARRANGEMENTS = {
    "one file, as usual": ("inline.onnx", True),
    "external data, as usual": ("external.onnx", True),
    "external data, not repacked": ("external.onnx", False),
    "external data, repacked on disk": ("packed.onnx", True),
}


def make_models(folder: Path) -> None:
    """The same weights in one file, beside their file, and beside it as ONNX Runtime repacks them here."""
    rng = np.random.default_rng(1)
    nodes, constants = [], []
    for index in range(LAYERS):
        weights = (rng.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)).astype(np.float32)
        constants.append(helper.make_tensor(f"w{index}", TensorProto.FLOAT, weights.shape, weights.tobytes(), raw=True))
        nodes.append(helper.make_node("MatMul", [f"h{index}", f"w{index}"], [f"h{index + 1}"]))
    shape: list[str | int | None] = ["n", WIDTH]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("h0", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"h{LAYERS}", TensorProto.FLOAT, shape)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(folder / "inline.onnx"))
    onnx.save(model, str(folder / "external.onnx"), save_as_external_data=True, location="external.bin")
    options = _options(repacks=True)
    options.optimized_model_filepath = str(folder / "packed.onnx")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "packed.bin")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    ort.InferenceSession(str(folder / "external.onnx"), options, providers=["CPUExecutionProvider"])


def measure(path: Path, *, repacks: bool) -> dict[str, float]:
    """Two sessions in this process: private MB, load time of the second in ms, and ms per run at each batch."""
    before = private_mb()
    ort.InferenceSession(str(path), _options(repacks=repacks), providers=["CPUExecutionProvider"])
    sessions = []
    load_ms = 0.0
    for _ in range(2):
        started_s = time.monotonic()
        sessions.append(ort.InferenceSession(str(path), _options(repacks=repacks), providers=["CPUExecutionProvider"]))
        load_ms = (time.monotonic() - started_s) * 1000
    found = {"load_ms": round(load_ms, 1)}
    for batch in BATCHES:
        rows = np.ones((batch, WIDTH), dtype=np.float32)
        took_ms = []
        for _ in range(40):
            for session in sessions:
                started_s = time.perf_counter()
                session.run(None, {"h0": rows})
                took_ms.append((time.perf_counter() - started_s) * 1000)
        found[f"run_ms_{batch}"] = round(float(np.median(took_ms)), 3)
    return {"private_mb": round(private_mb() - before, 1), **found}


def private_mb() -> float:
    """Memory that this process shares with nobody and no file, in MB."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:")) / 1000


def _options(*, repacks: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "0" if repacks else "1")
    return options


def main() -> None:
    """Prints a table and a line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weight_sharing", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="once instead of five times")
    parser.add_argument("--one", nargs=2, metavar=("FILE", "REPACKS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(Path(options.one[0]), repacks=options.one[1] == "True")))
        return
    summary: dict[str, dict[str, float]] = {}
    print(f"{'two sessions of one model':<34}{'private MB':>11}{'load ms':>9}{'b1 ms':>8}{'b8 ms':>8}")
    with tempfile.TemporaryDirectory(prefix="sharing-") as folder:
        make_models(Path(folder))
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in ARRANGEMENTS}
        for _ in range(1 if options.quick else 5):
            for name, (file, repacks) in ARRANGEMENTS.items():
                command = [sys.executable, "-m", "benchmarks.weight_sharing", "--one"]
                done = subprocess.run([*command, f"{folder}/{file}", str(repacks)], capture_output=True, check=True)
                runs[name].append(json.loads(done.stdout))
    for name, found in runs.items():
        summary[name] = {key: float(np.median([each[key] for each in found])) for key in found[0]}
        values = summary[name]
        print(
            f"{name:<34}{values['private_mb']:>11.1f}{values['load_ms']:>9.0f}"
            f"{values['run_ms_1']:>8.2f}{values['run_ms_8']:>8.2f}"
        )
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
