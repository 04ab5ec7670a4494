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
    return measured(MODEL, request["samples"], tell_progress)


def compress(request: dict[str, Any]) -> dict[str, Any]:
    """Derive a variant, then check and measure it like any other model."""
    from . import checks, passes  # noqa: PLC0415 - a command loads only the libraries that it uses

    data = datasets.load(DATA) if DATA.exists() else None
    checks.check(MODEL)
    task = passes.Task(MODEL, DERIVED, request["parameters"], data, lambda share: tell_progress(0.6 * share))
    provenance = passes.apply(request["pass"], task)
    return {
        **measured(DERIVED, request["samples"], lambda share: tell_progress(0.6 + 0.3 * share)),
        "provenance": provenance,
    }


def measured(path: Path, samples: int | None, tell: Callable[[float], None]) -> dict[str, Any]:
    """Facts about a model, and its accuracy where there is data."""
    from . import checks, evaluation  # noqa: PLC0415 - as above

    facts = checks.check(path)
    if not DATA.exists():
        return {"facts": facts, "score": None}
    data = datasets.load(DATA)
    return {"facts": facts, "score": evaluation.top_1(path, facts, data, samples, tell)}


def tell_progress(share: float) -> None:
    """Whole or not at all: the parent reads while we write."""
    Path("progress.new").write_text(f"{share:.3f}")
    os.replace("progress.new", "progress")


COMMANDS = {"describe-data": describe_data, "measure": measure, "compress": compress}

if __name__ == "__main__":
    main()
