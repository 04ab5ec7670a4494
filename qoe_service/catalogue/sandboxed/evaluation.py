"""How well a model does on held-out data, on the machine at hand: by labels, by targets, or beside the base model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .datasets import Dataset
from .interface import tell_nobody
from .refusal import Refusal
from .runtime import instruction_sets, new_session

BATCH = 64
RESAMPLES, SEED = 400, 7
Floats = NDArray[np.float64]
Tell = Callable[[float], None]
_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16"}


def score(
    path: Path,
    facts: dict[str, Any],
    data: Dataset,
    *,
    at_most: int | None = None,
    patience_s: float = 0.0,
    seen: dict[str, Any] | None = None,
    tell: Tell = tell_nobody,
    reference: Path | None = None,
) -> dict[str, Any]:
    """How good the model is on held-out samples: ``at_most`` spread evenly, and the rest too where that seems to take
    no more than ``patience_s`` of CPU time. ``seen`` is what such a look counted before, with these instruction sets or
    not; those samples are not looked at again.

    ``kind`` says by what: ``top-1``, ``regression`` (share of the targets' variance explained), or ``agreement`` with
    ``reference``, the base model, where there are no labels.
    """
    check_fit(facts, data)
    available = len(data.heldout_inputs)
    before = seen if seen and seen["isa"] == instruction_sets() else {"samples": 0, "correct": 0}
    chosen = np.arange(available) if at_most is None else _spread(available, at_most)
    chosen = np.setdiff1d(chosen, _spread(available, before["samples"]))
    kind = "agreement" if data.heldout_labels is None else "regression" if data.is_regression else "top-1"
    chosen, answers = _seen(path, facts, data, chosen, tell, strict=kind == "top-1", patience_s=patience_s)
    if data.heldout_labels is not None:
        expected = data.heldout_labels[chosen]
    if kind == "agreement":
        expected = answers if reference is None else _answers(reference, facts, data, chosen, tell, strict=False)
    samples = len(chosen) + before["samples"]
    found = {"kind": kind, "samples": samples, "available": available, "isa": instruction_sets()}
    if kind == "top-1":
        return {**found, "correct": before["correct"] + int((answers.argmax(axis=1) == expected).sum())}
    if kind == "agreement" and answers.ndim == 2 and answers.shape[1] > 1:
        return {**found, "correct": before["correct"] + int((answers.argmax(axis=1) == expected.argmax(axis=1)).sum())}
    return {**found, **explained(answers.reshape(len(answers), -1), expected.reshape(len(expected), -1))}


def explained(answers: Floats, expected: Floats) -> dict[str, Any]:
    """Share of the variance explained (at least 0), its 95 % interval by resampling samples, and the plain errors."""
    if answers.shape != expected.shape:
        raise Refusal(f"it gives {answers.shape[1]} numbers per sample; the targets have {expected.shape[1]}")
    squares = ((answers - expected) ** 2).sum(axis=1)
    spread = ((expected - expected.mean(axis=0)) ** 2).sum(axis=1)
    rows = np.random.default_rng(SEED).integers(0, len(squares), (RESAMPLES, len(squares)))
    low, high = np.quantile(_share(squares[rows].sum(axis=1), spread[rows].sum(axis=1)), (0.025, 0.975))
    return {
        "value": float(_share(squares.sum(), spread.sum())),
        "low": float(low),
        "high": float(high),
        "mean_absolute_error": float(np.abs(answers - expected).mean()),
        "root_mean_square_error": float(np.sqrt(((answers - expected) ** 2).mean())),
    }


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


def _spread(available: int, count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, available - 1, count).astype(np.int64))


def _share(lost: Any, spread: Any) -> Any:
    return np.clip(1 - lost / np.maximum(spread, 1e-30), 0, 1)


def _seen(
    path: Path,
    facts: dict[str, Any],
    data: Dataset,
    chosen: NDArray[np.int64],
    tell: Tell,
    *,
    strict: bool,
    patience_s: float,
) -> tuple[NDArray[np.int64], Floats]:
    """The samples that were looked at, in their order, and the answers to them."""
    started_s = time.process_time()
    answers = _answers(path, facts, data, chosen, tell, strict=strict)
    rest = np.setdiff1d(np.arange(len(data.heldout_inputs)), chosen)
    if not len(rest) or (time.process_time() - started_s) * len(rest) / len(chosen) > patience_s:
        return chosen, answers
    answers = np.concatenate([answers, _answers(path, facts, data, rest, tell, strict=strict)])
    both = np.concatenate([chosen, rest])
    return np.sort(both), answers[np.argsort(both)]


def _answers(
    path: Path, facts: dict[str, Any], data: Dataset, chosen: NDArray[np.int64], tell: Tell, *, strict: bool
) -> Floats:
    return np.concatenate(list(_batches(path, facts, data, chosen, tell, strict=strict)))


def _batches(
    path: Path, facts: dict[str, Any], data: Dataset, chosen: NDArray[np.int64], tell: Tell, *, strict: bool
) -> Iterator[Floats]:
    session, name = new_session(path), facts["inputs"][0]["name"]
    for start in range(0, len(chosen), BATCH):
        tell(start / len(chosen))
        batch = chosen[start : start + BATCH]
        answers = np.asarray(session.run(None, {name: data.heldout_inputs[batch]})[0])
        if (strict and answers.ndim != 2) or answers.ndim < 1 or len(answers) != len(batch):
            wanted = "[batch, classes]" if strict else "[batch, ...]"
            raise Refusal(f"its first output is shaped {list(answers.shape)}; {wanted} is needed")
        if answers.dtype.kind not in "fiu" or not np.isfinite(answers).all():
            raise Refusal("it gives numbers that are not finite on held-out data")
        yield answers.astype(np.float64)
