"""What a model's layers hold while it runs, in bytes, from inferred shapes: known before anything is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from .refusal import Refusal

SMALL_BYTES = 4096  # constants up to here are kept for shape inference, which may read them


@dataclass(frozen=True)
class Held:
    """Bytes for one row of input: what is needed at one time, and of all tensors, where each is kept to be looked at.

    A tensor whose shape cannot be inferred counts nothing. ``shapes`` are those of one row.
    """

    at_once: int
    in_all: int
    shapes: Mapping[str, Sequence[int]]


def held(model: onnx.ModelProto, row: Sequence[int]) -> Held:
    """Of a model that is given rows of this shape."""
    infos = _inferred(model, row)
    shapes = {name: [max(axis.dim_value, 1) for axis in each.shape.dim] for name, each in infos.items()}
    sizes = {name: _bytes(shapes[name], each.elem_type) for name, each in infos.items() if each.HasField("shape")}
    last_use = {name: number for number, node in enumerate(model.graph.node) for name in node.input}
    last_use |= {each.name: len(model.graph.node) for each in model.graph.output}
    alive = {given(model).name}
    most = in_all = 0
    for number, node in enumerate(model.graph.node):
        alive.update(node.output)
        in_all += sum(sizes.get(name, 0) for name in node.output)
        most = max(most, sum(sizes.get(name, 0) for name in alive))
        alive = {name for name in alive if last_use.get(name, -1) > number}
    return Held(most, in_all, shapes)


def given(model: onnx.ModelProto) -> onnx.ValueInfoProto:
    """The input that is no constant."""
    constants = {each.name for each in model.graph.initializer}
    taken: onnx.ValueInfoProto = next(each for each in model.graph.input if each.name not in constants)
    return taken


def check(request: Mapping[str, Any], held_bytes: int) -> None:
    """Raises Refusal where a model and what its layers hold would exceed the memory that the request names, if any."""
    bound = request.get("memory")
    if bound is None:
        return
    needed = bound["needed_bytes"] + held_bytes
    if needed > bound["limit_bytes"]:
        model, layers, limit = (each // 2**20 for each in (bound["needed_bytes"], held_bytes, bound["limit_bytes"]))
        raise Refusal(
            f"{bound['what']} would need about {needed // 2**20} MiB of memory ({model} MiB for the model, "
            f"{layers} MiB for what its layers hold); the sandbox has {limit} MiB (SANDBOX_MEMORY_BYTES)"
        )


def _inferred(model: onnx.ModelProto, row: Sequence[int]) -> dict[str, onnx.TypeProto.Tensor]:
    """Types of all tensors for one row. Weights go in by their shapes alone, so that none is copied."""
    graph, weights = model.graph, [each for each in model.graph.initializer if each.ByteSize() > SMALL_BYTES]
    taken = given(model)
    first = onnx.helper.make_tensor_value_info(taken.name, taken.type.tensor_type.elem_type, [1, *row])
    small = onnx.GraphProto(
        name="shapes",
        node=graph.node,
        input=[first, *(onnx.helper.make_tensor_value_info(each.name, each.data_type, each.dims) for each in weights)],
        output=graph.output,
        initializer=[each for each in graph.initializer if each.ByteSize() <= SMALL_BYTES],
    )
    bare = onnx.helper.make_model(small, opset_imports=model.opset_import, ir_version=model.ir_version)
    found = onnx.shape_inference.infer_shapes(bare).graph
    return {each.name: each.type.tensor_type for each in (first, *found.value_info, *found.output)}


def _bytes(shape: Sequence[int], elem_type: int) -> int:
    if elem_type == onnx.TensorProto.UNDEFINED:
        return 0
    return int(np.prod(shape, dtype=np.int64)) * onnx.helper.tensor_dtype_to_np_dtype(elem_type).itemsize
