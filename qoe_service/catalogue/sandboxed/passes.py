"""The compression passes, by the name of their method. What may be asked for stands in ``catalogue/passes.py``."""

from __future__ import annotations

import importlib.metadata
from types import MappingProxyType
from typing import Any

import onnx

from . import checks, containers, memory
from .cleanup import CleanUp
from .four_bit import Int4Weights
from .half import Float16
from .int8 import DynamicInt8, StaticInt8
from .interface import Pass, Task
from .low_rank import LowRank
from .mixed import MixedInt8
from .pruning import PruneChannels
from .refusal import Refusal
from .runtime import instruction_sets

__all__ = ["PASSES", "Task", "apply"]

LIBRARIES = ("numpy", "onnx", "onnxruntime", "onnxslim")
_ALL: tuple[Pass, ...] = (
    *(CleanUp(), StaticInt8(), MixedInt8(), DynamicInt8(), Int4Weights(), Float16(), PruneChannels(), LowRank()),
)
PASSES = MappingProxyType({each.name: each for each in _ALL})


def apply(name: str, task: Task) -> dict[str, Any]:
    """Derive ``task.target``; says how, so that it can be done again bit for bit. Raises Refusal."""
    chosen: Pass = PASSES[name]
    if containers.graph_of(task.source) is not None:
        raise Refusal("passes take models below 2 GiB: the weights of this one lie beside its graph")
    reason = chosen.why_not(checks.read(task.source), task.data)
    if reason is not None:
        raise Refusal(f"{name} does not help here: {reason}")
    chosen.apply(task)
    _write_canonical(task)
    return {
        "calibration_digest": task.data.calibration_digest if task.data and chosen.uses_calibration else None,
        "isa": instruction_sets(),
        "versions": {each: importlib.metadata.version(each) for each in LIBRARIES},
    }


def held_bytes(name: str, task: Task) -> int:
    """What the layers of ``task.source`` hold while the pass runs it on calibration samples."""
    if task.data is None:
        return 0
    layers = memory.held(checks.read(task.source), task.data.calibration_inputs.shape[1:])
    return PASSES[name].held_bytes(layers, task)


def _write_canonical(task: Task) -> None:
    model = onnx.load(task.target)
    task.target.write_bytes(model.SerializeToString(deterministic=True))
