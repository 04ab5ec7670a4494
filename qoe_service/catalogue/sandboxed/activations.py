"""What tensors inside a model hold on calibration samples, as matrices of rows × channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from .interface import Task
from .memory import Held

Floats = NDArray[np.float32]
BATCH, ANSWERS_BATCH = 16, 64
MAX_ROWS = 8192
MAX_VALUES = 2**24  # of one tensor's matrix: 64 MiB


def collect(
    model: onnx.ModelProto, inputs: NDArray[Any], axes: Mapping[str, int], *, task: Task | None = None
) -> dict[str, Floats]:
    """For each tensor named in ``axes``: rows [samples × positions, channels], channels on the axis given there.

    Positions are thinned evenly so that no matrix grows beyond bounds.
    """
    session, name = watching_session(model, list(axes)), model.graph.input[0].name
    parts: dict[str, list[Floats]] = {tensor: [] for tensor in axes}
    for start in range(0, len(inputs), BATCH):
        if task is not None:
            task.tell(0.5 * start / len(inputs))
        values = session.run(list(axes), {name: inputs[start : start + BATCH]})
        share = BATCH / max(len(inputs), BATCH)
        for (tensor, axis), value in zip(axes.items(), values, strict=True):
            parts[tensor].append(_thinned(np.moveaxis(value, axis, -1).reshape(-1, value.shape[axis]), share))
    return {tensor: np.concatenate(parts.pop(tensor)) for tensor in axes}  # one tensor at a time is there twice


def collected_bytes(layers: Held, axes: Mapping[str, int], task: Task, *, then: int = 0) -> int:
    """What ``collect`` holds at its peak: one batch, in it all of these tensors, and the rows kept of each.

    ``then`` is what is held later, when of all this only the rows are there.
    """
    assert task.data is not None
    samples = len(task.data.calibration_inputs[: task.parameters["calibration_samples"]])
    batch = kept = 0
    for tensor, axis in axes.items():
        shape = layers.shapes.get(tensor, ())
        values = int(np.prod(shape, dtype=np.int64)) if shape else 0
        channels = max(shape[axis], 1) if shape else 1
        batch += 4 * values
        kept += 4 * channels * min(samples * values // channels, MAX_ROWS, MAX_VALUES // channels)
    return max(BATCH * (layers.at_once + batch), then) + kept


def outputs_of(model: onnx.ModelProto, inputs: NDArray[Any], names: Sequence[str] = ()) -> list[Floats]:
    """Tensors of these names on all inputs, by default the model's first output."""
    session, name = watching_session(model, names), model.graph.input[0].name
    wanted = list(names) or [model.graph.output[0].name]
    starts = range(0, len(inputs), ANSWERS_BATCH)
    batches = [session.run(wanted, {name: inputs[start : start + ANSWERS_BATCH]}) for start in starts]
    return [np.concatenate(column).astype(np.float32) for column in zip(*batches, strict=True)]


def _thinned(rows: Floats, share: float) -> Floats:
    most = max(int(min(MAX_ROWS, MAX_VALUES // max(rows.shape[1], 1)) * share), 1)
    if len(rows) > most:
        rows = rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]
    return rows.astype(np.float32)


def watching_session(model: onnx.ModelProto, names: Sequence[str]) -> onnxruntime.InferenceSession:
    """A session over the model as it is written (no fusion may swallow a tensor), these tensors among its outputs."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    there = {each.name for each in watched.graph.output}
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return onnxruntime.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
