"""Reads a data set: calibration inputs, held-out inputs and, where there are any, labels, in one .npz.

Labels are whole numbers (classes) or floating-point numbers (targets of a regression).
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .refusal import Refusal

NAMES, LABELS = ("calibration_inputs", "heldout_inputs"), "heldout_labels"
MAX_UNPACKED_BYTES = 2**30
NUMBERS = "biuf"


@dataclass(frozen=True)
class Dataset:
    """Inputs [N, ...] of one kind; labels [N] are class numbers or [N] or [N, outputs] targets, or there are none."""

    calibration_inputs: NDArray[Any]
    heldout_inputs: NDArray[Any]
    heldout_labels: NDArray[Any] | None

    @property
    def is_regression(self) -> bool:
        """Whether the labels are targets, not classes."""
        return self.heldout_labels is not None and self.heldout_labels.dtype.kind == "f"

    @property
    def calibration_digest(self) -> str:
        """Names the calibration part, whatever file it came in."""
        inputs = self.calibration_inputs
        head = f"{inputs.dtype.str}{inputs.shape}".encode()
        return hashlib.sha256(head + np.ascontiguousarray(inputs).tobytes()).hexdigest()


def load(path: Path) -> Dataset:
    """Read and validate. Raises Refusal naming the array that is wrong."""
    arrays = _read(path)
    for name, array in arrays.items():
        if array.dtype.kind not in NUMBERS:
            raise Refusal(f"{name} holds {array.dtype}, not numbers")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise Refusal(f"{name} holds numbers that are not finite")
    calibration, heldout, labels = arrays[NAMES[0]], arrays[NAMES[1]], arrays.get(LABELS)
    _check_shapes(calibration, heldout)
    if labels is not None:
        labels = _checked_labels(labels, len(heldout))
    return Dataset(calibration, heldout, labels)


def describe(data: Dataset) -> dict[str, Any]:
    """What an operator wants to know about it."""
    return {
        "input_shape": list(data.heldout_inputs.shape[1:]),
        "input_dtype": data.heldout_inputs.dtype.name,
        "calibration_samples": len(data.calibration_inputs),
        "heldout_samples": len(data.heldout_inputs),
        "labels": "none" if data.heldout_labels is None else "targets" if data.is_regression else "classes",
        "classes": 0 if data.heldout_labels is None or data.is_regression else int(data.heldout_labels.max()) + 1,
    }


def _read(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile:
        raise Refusal("the data set is not an .npz file, or it is truncated") from None
    if unpacked > MAX_UNPACKED_BYTES:
        raise Refusal(f"the data set unpacks to {unpacked} bytes; at most {MAX_UNPACKED_BYTES} are taken")
    with np.load(path, allow_pickle=False) as file:
        missing = [name for name in NAMES if name not in file.files]
        if missing:
            raise Refusal(f"the data set has no array named {' or '.join(missing)}")
        return {name: _array(file, name) for name in (*NAMES, LABELS) if name in file.files}


def _array(file: Any, name: str) -> NDArray[Any]:
    try:
        array: NDArray[Any] = file[name]
    except ValueError as error:
        raise Refusal(f"{name} cannot be read without running its pickle, which is never done: {error}") from None
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise Refusal(f"{name} is damaged: {error}") from None
    return array


def _check_shapes(calibration: NDArray[Any], heldout: NDArray[Any]) -> None:
    if calibration.ndim < 2 or not len(calibration):
        raise Refusal("calibration_inputs needs at least one sample, shaped [samples, ...]")
    if heldout.shape[1:] != calibration.shape[1:] or heldout.dtype != calibration.dtype:
        raise Refusal("heldout_inputs and calibration_inputs differ in shape or type")
    if not len(heldout):
        raise Refusal("heldout_inputs needs at least one sample")


def _checked_labels(labels: NDArray[Any], samples: int) -> NDArray[Any]:
    if labels.dtype.kind in "iu" and labels.shape == (samples,):
        if labels.min() < 0:
            raise Refusal("heldout_labels holds a negative class number")
        return labels.astype(np.int64)
    if labels.dtype.kind == "f" and labels.ndim in {1, 2} and len(labels) == samples:
        return labels.astype(np.float64)
    raise Refusal(
        "heldout_labels must be one class number, or one number or row of numbers, for each of heldout_inputs"
    )
