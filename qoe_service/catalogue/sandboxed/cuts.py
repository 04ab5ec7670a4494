"""Where a model can be cut in two so that one tensor carries everything over, and the two halves themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from . import activations, checks, containers, cost
from .refusal import Refusal
from .runtime import new_session

MOST_CUTS = 64
ROWS_WATCHED = 3  # one row, then two, and every tensor of them is kept
HEAD, TAIL = Path("head.onnx"), Path("tail.onnx")
_TYPES = {np.dtype(each): onnx.helper.np_dtype_to_tensor_dtype(np.dtype(each)) for each in ("float32", "uint8", "int8")}


def find(path: Path, sample: NDArray[Any]) -> list[dict[str, Any]]:
    """Legal cuts in graph order: tensor, type, shape and bytes per row, floating-point operations before and after.

    ``sample`` is two rows of input. Of neighbouring cuts with the same work before them the smallest is kept; in a
    quantised model that is the one in bytes, between QuantizeLinear and DequantizeLinear.
    """
    model = _readable(path)
    candidates = list(_single_tensors(model.graph))
    if not candidates:
        return []
    seen, batched = _seen(model, sample)
    shapes = {**cost.shapes_of(model), **{name: list(value.shape) for name, value in seen.items()}}
    costs = [2 * cost.multiplications(node, shapes) for node in model.graph.node]
    done = np.cumsum(costs)
    best: dict[float, dict[str, Any]] = {}
    for position, name in candidates:
        value = seen.get(name)
        if value is None or name not in batched or value.dtype not in _TYPES or not 0 < done[position] < done[-1]:
            continue  # with all the work on one side there is nothing to share
        before, known = float(done[position]), best.get(float(done[position]))
        if known is None or value.nbytes < known["bytes"]:
            best[before] = {
                "tensor": name,
                "dtype": str(value.dtype),
                "shape": list(value.shape[1:]),
                "bytes": int(value.nbytes),
                "flops_before": before,
                "flops_after": float(done[-1]) - before,
            }
    return list(best.values())[:MOST_CUTS]


def split(path: Path, tensor: str, sample: NDArray[Any]) -> dict[str, Any]:
    """Write both halves, and check on samples that together they are the whole. Raises Refusal."""
    model = _readable(path)
    position = next((position for position, name in _single_tensors(model.graph) if name == tensor), None)
    if position is None:
        raise Refusal(f"{tensor[:200]!r} is no cut: it does not exist, or more than one tensor is needed behind it")
    value = _seen(model, sample, [tensor])[0][tensor]
    if value.dtype not in _TYPES:
        raise Refusal(f"{tensor[:200]!r} holds {value.dtype}; cuts carry float32, uint8 or int8")
    boundary = onnx.helper.make_tensor_value_info(tensor, _TYPES[value.dtype], ["batch", *value.shape[1:]])
    nodes = list(model.graph.node)
    _write(HEAD, model, nodes[: position + 1], list(model.graph.input), [boundary])
    _write(TAIL, model, nodes[position + 1 :], [boundary], list(model.graph.output))
    whole, carried = _run(path, sample), _run(HEAD, sample)
    joined = _run(TAIL, carried)
    lost = float(np.abs(whole.astype(np.float64) - joined).max())
    allowed = 1e-4 * max(float(np.abs(whole).max()), 1.0)
    if not lost <= allowed:
        raise Refusal(f"the halves at {tensor[:200]!r} differ from the whole by {lost:g}")
    return {"largest_difference": lost}


def _readable(path: Path) -> onnx.ModelProto:
    if containers.graph_of(path) is not None:
        raise Refusal("models of 2 GiB and more are not cut")
    return checks.read(path)


def _single_tensors(graph: onnx.GraphProto) -> Iterator[tuple[int, str]]:
    """(position of a node, tensor) wherever exactly one tensor that depends on the input is needed afterwards."""
    constants = {each.name for each in graph.initializer}
    outputs = {each.name for each in graph.output}
    last_use = {name: number for number, node in enumerate(graph.node) for name in _names_read(node)}
    alive = {each.name for each in graph.input if each.name not in constants}
    depends = set(alive)
    for number, node in enumerate(graph.node):
        if any(name in depends for name in _names_read(node)):
            depends.update(name for name in node.output if name)
            alive.update(name for name in node.output if name)
        alive = {name for name in alive if last_use.get(name, -1) > number or name in outputs}
        # what does not depend on the input is computed by whichever half needs it
        (only,) = alive if len(alive) == 1 else ("",)
        if only and only not in outputs and only in node.output:
            yield number, only


def _names_read(node: onnx.NodeProto) -> set[str]:
    names = set(node.input)
    for attribute in node.attribute:
        inner = [attribute.g] if attribute.HasField("g") else []
        for graph in (*inner, *attribute.graphs):
            for each in graph.node:
                names |= _names_read(each)
            names |= {each.name for each in graph.output}
    return names - {""}


def _seen(
    model: onnx.ModelProto, sample: NDArray[Any], names: Sequence[str] = ()
) -> tuple[dict[str, NDArray[Any]], set[str]]:
    """What every tensor holds for one row, and the names of those whose first axis follows the batch."""
    wanted = list(names) or [name for node in model.graph.node for name in node.output if name]
    session = activations.watching_session(model, wanted)
    input_name = session.get_inputs()[0].name
    one, two = (session.run(wanted, {input_name: sample[:rows]}) for rows in (1, 2))
    found = {name: value for name, value in zip(wanted, one, strict=True) if isinstance(value, np.ndarray)}
    sizes = {name: value.shape[:1] for name, value in zip(wanted, two, strict=True) if isinstance(value, np.ndarray)}
    return found, {name for name, value in found.items() if (value.shape[:1], sizes.get(name)) == ((1,), (2,))}


def _write(
    path: Path,
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
) -> None:
    nodes = _needed(model, nodes, {each.name for each in outputs})
    read = {name for node in nodes for name in _names_read(node)}
    graph = onnx.helper.make_graph(
        nodes,
        model.graph.name or "half",
        inputs,
        outputs,
        [each for each in model.graph.initializer if each.name in read],
    )
    half = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    path.write_bytes(half.SerializeToString(deterministic=True))


def _needed(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """The nodes that ``wanted`` follows from, and those before the cut that make constants for them."""
    mine = {name for node in nodes for name in node.output}
    constant = _constant_nodes(model.graph)
    pool = [node for node in model.graph.node if node.output[0] in mine or node.output[0] in constant]
    needed, kept = set(wanted), list[onnx.NodeProto]()
    for node in reversed(pool):
        if needed & set(node.output):
            kept.append(node)
            needed |= _names_read(node)
    return kept[::-1]


def _constant_nodes(graph: onnx.GraphProto) -> Mapping[str, onnx.NodeProto]:
    """Nodes that do not depend on the input, by their first output."""
    constants = {each.name for each in graph.initializer}
    depends = {each.name for each in graph.input if each.name not in constants}
    found = {}
    for node in graph.node:
        if depends & _names_read(node):
            depends.update(node.output)
        else:
            found[node.output[0]] = node
    return found


def _run(path: Path, inputs: NDArray[Any]) -> NDArray[Any]:
    session = new_session(path)
    return np.asarray(session.run(None, {session.get_inputs()[0].name: inputs})[0])
