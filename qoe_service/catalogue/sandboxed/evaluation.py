"""Accuracy of a model on held-out data, on the machine at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .datasets import Dataset
from .refusal import Refusal
from .runtime import instruction_sets, new_session

BATCH = 64
_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16"}


def top_1(
    path: Path, facts: dict[str, Any], data: Dataset, at_most: int | None, tell_progress: Callable[[float], None]
) -> dict[str, Any]:
    """How many held-out samples, of all or of ``at_most`` spread evenly, have their label as the largest output."""
    check_fit(facts, data)
    available = len(data.heldout_labels)
    chosen = np.arange(available) if at_most is None else np.unique(np.linspace(0, available - 1, at_most).astype(int))
    session, name = new_session(path), facts["inputs"][0]["name"]
    correct = 0
    for start in range(0, len(chosen), BATCH):
        tell_progress(start / len(chosen))
        batch = chosen[start : start + BATCH]
        labels = data.heldout_labels[batch]
        scores = np.asarray(session.run(None, {name: data.heldout_inputs[batch]})[0])
        if scores.ndim != 2 or len(scores) != len(labels):
            raise Refusal(f"its first output is shaped {list(scores.shape)}; [batch, classes] is needed")
        if not np.isfinite(scores).all():
            raise Refusal("it gives numbers that are not finite on held-out data")
        correct += int((scores.argmax(axis=1) == labels).sum())
    return {"correct": correct, "samples": len(chosen), "available": available, "isa": instruction_sets()}


def check_fit(facts: dict[str, Any], data: Dataset) -> None:
    """Raises Refusal when the data set is not shaped as the model's input."""
    wanted = facts["inputs"][0]
    dtype = _DTYPES.get(wanted["type"], wanted["type"].removeprefix("tensor(").removesuffix(")"))
    given = [str(data.heldout_inputs.dtype), *data.heldout_inputs.shape[1:]]
    fits = dtype == given[0] and len(wanted["shape"]) == len(given)
    fits &= all(
        axis == size for axis, size in zip(wanted["shape"][1:], given[1:], strict=False) if isinstance(axis, int)
    )
    if not fits:
        raise Refusal(f"its input takes {dtype} {wanted['shape']}, but the data set holds {given[0]} [n, {given[1:]}]")
