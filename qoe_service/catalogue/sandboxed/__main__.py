"""Reads request.json in the working folder, does what it asks, writes result.json. A refusal is an answer too."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import datasets
from .refusal import Refusal

MODEL, DERIVED, DATA = Path("model.onnx"), Path("derived.onnx"), Path("data.npz")
REFERENCE = Path("reference.onnx")  # what a model without labels is compared with


def main() -> None:
    """Answer the request."""
    request = json.loads(Path("request.json").read_text())
    try:
        answer = COMMANDS[request["command"]](request)
    except Refusal as refusal:
        answer = {"refusal": str(refusal)}
    except Exception as error:  # noqa: BLE001 - libraries raise anything on odd models; all of it is a refusal
        traceback.print_exc(file=sys.stderr)
        answer = {"refusal": f"{type(error).__name__}: {error}"[:1000]}
    Path("result.json").write_text(json.dumps(answer, allow_nan=False))


def describe_data(_: dict[str, Any]) -> dict[str, Any]:
    """Shapes and counts of a data set."""
    return datasets.describe(datasets.load(DATA))


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Check a model, and measure it where there is data."""
    from . import checks, memory  # noqa: PLC0415 - a command loads only the libraries that it uses

    facts, data = checks.check(MODEL), _data()
    memory.check(request, _held_to_measure(MODEL, data))
    return measured(MODEL, facts, request, tell_progress)


def compress(request: dict[str, Any]) -> dict[str, Any]:
    """Derive a variant, then check and measure it like any other model."""
    from . import checks, memory, passes  # noqa: PLC0415 - as above

    data = _data()  # the base itself was checked when it came, and is the same since
    task = passes.Task(MODEL, DERIVED, request["parameters"], data, lambda share: tell_progress(0.6 * share))
    memory.check(request, max(passes.held_bytes(request["pass"], task), _held_to_measure(MODEL, data)))
    provenance = passes.apply(request["pass"], task)
    found = measured(DERIVED, checks.check(DERIVED), request, lambda share: tell_progress(0.6 + 0.3 * share))
    return {**found, "provenance": provenance}


def split(request: dict[str, Any]) -> dict[str, Any]:
    """Cut a model in two at a tensor, and check that the halves together are the whole."""
    from . import checks, cuts, pieces  # noqa: PLC0415 - as above

    checks.check(MODEL)
    answer = cuts.split(MODEL, request["tensor"], _sample(MODEL, _data()))
    return {**answer, "head_weights": pieces.find(cuts.HEAD), "tail_weights": pieces.find(cuts.TAIL)}


def sample(request: dict[str, Any]) -> dict[str, Any]:
    """Choose the samples that devices measure accuracy on."""
    from . import samples  # noqa: PLC0415 - as above

    return samples.write(datasets.load(DATA), REFERENCE, count=request["count"], max_bytes=request["max_bytes"])


def measured(
    path: Path, facts: dict[str, Any], request: dict[str, Any], tell: Callable[[float], None]
) -> dict[str, Any]:
    """Facts about a model, where it can be cut, and its accuracy where there is data, on as much as is asked for."""
    from . import cuts, evaluation, pieces  # noqa: PLC0415 - as above

    data, score = _data(), None
    if data is not None:
        reference = REFERENCE if REFERENCE.exists() else None
        extent = {"at_most": request["samples"], "patience_s": request.get("patience_s", 0.0)}
        extent["seen"] = request.get("seen")
        score = evaluation.score(path, facts, data, tell=tell, reference=reference, **extent)
    try:
        found, reason = cuts.find(path, _sample(path, data)), ""
    except Refusal as refusal:
        found, reason = [], str(refusal)
    except Exception as error:  # noqa: BLE001 - a model that cannot be cut is no worse for it; the reason is told
        found, reason = [], f"{type(error).__name__}: {error}"[:300]
    weights = pieces.find(path)
    return {"facts": facts, "score": score, "cuts": found, "no_cuts_because": reason, "weights": weights}


def _held_to_measure(path: Path, data: datasets.Dataset | None) -> int:
    """Bytes that a model's layers hold while it is measured: a batch of rows, or every tensor of a few to find cuts."""
    from . import checks, cuts, evaluation, memory  # noqa: PLC0415 - as above

    sample = _sample(path, data)
    layers = memory.held(checks.read(path), sample.shape[1:])
    rows = min(evaluation.BATCH, len(data.heldout_inputs)) if data is not None else 0
    return max(rows * layers.at_once, cuts.ROWS_WATCHED * layers.in_all)


def _data() -> datasets.Dataset | None:
    return datasets.load(DATA) if DATA.exists() else None


def _sample(path: Path, data: datasets.Dataset | None) -> Any:
    """Two rows of input: held-out ones where there are any, zeros otherwise."""
    import numpy as np  # noqa: PLC0415 - as above
    import onnx  # noqa: PLC0415 - as above

    from . import checks  # noqa: PLC0415 - as above

    if data is not None:
        return np.resize(data.heldout_inputs, (2, *data.heldout_inputs.shape[1:]))
    tensor = checks.read(path).graph.input[0].type.tensor_type
    sizes = [max(axis.dim_value, 1) for axis in tensor.shape.dim]
    return np.zeros((2, *sizes[1:]), dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))


def tell_progress(share: float) -> None:
    """Whole or not at all: the parent reads while we write."""
    Path("progress.new").write_text(f"{share:.3f}")
    os.replace("progress.new", "progress")


COMMANDS = {
    "describe-data": describe_data,
    "measure": measure,
    "compress": compress,
    "split": split,
    "sample": sample,
}

if __name__ == "__main__":
    main()
