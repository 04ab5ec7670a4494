"""Broken, hostile and odd models, made by mutation and by hand; each is handed to the sandbox as an upload would be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qoe_service.catalogue import sandbox
from qoe_service.catalogue.sandboxed.footer import FOOTER, MAGIC, WEIGHTS

LIMITS = sandbox.Limits(wall_s=40.0, cpu_s=30, memory_bytes=2**30, file_bytes=2**28)
GRACE_S = 5.0
FLOAT = TensorProto.FLOAT


@dataclass
class Outcomes:
    """How the sandbox took them: accepted, refused with a reason, or one of the two that must not happen."""

    accepted: int = 0
    refusals: int = 0
    unexplained: int = 0
    crashes: int = 0
    hangs: int = 0
    died_inside: int = 0


def hostile_models(valid: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    """``count`` models by name: those made by hand first, then mutations of a valid one, seeded."""
    made = list(by_hand(valid))[:count]
    yield from made
    rng = np.random.default_rng(99)
    mutations = (_flip, _truncate, _swap, _repeat, _zero, _mutate_field)
    for number in range(count - len(made)):
        mutate = mutations[number % len(mutations)]
        yield f"{mutate.__name__.strip('_')} {number}", mutate(valid, rng)


def try_all(models: Iterator[tuple[str, bytes]], data: Path) -> Outcomes:
    """Measure each in the sandbox, as an import does first."""
    found = Outcomes()
    for name, content in models:
        started = time.monotonic()
        try:
            with sandbox.opened(LIMITS) as box:
                (box.folder / "model.onnx").write_bytes(content)
                box.add("data.npz", data.open("rb"))
                box.ask({"command": "measure", "samples": 8})
            found.accepted += 1
        except sandbox.Refused as refusal:
            found.refusals += 1
            found.unexplained += len(str(refusal)) < 15
            found.died_inside += "crashed" in str(refusal)
        except Exception as error:  # noqa: BLE001 - anything else would have killed a worker: that is what is counted
            print(f"  {name}: {type(error).__name__}: {error}")
            found.crashes += 1
        if time.monotonic() - started > LIMITS.wall_s + GRACE_S:
            print(f"  {name}: took {time.monotonic() - started:.0f} s")
            found.hangs += 1
    return found


def by_hand(valid: bytes) -> Iterator[tuple[str, bytes]]:
    """What somebody who means harm, or is careless, would try."""
    yield from {
        "nothing": b"",
        "zeros": bytes(4096),
        "text": b"#!/bin/sh\nrm -rf /\n",
        "a pickle": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
        "a zip": b"PK\x03\x04" + bytes(60),
        "two models": valid + valid,
        "a tail of noise": valid + b"\xff" * 100,
    }.items()
    for name, change in _CHANGES.items():
        model = onnx.load_from_string(valid)
        change(model)
        yield name, model.SerializeToString()
    for place in ("/etc/passwd", "../../secret", "data.npz", "/proc/self/environ", "/dev/zero", "a/../../b"):
        model = onnx.load_from_string(valid)
        _point_outside(model.graph.initializer[-1], place)
        yield f"weights in {place}", model.SerializeToString()
    for name, changed in _CONTAINERS.items():
        yield name, _container(valid, **changed)
    yield "a container of nothing", FOOTER.pack(0, MAGIC)
    yield "a container of noise", bytes(range(256)) + FOOTER.pack(256, MAGIC)
    yield "a container shorter than its graph", valid + FOOTER.pack(2**40, MAGIC)
    for name, nodes in _GRAPHS.items():
        yield name, _graph(nodes)


def _container(valid: bytes, *, location: str = WEIGHTS, offset: int = 0, length: int | None = None) -> bytes:
    """What a model of 2 GiB would come as: weights, then the graph that points at them, and at what it should not."""
    model = onnx.load_from_string(valid)
    tensor = max(model.graph.initializer, key=lambda each: len(each.raw_data))
    weights: bytes = tensor.raw_data
    _point_outside(tensor, location)
    for key, value in (("offset", offset), ("length", len(weights) if length is None else length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    graph: bytes = model.SerializeToString()
    return weights + graph + FOOTER.pack(len(graph), MAGIC)


def _point_outside(tensor: onnx.TensorProto, place: str) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", place


def _set_weights(model: onnx.ModelProto, value: float) -> None:
    each = next(tensor for tensor in model.graph.initializer if len(tensor.dims) > 1)
    each.CopyFrom(numpy_helper.from_array(np.full(tuple(each.dims), value, np.float32), each.name))


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]


def _fix_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def _dims(model: onnx.ModelProto, value: int) -> None:
    model.graph.initializer[-1].dims[0] = value


def _nest(model: onnx.ModelProto, depth: int) -> None:
    graph = helper.make_graph([], "inner", [], [])
    for _ in range(depth):
        node = helper.make_node("If", ["condition"], ["x"], then_branch=graph, else_branch=graph.__class__())
        graph = helper.make_graph([node], "inner", [], [])
    model.graph.node.append(helper.make_node("If", ["condition"], ["x"], then_branch=graph))


_CONTAINERS: dict[str, dict[str, Any]] = {
    "a sound container": {},
    "a container with weights in /etc/passwd": {"location": "/etc/passwd"},
    "a container with weights in another folder": {"location": f"../{WEIGHTS}"},
    "a container with weights before its beginning": {"offset": -1},
    "a container with weights beyond its end": {"offset": 2**40},
    "a container with weights in its graph": {"offset": 100},
    "a container with endless weights": {"length": 2**62},
    "a container with too few weights": {"length": 4},
}
_CHANGES: dict[str, Callable[[onnx.ModelProto], object]] = {
    "weights that are not numbers": lambda model: _set_weights(model, np.nan),
    "endless weights": lambda model: _set_weights(model, np.inf),
    "huge weights": lambda model: _set_weights(model, 3e38),
    "a cycle": _cycle,
    "a fixed batch": _fix_batch,
    "a negative size": lambda model: _dims(model, -1),
    "a size beyond memory": lambda model: _dims(model, 2**62),
    "a size that overflows": lambda model: _dims(model, 2**63 - 1),
    "deeply nested graphs": lambda model: _nest(model, 20),
    "no nodes": lambda model: model.graph.ClearField("node"),
    "no inputs": lambda model: model.graph.ClearField("input"),
    "no outputs": lambda model: model.graph.ClearField("output"),
    "no weights": lambda model: model.graph.ClearField("initializer"),
    "no opset": lambda model: model.ClearField("opset_import"),
    "an opset of long ago": lambda model: setattr(model.opset_import[0], "version", 3),
    "an opset to come": lambda model: setattr(model.opset_import[0], "version", 9999),
    "a future file format": lambda model: setattr(model, "ir_version", 9999),
    "an unknown operator": lambda model: setattr(model.graph.node[1], "op_type", "Nonsense"),
    "a foreign domain": lambda model: setattr(model.graph.node[1], "domain", "evil.example"),
    "a training operator": lambda model: setattr(model.graph.node[1], "domain", "ai.onnx.preview.training"),
    "one name twice": lambda model: model.graph.node.append(model.graph.node[1]),
    "a second input": lambda model: model.graph.input.append(helper.make_tensor_value_info("other", FLOAT, ["b", 4])),
    "a wrong output": lambda model: setattr(model.graph.output[0], "name", "nowhere"),
    "a million characters of name": lambda model: setattr(model.graph, "name", "x" * 1_000_000),
    "a function of its own": lambda model: model.functions.add(name="f", domain="evil.example"),
    "a sparse weight": lambda model: model.graph.sparse_initializer.add(),
}

_BOMB = helper.make_tensor("size", TensorProto.INT64, [2], [2**20, 2**20])
_LOOP = helper.make_graph(
    [helper.make_node("Identity", ["going"], ["still"]), helper.make_node("Identity", ["state"], ["next"])],
    "forever",
    [
        helper.make_tensor_value_info("turn", TensorProto.INT64, []),
        helper.make_tensor_value_info("going", TensorProto.BOOL, []),
        helper.make_tensor_value_info("state", FLOAT, None),
    ],
    [helper.make_tensor_value_info("still", TensorProto.BOOL, []), helper.make_tensor_value_info("next", FLOAT, None)],
)
_GRAPHS: dict[str, list[onnx.NodeProto]] = {
    "a memory bomb": [
        helper.make_node("Constant", [], ["size"], value=_BOMB),
        helper.make_node("ConstantOfShape", ["size"], ["bomb"]),
        helper.make_node("ReduceSum", ["bomb"], ["total"]),
        helper.make_node("Cast", ["image"], ["floats"], to=FLOAT),
        helper.make_node("Flatten", ["floats"], ["rows"]),
        helper.make_node("Add", ["rows", "total"], ["logits"]),
    ],
    "an endless loop": [
        helper.make_node("Constant", [], ["always"], value=helper.make_tensor("t", TensorProto.BOOL, [], [True])),
        helper.make_node("Constant", [], ["turns"], value=helper.make_tensor("n", TensorProto.INT64, [], [2**62])),
        helper.make_node("Cast", ["image"], ["floats"], to=FLOAT),
        helper.make_node("Loop", ["turns", "always", "floats"], ["spun"], body=_LOOP),
        helper.make_node("Flatten", ["spun"], ["logits"]),
    ],
    "divides by nothing": [
        helper.make_node("Cast", ["image"], ["floats"], to=FLOAT),
        helper.make_node("Sub", ["floats", "floats"], ["zero"]),
        helper.make_node("Div", ["floats", "zero"], ["nothing"]),
        helper.make_node("Flatten", ["nothing"], ["logits"]),
    ],
    "answers with text": [
        helper.make_node("Cast", ["image"], ["text"], to=TensorProto.STRING),
        helper.make_node("Flatten", ["text"], ["logits"]),
    ],
    "answers without a batch": [
        helper.make_node("Cast", ["image"], ["floats"], to=FLOAT),
        helper.make_node("ReduceSum", ["floats"], ["logits"], keepdims=0),
    ],
    "a chain of 20000 nodes": [
        helper.make_node("Cast", ["image"], ["n0"], to=FLOAT),
        *(helper.make_node("Neg", [f"n{number}"], [f"n{number + 1}"]) for number in range(20_000)),
        helper.make_node("Flatten", ["n20000"], ["logits"]),
    ],
}


def _graph(nodes: list[onnx.NodeProto]) -> bytes:
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 1, 32, 32])
    logits = helper.make_tensor_value_info("logits", FLOAT, None)
    graph = helper.make_graph(nodes, "odd", [image], [logits])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def _flip(valid: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(valid)
    for place in rng.integers(0, len(changed), rng.integers(1, 40)):
        changed[place] ^= 1 << int(rng.integers(0, 8))
    return bytes(changed)


def _truncate(valid: bytes, rng: np.random.Generator) -> bytes:
    return valid[: int(rng.integers(1, len(valid)))]


def _swap(valid: bytes, rng: np.random.Generator) -> bytes:
    first, second = sorted(rng.integers(0, len(valid), 2).tolist())
    return valid[second:] + valid[first:second] + valid[:first]


def _repeat(valid: bytes, rng: np.random.Generator) -> bytes:
    first, second = sorted(rng.integers(0, min(len(valid), 4096), 2).tolist())
    return valid[:second] + valid[first:second] * 3 + valid[second:]


def _zero(valid: bytes, rng: np.random.Generator) -> bytes:
    # the graph's structure stands at the front, the weights behind it
    start = int(rng.integers(0, min(len(valid), 3000)))
    length = int(rng.integers(1, 64))
    return valid[:start] + bytes(length) + valid[start + length :]


def _mutate_field(valid: bytes, rng: np.random.Generator) -> bytes:
    """A file that parses, and says something else: one attribute, input, shape or type of it changed."""
    model = onnx.load_from_string(valid)
    node = model.graph.node[int(rng.integers(0, len(model.graph.node)))]
    kind = int(rng.integers(0, 6))
    if kind == 0 and node.attribute:
        attribute = node.attribute[int(rng.integers(0, len(node.attribute)))]
        attribute.i = int(rng.integers(-(2**40), 2**40))
        attribute.ints[:] = [int(value) for value in rng.integers(-5, 2**33, max(len(attribute.ints), 1))]
    elif kind == 1:
        node.input[:] = [str(rng.choice([*node.input, "nowhere"])) for _ in node.input]
    elif kind == 2:
        node.op_type = str(
            rng.choice(["Conv", "Gemm", "MatMul", "Reshape", "Gather", "LSTM", "Loop", "Resize", "Tile"])
        )
    elif kind == 3:
        tensor = model.graph.initializer[int(rng.integers(0, len(model.graph.initializer)))]
        tensor.data_type = int(rng.integers(0, 24))
    elif kind == 4:
        tensor = model.graph.initializer[int(rng.integers(0, len(model.graph.initializer)))]
        tensor.dims[:] = [int(value) for value in rng.integers(-2, 2**20, max(len(tensor.dims), 1))]
    else:
        model.graph.input[0].type.tensor_type.elem_type = int(rng.integers(0, 24))
    return bytes(model.SerializeToString())
