"""Multiplications of a model's layers for one sample, from inferred shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from . import graph as graphs
from .channel_groups import Group


def shapes_of(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Sizes of tensors as inferred; a free axis counts as 1."""
    infos = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    found = {each.name: [max(axis.dim_value, 1) for axis in each.type.tensor_type.shape.dim] for each in infos}
    return {**found, **{each.name: list(each.dims) for each in model.graph.initializer}}


def multiplications(node: onnx.NodeProto, shapes: Mapping[str, Sequence[int]]) -> float:
    """Of one node; 0 for what is no layer or has no known shape. LSTM and its like count their matrices."""
    output = shapes.get(node.output[0], ())
    if node.op_type in {"Conv", "ConvInteger"}:
        return float(np.prod(output)) * float(np.prod(shapes.get(node.input[1], (0, 0))[1:]))
    if node.op_type == "MatMulNBits":
        sizes = {each.name: each.i for each in node.attribute}
        return float(np.prod(output)) * float(sizes["K"])
    if node.op_type in {"Gemm", "MatMul", "MatMulInteger"}:
        left = shapes.get(node.input[0], ())
        return float(np.prod(output)) * (left[-1] if left else 0)
    if node.op_type in graphs.RECURRENT | {"DynamicQuantizeLSTM"}:
        steps = shapes.get(node.input[0], (1,))[0]
        return float(steps * sum(np.prod(shapes.get(name, (0,))) for name in node.input[1:3]))
    return 0.0


class Layers:
    """How many multiplications a model makes when its groups keep fewer channels."""

    def __init__(self, model: onnx.ModelProto, groups: Sequence[Group]) -> None:
        shapes = shapes_of(model)
        self._whole = {node.output[0]: multiplications(node, shapes) for node in model.graph.node}
        self._groups = groups

    def multiplications(self, kept: Mapping[str, int]) -> float:
        """In all, with ``kept`` channels per group, named by its writer's output."""
        left = dict(self._whole)
        for group in self._groups:
            share = kept[group.writer.output[0]] / group.channels
            for node in (group.writer, *(reader.node for reader in group.readers)):
                left[node.output[0]] *= share
        return sum(left.values())
