"""Three kinds of models, built on the spot with fixed seeds: what batching gains differs between them by ten times.

Random weights: times are real, answers mean nothing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

OPSET, IR = 17, 9


@dataclass(frozen=True)
class BenchmarkModel:
    """One model: input ``x`` [n, *row], output ``y``. ``slo_runs`` is its SLO in runs of one row."""

    name: str
    row: tuple[int, ...]
    slo_runs: float
    why: str

    def write(self, folder: Path) -> Path:
        """Its ONNX file, made if it is missing."""
        path = folder / f"{self.name}.onnx"
        if not path.exists():
            path.write_bytes(BUILDERS[self.name]())
        return path

    def inputs(self, rows: int = 1) -> dict[str, np.ndarray[Any, Any]]:
        """Deterministic inputs."""
        return {"x": np.random.default_rng(0).standard_normal((rows, *self.row)).astype(np.float32)}


DENSE = BenchmarkModel("dense", (256,), 5.0, "weights are read once per run: batching pays")
CONV = BenchmarkModel("conv", (3, 64, 64), 5.0, "arithmetic per row: batching does not pay")
TINY = BenchmarkModel("tiny", (32,), 60.0, "a run costs next to nothing: everything else counts")
ECHO = BenchmarkModel("echo", (16,), 100.0, "no work at all: the path to the model and back")
KINDS = (DENSE, CONV, TINY)


def _dense() -> bytes:
    return _mlp([256, 4096, 4096, 256])


def _tiny() -> bytes:
    return _mlp([32, 64, 10])


def _echo() -> bytes:
    return _model([helper.make_node("Identity", ["x"], ["y"])], [], ["n", 16], ["n", 16])


def _mlp(sizes: list[int]) -> bytes:
    nodes, weights, last = [], [], "x"
    for index, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        is_last = index == len(sizes) - 2
        weights.append(_weights(f"w{index}", (rows, columns), seed=index))
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], ["y" if is_last else f"m{index}"]))
        if not is_last:
            nodes.append(helper.make_node("Relu", [f"m{index}"], [f"h{index}"]))
        last = f"h{index}"
    return _model(nodes, weights, ["n", sizes[0]], ["n", sizes[-1]])


def _conv() -> bytes:
    channels = [3, 32, 64, 64, 96, 96]
    nodes, weights, last = [], [], "x"
    for index, (before, after) in enumerate(itertools.pairwise(channels)):
        weights.append(_weights(f"w{index}", (after, before, 3, 3), seed=index))
        stride = 2 if index == 2 else 1
        attributes: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [stride, stride]}
        nodes.append(helper.make_node("Conv", [last, f"w{index}"], [f"c{index}"], **attributes))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"]))
        last = f"r{index}"
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["y"]))
    return _model(nodes, weights, ["n", 3, 64, 64], ["n", channels[-1]])


BUILDERS = {"dense": _dense, "conv": _conv, "tiny": _tiny, "echo": _echo}


def _weights(name: str, shape: tuple[int, ...], *, seed: int) -> Any:
    fan_in = int(np.prod(shape[1:])) if len(shape) == 4 else shape[0]
    values = (np.random.default_rng(seed).standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
    return helper.make_tensor(name, TensorProto.FLOAT, shape, values.tobytes(), raw=True)


def _model(nodes: list[Any], weights: list[Any], taken: list[Any], given: list[Any]) -> bytes:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, taken)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, given)
    graph = helper.make_graph(nodes, "benchmark", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    content: bytes = model.SerializeToString()
    return content
