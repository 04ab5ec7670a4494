"""Half-precision weights and arithmetic: half the download; faster only where the processor computes in it."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16

from . import graph as graphs
from .datasets import Dataset
from .interface import Pass, Task

PREPARED = Path("prepared.onnx")


class Float16(Pass):
    """Inputs and outputs keep their types."""

    name = "float16"
    uses_calibration = False

    def why_not(self, model: onnx.ModelProto, data: Dataset | None) -> str | None:  # noqa: ARG002 - needs no data
        """It halves single-precision weights, so there must be some."""
        if quantised := graphs.why_quantised(model):
            return quantised
        if not any(each.data_type == onnx.TensorProto.FLOAT and len(each.dims) > 1 for each in model.graph.initializer):
            return "the model has no weights in single precision"
        return None

    def apply(self, task: Task) -> None:
        """Convert; operators without a half-precision form are wrapped in casts."""
        model = graphs.prepare(task.source, PREPARED)
        converted = convert_float_to_float16(model, keep_io_types=True)
        graphs.put_in_order(converted.graph)
        onnx.save(converted, task.target)
