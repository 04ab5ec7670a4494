"""Whether an ONNX file is sound, self-contained and made of known operators; and what it takes and gives."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # ships no types

from . import containers
from .refusal import Refusal
from .runtime import new_session

MAX_MODEL_BYTES = 2 * 2**30 - 1  # the bound of one protobuf message
MIN_OPSET = 11
DOMAINS = {"": "ai.onnx", "ai.onnx": "ai.onnx", "ai.onnx.ml": "ai.onnx.ml", "com.microsoft": "com.microsoft"}


def check(path: Path) -> dict[str, Any]:
    """Facts about a model that may be used. Raises Refusal."""
    model, graph = read(path), containers.graph_of(path)
    if graph is None:
        _check_self_contained(model)
    else:
        containers.check(path, model, len(graph))
    _check_operators(model)
    try:
        if graph is None:
            onnx.checker.check_model(model, full_check=True)
        else:
            with containers.laid_out(path, graph) as laid_out:
                onnx.checker.check_model(laid_out, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise Refusal(f"the ONNX checker finds it wrong: {_first_line(error)}") from None
    facts = _signature(path)
    return {**facts, "operators": sorted({_name_of(node) for node in nodes_of(model.graph)}), "opset": opset_of(model)}


def read(path: Path) -> onnx.ModelProto:
    """Parse without following references to other files."""
    graph = containers.graph_of(path)
    if graph is None and path.stat().st_size > MAX_MODEL_BYTES:
        raise Refusal(f"it is larger than {MAX_MODEL_BYTES} bytes; larger models need external data")
    try:
        model = onnx.load(path, load_external_data=False) if graph is None else onnx.load_from_string(graph)
    except DecodeError:
        raise Refusal("it is not an ONNX file, or it is truncated") from None
    if not model.graph.node:
        raise Refusal("it is not an ONNX file, or its graph is empty")
    return model


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard operators that the model asks for."""
    return max((entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"}), default=0)


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, those of inner graphs too."""
    for node in graph.node:
        yield node
        for inner in _inner_graphs(node):
            yield from nodes_of(inner)


def _inner_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _check_self_contained(model: onnx.ModelProto) -> None:
    for tensor in _tensors_of(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL and not tensor.external_data:
            continue
        place = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        if Path(place).is_absolute() or ".." in Path(place).parts:
            raise Refusal(f"tensor {tensor.name[:80]!r} points outside its folder: {place[:200]!r}")
        raise Refusal(f"tensor {tensor.name[:80]!r} lies in another file, {place[:200]!r}; hand in one file")


def _tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    graphs = [model.graph, *(inner for node in nodes_of(model.graph) for inner in _inner_graphs(node))]
    for graph in graphs:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    function_nodes = (node for function in model.functions for node in function.node)
    for node in itertools.chain(nodes_of(model.graph), function_nodes):
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors


def _check_operators(model: onnx.ModelProto) -> None:
    if model.functions:
        raise Refusal("it defines functions of its own; export it with them inlined")
    newest = onnx.defs.onnx_opset_version()
    if not MIN_OPSET <= opset_of(model) <= newest:
        raise Refusal(f"it asks for opset {opset_of(model)}; {MIN_OPSET} to {newest} are supported")
    foreign = sorted({_name_of(node) for node in nodes_of(model.graph) if node.domain not in DOMAINS})
    if foreign:
        raise Refusal(f"it needs operators that are not part of ONNX Runtime: {', '.join(foreign)[:300]}")


def _name_of(node: onnx.NodeProto) -> str:
    return node.op_type if node.domain in {"", "ai.onnx"} else f"{node.domain}.{node.op_type}"


def _signature(path: Path) -> dict[str, Any]:
    session = new_session(path)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1:
        raise Refusal(f"it has {len(inputs)} inputs; models with one are supported")
    if not inputs[0].shape or isinstance(inputs[0].shape[0], int):
        raise Refusal(f"the first axis of input {inputs[0].name!r} must be free: it is the batch")
    return {"inputs": [_tensor(each) for each in inputs], "outputs": [_tensor(each) for each in outputs]}


def _tensor(each: Any) -> dict[str, Any]:
    return {"name": each.name, "type": each.type, "shape": list(each.shape)}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
