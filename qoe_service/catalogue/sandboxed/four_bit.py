"""4-bit weights of dense layers, in blocks that share a scale; activations stay in single precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from . import channel_groups
from . import graph as graphs
from .channel_groups import Weights
from .datasets import Dataset
from .interface import Pass, Task

PREPARED = Path("prepared.onnx")
MIN_DENSE_SHARE, MIN_WEIGHTS = 0.5, 1024
DOMAIN, ZERO, LEVELS = "com.microsoft", 8, 15
SHRINKS = np.linspace(1.0, 0.7, 13)


class Int4Weights(Pass):
    """Quarter-size models for single requests; batches gain little, since every row unpacks the weights anew."""

    name = "int4-weights"
    uses_calibration = False

    def why_not(self, model: onnx.ModelProto, data: Dataset | None) -> str | None:  # noqa: ARG002 - needs no data
        """It packs matrices, so there must be some, and they must be most of the model."""
        if quantised := graphs.why_quantised(model):
            return quantised
        dense = graphs.weights_in(model, graphs.DENSE)
        others = graphs.weights_in(model, graphs.CONVOLUTIONS | graphs.RECURRENT)
        if dense < MIN_WEIGHTS:
            return "the model has no dense layer with constant weights worth packing"
        if dense / (dense + others) < MIN_DENSE_SHARE:
            return f"dense layers hold only {dense / (dense + others):.0%} of the weights, so there is little to win"
        return None

    def apply(self, task: Task) -> None:
        """Pack every constant matrix; a Gemm becomes a product and an addition."""
        model = graphs.prepare(task.source, PREPARED)
        weights, nodes = Weights(model), list[onnx.NodeProto]()
        for node in model.graph.node:
            nodes += _packed(model, node, weights, task.parameters) if _is_packable(node, weights) else [node]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        _drop_unused(model)
        if all(each.domain != DOMAIN for each in model.opset_import):
            model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
        onnx.save(model, task.target)


def pack(matrix: NDArray[Any], block_size: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Matrix [inputs, outputs] as nibbles [outputs, blocks, block_size / 2] and scales [outputs × blocks].

    A weight is (nibble − 8) × scale. Of several scales per block the one with the least squared error is taken.
    """
    inputs, outputs = matrix.shape
    blocks = -(-inputs // block_size)
    padded = np.zeros((outputs, blocks * block_size), dtype=np.float32)
    padded[:, :inputs] = matrix.T
    values = padded.reshape(outputs, blocks, block_size)
    largest = np.take_along_axis(values, np.abs(values).argmax(axis=2)[..., None], axis=2)
    best, scales = np.full(largest.shape, np.inf, dtype=np.float32), np.ones_like(largest)
    for shrink in SHRINKS:
        scale = np.where(largest == 0, 1, largest * np.float32(shrink) / -ZERO).astype(np.float32)
        error = ((_nibbles(values, scale) - np.float32(ZERO)) * scale - values) ** 2
        lost = error.sum(axis=2, keepdims=True)
        scales, best = np.where(lost < best, scale, scales), np.minimum(lost, best)
    nibbles = _nibbles(values, scales).astype(np.uint8)
    packed = nibbles[..., 0::2] | (nibbles[..., 1::2] << np.uint8(4))
    return packed.astype(np.uint8), scales.reshape(-1).astype(np.float32)


def _nibbles(values: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(np.clip(np.rint(values / scale) + ZERO, 0, LEVELS), dtype=np.float32)


def _is_packable(node: onnx.NodeProto, weights: Weights) -> bool:
    if node.op_type not in graphs.DENSE or node.input[1] not in weights or not channel_groups.is_plain(node):
        return False
    shape = weights.shape(node.input[1])
    return len(shape) == 2 and shape[0] * shape[1] >= MIN_WEIGHTS


def _packed(
    model: onnx.ModelProto, node: onnx.NodeProto, weights: Weights, parameters: dict[str, Any]
) -> list[onnx.NodeProto]:
    name, matrix = node.output[0], weights.get(node.input[1])
    matrix = matrix.T if channel_groups.transposed(node) else matrix
    packed, scales = pack(matrix, int(parameters["block_size"]))
    model.graph.initializer.extend(
        [numpy_helper.from_array(packed, f"{name}_nibbles"), numpy_helper.from_array(scales, f"{name}_scales")]
    )
    has_bias = node.op_type == "Gemm" and len(node.input) > 2
    product = helper.make_node(
        "MatMulNBits",
        [node.input[0], f"{name}_nibbles", f"{name}_scales"],
        [f"{name}_product" if has_bias else name],
        name=f"{name}_nbits",
        domain=DOMAIN,
        K=matrix.shape[0],
        N=matrix.shape[1],
        bits=4,
        block_size=int(parameters["block_size"]),
        accuracy_level=int(parameters["accuracy_level"]),
    )
    return [product, helper.make_node("Add", [product.output[0], node.input[2]], [name])] if has_bias else [product]


def _drop_unused(model: onnx.ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input}
    kept = [each for each in model.graph.initializer if each.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
