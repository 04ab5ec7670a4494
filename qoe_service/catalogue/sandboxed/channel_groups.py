"""Which channels of a network belong to nobody but one layer and its readers, so that they can be taken out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from . import graph as graphs

UNARY = frozenset({"Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSwish", "Elu", "Selu", "Softplus", "Erf", "Gelu"})
POOLING = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
BINARY = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Clip", "HardSigmoid", "Identity", "Min", "Max"})
CHANNEL_WISE = UNARY | BINARY


class Weights:
    """A model's constant tensors by name, read and replaced as arrays."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._tensors = {each.name: each for each in model.graph.initializer}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def get(self, name: str) -> NDArray[Any]:
        """A copy of the values."""
        return numpy_helper.to_array(self._tensors[name]).copy()

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes, without reading the values."""
        return tuple(self._tensors[name].dims)

    def set(self, name: str, values: NDArray[Any]) -> None:
        """Replace a tensor's values and shape."""
        kept = numpy_helper.to_array(self._tensors[name]).dtype
        self._tensors[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, dtype=kept), name))


@dataclass
class Reader:
    """A layer that multiplies the channels with weights; ``repeats`` columns of them belong to one channel."""

    node: onnx.NodeProto
    tensor: str
    repeats: int = 1


@dataclass
class Group:
    """The channels that ``writer`` makes, all that touches them on the way, and who reads them."""

    writer: onnx.NodeProto
    channels: int
    axis: int
    readers: list[Reader] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)  # per-channel ones, cut along with the channels


def find(model: onnx.ModelProto) -> list[Group]:
    """Groups whose channels may be cut without anybody else noticing, in graph order."""
    weights, readers_of = Weights(model), graphs.consumers(model.graph)
    shared = {name for name, nodes in readers_of.items() if name in weights and len(nodes) > 1}
    sizes = _sizes(model)
    found = []
    for node in model.graph.node:
        group = _start(node, weights)
        if group is not None and _follow(group, model, weights, readers_of, sizes):
            cut = set(_cut_weights(group))
            if not cut & shared:
                found.append(group)
    return found


def weight_of(node: onnx.NodeProto) -> str:
    """The name of a layer's weights."""
    return str(node.input[1])


def transposed(node: onnx.NodeProto) -> bool:
    """Whether a Gemm keeps its weights as [outputs, inputs]."""
    return any(each.name == "transB" and each.i for each in node.attribute)


def is_plain(node: onnx.NodeProto) -> bool:
    """Whether a dense layer computes just ``x @ weights + bias``."""
    numbers = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    return all(_attribute(node, name, number) == number for name, number in numbers.items())


def shift_bias(model: onnx.ModelProto, node: onnx.NodeProto, shift: NDArray[Any]) -> None:
    """Add to a layer's bias; a layer without one gets one where its kind can have it."""
    weights = Weights(model)
    if len(node.input) > 2:
        weights.set(node.input[2], weights.get(node.input[2]) + shift)
    elif node.op_type in {"Conv", "Gemm"}:
        name = f"{node.output[0]}_bias"
        model.graph.initializer.append(numpy_helper.from_array(shift.astype(np.float32), name))
        node.input.append(name)
    else:
        _shift_next_add(model, node, shift, weights)


def can_shift(model: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    """Whether ``shift_bias`` has a place to add to."""
    return node.op_type != "MatMul" or _bias_behind(model, node, Weights(model)) is not None


def _shift_next_add(model: onnx.ModelProto, node: onnx.NodeProto, shift: NDArray[Any], weights: Weights) -> None:
    name = _bias_behind(model, node, weights)
    if name is not None:
        weights.set(name, weights.get(name) + shift)


def _bias_behind(model: onnx.ModelProto, node: onnx.NodeProto, weights: Weights) -> str | None:
    """A MatMul's bias is an Add behind it, if that Add is its only reader and holds a vector of its own."""
    readers = graphs.consumers(model.graph)
    behind = readers[node.output[0]]
    if len(behind) != 1 or behind[0].op_type != "Add" or node.input[1] not in weights:
        return None
    shape = weights.shape(node.input[1])[-1:]
    return next(
        (
            name
            for name in behind[0].input
            if name in weights and weights.shape(name) == shape and len(readers[name]) == 1
        ),
        None,
    )


def _cut_weights(group: Group) -> Iterator[str]:
    yield from group.writer.input[1:]
    yield from group.constants
    for reader in group.readers:
        yield weight_of(reader.node)


def _start(node: onnx.NodeProto, weights: Weights) -> Group | None:
    if len(node.input) < 2 or node.input[1] not in weights or any(name not in weights for name in node.input[2:]):
        return None
    shape = weights.shape(node.input[1])
    if node.op_type == "Conv" and _attribute(node, "group", 1) == 1:
        return Group(node, shape[0], 1)
    if node.op_type == "Gemm" and is_plain(node):
        return Group(node, shape[0] if transposed(node) else shape[1], 1)
    if node.op_type == "MatMul" and len(shape) == 2:
        return Group(node, shape[1], -1)
    return None


def _follow(
    group: Group,
    model: onnx.ModelProto,
    weights: Weights,
    readers_of: dict[str, list[onnx.NodeProto]],
    sizes: dict[str, list[int]],
) -> bool:
    outputs = {each.name for each in model.graph.output}
    region, flat = {group.writer.output[0]}, dict[str, tuple[str, int]]()
    waiting, inside = [group.writer.output[0]], list[onnx.NodeProto]()
    while waiting:
        tensor = waiting.pop()
        if tensor in outputs or not readers_of.get(tensor):
            return False
        for node in readers_of[tensor]:
            if _reads(node, tensor, weights):
                group.readers.append(Reader(node, *flat.get(tensor, (tensor, 1))))
            elif tensor in flat or len(node.output) != 1:
                return False
            elif node.op_type == "Flatten" and _attribute(node, "axis", 1) == 1:
                positions = sizes.get(tensor, [0, 0, 0])[2:]
                if 0 in positions:
                    return False
                flat[node.output[0]] = (tensor, int(np.prod(positions, dtype=np.int64)))
                waiting.append(node.output[0])
            elif not _is_channel_wise(node, group):
                return False
            elif node.output[0] not in region:
                region.add(node.output[0])
                waiting.append(node.output[0])
                inside.append(node)
    return all(_stays_inside(node, group, region, weights) for node in inside) and bool(group.readers)


def _is_channel_wise(node: onnx.NodeProto, group: Group) -> bool:
    return node.op_type in CHANNEL_WISE or (node.op_type in POOLING and group.writer.op_type == "Conv")


def _reads(node: onnx.NodeProto, tensor: str, weights: Weights) -> bool:
    if node.op_type not in {"Conv", "Gemm", "MatMul"} or node.input[0] != tensor or node.input[1] not in weights:
        return False
    if tensor in node.input[1:]:
        return False
    if node.op_type == "Conv":
        return bool(_attribute(node, "group", 1) == 1)
    if node.op_type == "Gemm":
        return is_plain(node)
    return len(weights.shape(node.input[1])) == 2


def _stays_inside(node: onnx.NodeProto, group: Group, region: set[str], weights: Weights) -> bool:
    """Every other operand is a part of the region, a single number, or has one number per channel."""
    for name in node.input:
        if not name or name in region:
            continue
        if name not in weights:
            return False
        shape = weights.shape(name)
        if int(np.prod(shape, dtype=np.int64)) == 1:
            continue
        if node.op_type not in {"Add", "Sub", "Mul", "Div"} or not _is_per_channel(shape, group):
            return False
        group.constants.append(name)
    return True


def _is_per_channel(shape: tuple[int, ...], group: Group) -> bool:
    from_the_end = 1 if group.axis == -1 or group.writer.op_type == "Gemm" else 3
    return (
        len(shape) >= from_the_end
        and shape[-from_the_end] == group.channels
        and int(np.prod(shape, dtype=np.int64)) == group.channels
    )


def _sizes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Known sizes of tensors, 0 for a free axis."""
    infos = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return {each.name: [axis.dim_value for axis in each.type.tensor_type.shape.dim] for each in infos}


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    for each in node.attribute:
        if each.name == name:
            return onnx.helper.get_attribute_value(each)
    return default
