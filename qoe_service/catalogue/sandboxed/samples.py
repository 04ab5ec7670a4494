"""Chooses the held-out samples that devices measure accuracy on, and what is right for each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import checks
from .datasets import Dataset
from .evaluation import BATCH, check_fit
from .refusal import Refusal
from .runtime import new_session

SAMPLES = Path("samples.npz")


def write(data: Dataset, reference: Path, *, count: int, max_bytes: int) -> dict[str, Any]:
    """Write at most ``count`` samples spread evenly, of at most ``max_bytes``; same data set, same bytes.

    Without labels the answers of ``reference`` are what is right.
    """
    available = len(data.heldout_inputs)
    affordable = max(1, max_bytes // max(1, data.heldout_inputs[0].nbytes))
    chosen = np.unique(np.linspace(0, available - 1, min(count, available, affordable)).astype(int))
    inputs = data.heldout_inputs[chosen]
    if data.heldout_labels is None:
        kind, expected = "agreement", _answers(reference, data, inputs)
    else:
        kind, expected = "regression" if data.is_regression else "top-1", data.heldout_labels[chosen]
    np.savez_compressed(SAMPLES, kind=np.array(kind), inputs=inputs, expected=expected)
    return {"kind": kind, "count": len(chosen)}


def _answers(reference: Path, data: Dataset, inputs: NDArray[Any]) -> NDArray[np.float32]:
    if not reference.exists():
        raise Refusal("there are no labels, and no base model to agree with")
    facts = checks.check(reference)
    check_fit(facts, data)
    session, name = new_session(reference), facts["inputs"][0]["name"]
    parts = [session.run(None, {name: inputs[at : at + BATCH]})[0] for at in range(0, len(inputs), BATCH)]
    return np.concatenate([np.asarray(part, dtype=np.float32) for part in parts])
