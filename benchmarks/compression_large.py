"""A model that no protobuf can hold, through the product: taken in from graph and weights, measured, fetched, opened.

``python -m benchmarks.compression_large [--mib 2304]`` makes dense layers of 256 MiB each (random weights), imports
them with a memory limit of its own, and prints one JSON line: seconds, bytes and the largest resident memory of any
child program. It needs about seven times the size on disk for a while. It is no part of ``benchmarks.compression``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

SIDE, LAYER_MIB = 8192, 256
MEMORY_BYTES = 16 * 2**30


def write_model(folder: Path, layers: int) -> Path:
    """A chain of dense layers and a small one at the end; weights in a file beside the graph, a layer at a time."""
    folder.mkdir()
    rng, nodes, tensors = np.random.default_rng(0), [], []
    with (folder / "large.data").open("wb") as file:
        for number in range(layers + 1):
            shape = (SIDE, 10 if number == layers else SIDE)
            tensors.append(_external(f"w{number}", shape, file.tell()))
            file.write((rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(SIDE))).tobytes())
            nodes.append(helper.make_node("MatMul", [f"x{number}", f"w{number}"], [f"x{number + 1}"]))
    inputs = [helper.make_tensor_value_info("x0", onnx.TensorProto.FLOAT, ["batch", SIDE])]
    outputs = [helper.make_tensor_value_info(f"x{layers + 1}", onnx.TensorProto.FLOAT, ["batch", 10])]
    graph = helper.make_graph(nodes, "large", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (folder / "large.onnx").write_bytes(model.SerializeToString())
    return folder


def _external(name: str, shape: tuple[int, int], offset: int) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    length = 4 * shape[0] * shape[1]
    for key, value in (("location", "large.data"), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def set_up(folder: Path) -> None:
    """Django on a database and an artifact folder of its own."""
    import django  # noqa: PLC0415 - not before the environment is set
    from django.core.management import call_command  # noqa: PLC0415

    os.environ.update(DJANGO_SETTINGS_MODULE="qoe_service.settings", DATA_DIR=str(folder), LOG_LEVEL="ERROR")
    os.environ.setdefault("SANDBOX_MEMORY_BYTES", str(MEMORY_BYTES))
    django.setup()
    call_command("migrate", verbosity=0)


def take_in(folder: Path, given: Path) -> dict[str, Any]:
    """Import, fetch as a device does, open with the agent's own code, run once."""
    from django.utils import timezone  # noqa: PLC0415 - after set_up

    from benchmarks.compression_family import RECORD  # noqa: PLC0415
    from device_agents.runtime import Session  # noqa: PLC0415
    from qoe_service.catalogue import applications, artifacts, datasets, imports, packages  # noqa: PLC0415

    rows = np.random.default_rng(1).standard_normal((72, SIDE), dtype=np.float32)
    np.savez(folder / "data.npz", calibration_inputs=rows[:8], heldout_inputs=rows[8:])
    dataset = datasets.import_dataset(path=folder / "data.npz", now=timezone.now())
    application = applications.define(record=RECORD, dataset=dataset, now=timezone.now())
    started = time.monotonic()
    with packages.as_zip(given) as path:
        variant = imports.import_model(application=application, path=path, name="large", now=timezone.now())
    imported_s = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    target = folder / f"{variant.artifact_id}.onnx"
    with artifacts.open_for_reading(variant.artifact_id) as source, target.open("wb") as file:
        while chunk := source.read(artifacts.CHUNK_BYTES):
            file.write(chunk)
    is_intact = artifacts.digest_of(target) == variant.artifact_id
    answers, _ = Session(target, threads=1).run({"x0": rows[:4]})
    profile = variant.profiles.first()
    return {
        "model_bytes": variant.artifact.size_bytes,
        "import_seconds": round(imported_s, 1),
        "largest_child_bytes": peak,
        "is_intact": is_intact,
        "outputs_finite": all(bool(np.isfinite(each).all()) for each in answers.values()),
        "accuracy": variant.accuracy,
        "row_ms": round(profile.a_ms + profile.b_ms, 1) if profile else None,
        "memory_bytes": profile.memory_bytes if profile else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression_large", description=__doc__)
    parser.add_argument("--mib", type=int, default=2304, help="size of the weights, in steps of 256")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qoe-large-") as name:
        folder = Path(name)
        given = write_model(folder / "large", max(arguments.mib // LAYER_MIB, 1))
        set_up(folder)
        print(json.dumps(take_in(folder, given)))


if __name__ == "__main__":
    main()
