"""Tiny ONNX models, built on the spot: one input x [n, 4], one output y [n, 4] = x * factor."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

WIDTH = 4


@dataclass(frozen=True)
class Model:
    """Bytes of a model and their digest."""

    content: bytes

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def write(self, path: Path) -> Path:
        path.write_bytes(self.content)
        return path


def scaling(factor: float, *, output: str = "y", rows: int | str = "n") -> Model:
    """y = x * factor. ``rows`` fixes the batch axis; another ``output`` name makes it no replacement."""
    nodes = [helper.make_node("Mul", ["x", "factor"], [output])]
    constant = helper.make_tensor("factor", TensorProto.FLOAT, [1], [factor])
    return _model(nodes, [constant], [rows, WIDTH], output, [rows, WIDTH])


def not_finite() -> Model:
    """Divides by zero: loads, runs, and answers infinity."""
    return scaling(float("inf"))


def drawing_lots() -> Model:
    """y = x plus noise: never the same twice."""
    nodes = [helper.make_node("RandomNormalLike", ["x"], ["noise"]), helper.make_node("Add", ["x", "noise"], ["y"])]
    return _model(nodes, [], ["n", WIDTH], "y", ["n", WIDTH])


def summing() -> Model:
    """Promises a row per row of input, and answers one row whatever the batch."""
    nodes = [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=1)]
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [0])
    return _model(nodes, [axes], ["n", WIDTH], "y", ["n", WIDTH])


def dense(width: int = 768, layers: int = 3) -> Model:
    """Matrix products, for runs that take a while; factor-like in nothing but its shape."""
    rng = np.random.default_rng(7)
    sizes = [WIDTH, *[width] * layers, WIDTH]
    nodes, constants, last = [], [], "x"
    for index, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        weights = (rng.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)
        constants.append(helper.make_tensor(f"w{index}", TensorProto.FLOAT, weights.shape, weights.tobytes(), raw=True))
        following = "y" if index == layers else f"h{index}"
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [following]))
        last = following
    return _model(nodes, constants, ["n", WIDTH], "y", ["n", WIDTH])


def adding() -> Model:
    """y [n, 1] = the sum of each row of x [n, any width]: requests of different widths cannot be joined."""
    nodes = [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=1)]
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    return _model(nodes, [axes], ["n", "width"], "y", ["n", 1])


def picky() -> Model:
    """Gathers by an index input: fails on an index out of range, and on that alone."""
    table = helper.make_tensor("table", TensorProto.FLOAT, [2, WIDTH], [1.0] * WIDTH + [2.0] * WIDTH)
    nodes = [helper.make_node("Gather", ["table", "index"], ["y"], axis=0)]
    return _finished(
        nodes,
        [table],
        helper.make_tensor_value_info("index", TensorProto.INT64, ["n"]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", WIDTH]),
    )


def echo(element_type: int, *, size: int | str = 3, rows: int | str = 1) -> Model:
    """y = x for any element type, in rows of ``size``: one, unless ``rows`` leaves that open."""
    return _finished(
        [helper.make_node("Identity", ["x"], ["y"])],
        [],
        helper.make_tensor_value_info("x", element_type, [rows, size]),
        helper.make_tensor_value_info("y", element_type, [rows, size]),
    )


def _model(
    nodes: list[Any], constants: list[Any], input_shape: list[Any], output: str, output_shape: list[Any]
) -> Model:
    return _finished(
        nodes,
        constants,
        helper.make_tensor_value_info("x", TensorProto.FLOAT, input_shape),
        helper.make_tensor_value_info(output, TensorProto.FLOAT, output_shape),
    )


def _finished(nodes: list[Any], constants: list[Any], taken: Any, given: Any) -> Model:
    graph = helper.make_graph(nodes, "tiny", [taken], [given], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return Model(model.SerializeToString())
