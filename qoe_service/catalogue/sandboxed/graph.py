"""Questions about an ONNX graph that several passes ask, and the one way to prepare it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization.shape_inference import quant_pre_process

from . import checks
from .cleanup import tidied

QUANTISED_OPERATORS = frozenset(
    {
        *("QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "MatMulInteger", "ConvInteger"),
        *("MatMulNBits", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "MatMulIntegerToFloat"),
    }
)
DENSE, CONVOLUTIONS = frozenset({"MatMul", "Gemm"}), frozenset({"Conv", "ConvTranspose"})
RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
PER_CHANNEL_OPSET = 13


def why_quantised(model: onnx.ModelProto) -> str | None:
    """Why a model that holds integers already is left alone; None for a model of plain numbers."""
    found = sorted({node.op_type for node in checks.nodes_of(model.graph)} & QUANTISED_OPERATORS)
    return f"the model is quantised already ({', '.join(found)})" if found else None


def prepare(source: Path, target: Path) -> onnx.ModelProto:
    """Clean up, infer shapes, fuse what can be fused on every machine, in an opset that knows per-channel scales."""
    model = tidied(checks.read(source))
    if checks.opset_of(model) < PER_CHANNEL_OPSET:
        model = onnx.version_converter.convert_version(model, PER_CHANNEL_OPSET)
    onnx.save(model, target)
    quant_pre_process(target, target, skip_symbolic_shape=True)
    prepared = onnx.load(target)
    for number, node in enumerate(prepared.graph.node):
        node.name = f"{node.op_type}_{number}"  # some exporters name none, and nodes are left out by name
    onnx.save(prepared, target)
    return prepared


def weights_in(model: onnx.ModelProto, operators: frozenset[str]) -> int:
    """Number of constant weights that nodes of these kinds multiply with."""
    sizes = {
        each.name: int(np.prod(each.dims, dtype=np.int64)) for each in model.graph.initializer if len(each.dims) > 1
    }
    nodes = (node for node in model.graph.node if node.op_type in operators)
    return sum(sizes.get(name, 0) for node in nodes for name in node.input)


def consumers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Which nodes read a tensor."""
    found: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            found[name].append(node)
    return found


def producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Which node writes a tensor."""
    return {name: node for node in graph.node for name in node.output if name}


def put_in_order(graph: onnx.GraphProto) -> None:
    """Every node after those that write what it reads, otherwise as they were: some converters append at the end."""
    waiting, writers, written = list(graph.node), set(producers(graph)), set[str]()
    ordered = list[onnx.NodeProto]()
    while waiting:
        later = list[onnx.NodeProto]()
        for node in waiting:
            if _reads(node) & writers <= written:
                ordered.append(node)
                written.update(node.output)
            else:
                later.append(node)
        if len(later) == len(waiting):
            return  # a circle; the checker says so
        waiting = later
    del graph.node[:]
    graph.node.extend(ordered)


def _reads(node: onnx.NodeProto) -> set[str]:
    inner = onnx.GraphProto(node=[node])
    return {name for each in checks.nodes_of(inner) for name in each.input}
