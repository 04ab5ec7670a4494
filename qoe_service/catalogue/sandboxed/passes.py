"""The compression passes, by the name of their method. What may be asked for stands in ``catalogue/passes.py``."""

from __future__ import annotations

import importlib.metadata
from types import MappingProxyType
from typing import Any

import onnx

from . import checks
from .int8 import DynamicInt8, StaticInt8
from .interface import Pass, Task
from .refusal import Refusal

__all__ = ["PASSES", "Task", "apply"]

LIBRARIES = ("numpy", "onnx", "onnxruntime", "onnxslim")
PASSES = MappingProxyType({each.name: each for each in (StaticInt8(), DynamicInt8())})


def apply(name: str, task: Task) -> dict[str, Any]:
    """Derive ``task.target``; says how, so that it can be done again bit for bit. Raises Refusal."""
    chosen: Pass = PASSES[name]
    reason = chosen.why_not(checks.read(task.source), task.data)
    if reason is not None:
        raise Refusal(f"{name} does not help here: {reason}")
    chosen.apply(task)
    _write_canonical(task)
    return {
        "calibration_digest": task.data.calibration_digest if task.data and chosen.uses_calibration else None,
        "versions": {each: importlib.metadata.version(each) for each in LIBRARIES},
    }


def _write_canonical(task: Task) -> None:
    model = onnx.load(task.target)
    task.target.write_bytes(model.SerializeToString(deterministic=True))
