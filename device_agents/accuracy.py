"""How right a model is on samples from the service: ``qoe-agent profile FILE --samples SAMPLES.npz``.

A file of samples holds ``inputs`` [N, ...], ``expected`` (class numbers [N], or numbers [N, ...] to come near to) and
``kind``: ``top-1``, ``regression`` or ``agreement``. The service computes the same on its own machine.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from device_agents.errors import AttemptFailed
from device_agents.runtime import Array, Session
from device_agents.wire import SAMPLES_LIMIT, AccuracyReport, Outcome

Kind = Literal["top-1", "regression", "agreement"]

UNPACKED_LIMIT_BYTES = 128 * 1024 * 1024
ROWS_AT_ONCE = 8
RESAMPLES, SEED = 400, 7


@dataclass(frozen=True)
class Samples:
    """Inputs [N, ...], and for each of them what is right."""

    kind: Kind
    inputs: Array
    expected: Array


def accuracy(model: Path, samples: Path, *, threads: int) -> AccuracyReport:
    """Runs the model on all samples. Raises AttemptFailed for samples or a model that do not fit together."""
    given, session = read(samples), Session(model, threads=threads)
    return score(_answers(session, given.inputs), given)


def read(path: Path) -> Samples:
    """The samples in a file; raises AttemptFailed naming what is wrong with it. Nothing pickled is ever loaded."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > UNPACKED_LIMIT_BYTES:
                raise _bad(f"unpack to more than {UNPACKED_LIMIT_BYTES} bytes")
        with np.load(path, allow_pickle=False) as file:
            kind, inputs, expected = str(file["kind"]), np.atleast_1d(file["inputs"]), np.atleast_1d(file["expected"])
    except (zipfile.BadZipFile, OSError, EOFError, KeyError, ValueError) as error:
        raise _bad(f"cannot be read: {error}") from error
    if kind not in get_args(Kind):
        raise _bad(f"are of an unknown kind {kind[:32]!r}")
    if not 1 <= len(inputs) <= SAMPLES_LIMIT or len(expected) != len(inputs):
        raise _bad(f"hold {len(inputs)} inputs and {len(expected)} answers; 1 to {SAMPLES_LIMIT} of each are taken")
    return Samples(kind=_kind(kind), inputs=inputs, expected=expected)


def score(answers: Array, samples: Samples) -> AccuracyReport:
    """How right answers are. Classes are right or wrong; of other numbers the share of variance explained counts."""
    if not np.isfinite(answers).all():
        raise AttemptFailed("gives numbers that are not finite on samples", outcome=Outcome.INCOMPATIBLE)
    count, expected = len(samples.inputs), samples.expected
    is_classes = answers.ndim == 2 and answers.shape[1] > 1
    if samples.kind == "top-1" and is_classes and expected.ndim == 1:
        return _counted(samples.kind, answers.argmax(axis=1) == expected)
    if samples.kind == "agreement" and is_classes and expected.shape == answers.shape:
        return _counted(samples.kind, answers.argmax(axis=1) == expected.argmax(axis=1))
    given, wanted = answers.reshape(count, -1), expected.reshape(count, -1)
    if samples.kind == "top-1" or given.shape != wanted.shape:
        reason = f"gives {list(answers.shape[1:])} per sample, which the samples' answers do not fit"
        raise AttemptFailed(reason, outcome=Outcome.INCOMPATIBLE)
    return _explained(samples.kind, given.astype(np.float64), wanted.astype(np.float64))


def _counted(kind: Kind, is_right: NDArray[np.bool_]) -> AccuracyReport:
    return AccuracyReport(kind=kind, samples=len(is_right), correct=int(is_right.sum()))


def _explained(kind: Kind, answers: NDArray[np.float64], expected: NDArray[np.float64]) -> AccuracyReport:
    """Share of the variance explained (at least 0), with its 95 % interval by resampling samples."""
    lost = ((answers - expected) ** 2).sum(axis=1)
    spread = ((expected - expected.mean(axis=0)) ** 2).sum(axis=1)
    rows = np.random.default_rng(SEED).integers(0, len(lost), (RESAMPLES, len(lost)))
    low, high = np.quantile(_share(lost[rows].sum(axis=1), spread[rows].sum(axis=1)), (0.025, 0.975))
    value = float(_share(lost.sum(), spread.sum()))
    return AccuracyReport(
        kind=kind, samples=len(lost), value=value, low=min(value, float(low)), high=max(value, float(high))
    )


def _share(lost: Any, spread: Any) -> Any:
    return np.clip(1 - lost / np.maximum(spread, 1e-30), 0, 1)


def _answers(session: Session, inputs: Array) -> Array:
    """The first output for all inputs, a few rows at a time."""
    tensor, output = session.inputs[0], session.outputs[0].name
    if len(session.inputs) != 1 or tensor.dtype != inputs.dtype:
        reason = f"takes {len(session.inputs)} inputs of {tensor.dtype}, the samples are one of {inputs.dtype}"
        raise AttemptFailed(reason, outcome=Outcome.INCOMPATIBLE)
    step = ROWS_AT_ONCE if session.is_batchable else 1
    parts = [
        session.run({tensor.name: inputs[start : start + step]})[0][output] for start in range(0, len(inputs), step)
    ]
    return np.concatenate(parts)


def _kind(text: str) -> Kind:
    return next(kind for kind in get_args(Kind) if kind == text)


def _bad(what: str) -> AttemptFailed:
    return AttemptFailed(f"the samples {what}"[:1024], outcome=Outcome.VERIFY_FAILED)
