"""Low-rank factorisation: a large matrix becomes the product of two thin ones, chosen for the inputs it really sees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from . import activations, channel_groups, checks
from . import graph as graphs
from .channel_groups import Weights
from .datasets import Dataset
from .interface import Task
from .memory import Held
from .refusal import Refusal

PREPARED = Path("prepared.onnx")
MIN_SIDE, MAX_SIDE, ROUND = 64, 8192, 8
DAMPING = 1e-2  # of the mean variance: inputs that calibration never showed still count a little
MOST_COST = 0.75  # a factorisation that keeps more multiplications than this is not worth a second layer

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Factors:
    """``left`` [inputs, rank] times ``right`` [rank, outputs]; the mean of what is lost, per output."""

    left: Matrix
    right: Matrix
    lost: Matrix


class LowRank:
    """Factorises dense layers whose inputs, weighted by the layer, span few directions."""

    name = "low-rank"
    uses_calibration = True

    def why_not(self, model: onnx.ModelProto, data: Dataset | None) -> str | None:
        """It needs a large dense layer, and samples that show which directions matter."""
        if quantised := graphs.why_quantised(model):
            return quantised
        if data is None:
            return "it needs calibration samples, and the application has no data set"
        if not _large_layers(model):
            return f"the model has no dense layer with both sides of {MIN_SIDE} or more"
        return None

    def held_bytes(self, layers: Held, task: Task) -> int:
        """What large layers read is collected."""
        axes = {node.input[0]: -1 for node in _large_layers(checks.read(task.source))}
        return activations.collected_bytes(layers, axes, task)

    def apply(self, task: Task) -> None:
        """Factorise every large layer that is worth it; refuse when none is."""
        assert task.data is not None
        model = graphs.prepare(task.source, PREPARED)
        layers = _large_layers(model)
        samples = task.data.calibration_inputs[: task.parameters["calibration_samples"]]
        found = activations.collect(model, samples, {node.input[0]: -1 for node in layers}, task=task)
        count = 0
        for node in layers:
            layer = _matrix(model, node)
            factors = factorise(
                layer,
                found[node.input[0]],
                float(task.parameters["keep_energy"]),
                has_bias=channel_groups.can_shift(model, node),
            )
            if factors.left.shape[1] * sum(layer.shape) <= MOST_COST * layer.size:
                _replace(model, node, factors)
                count += 1
        if not count:
            raise Refusal(
                f"low-rank does not help here: at {task.parameters['keep_energy']:.1%} of the energy no dense layer "
                f"loses a quarter of its multiplications"
            )
        del model.graph.value_info[:]
        onnx.save(model, task.target)


def factorise(matrix: Matrix, rows: NDArray[Any], keep_energy: float, *, has_bias: bool = True) -> Factors:
    """The best factors for these inputs: the directions of the layer's answers, or of its whitened inputs, that vary
    most. Only the shorter side is decomposed. A bias can make up for what the mean loses, so then only the rest counts.
    """
    mean = rows.mean(axis=0, dtype=np.float64)
    seen = rows - mean if has_bias else rows.astype(np.float64)
    second_moment = (seen.T @ seen) / len(rows)
    second_moment += DAMPING * max(np.trace(second_moment) / len(second_moment), 1e-12) * np.eye(len(second_moment))
    if matrix.shape[0] < matrix.shape[1]:
        root = np.linalg.cholesky(second_moment)
        whitened = root.T @ matrix
        directions = _strongest(whitened @ whitened.T, keep_energy)
        left, right = np.asarray(np.linalg.solve(root.T, directions), dtype=np.float64), directions.T @ whitened
    else:
        directions = _strongest(matrix.T @ second_moment @ matrix, keep_energy)
        left, right = matrix @ directions, directions.T
    return Factors(left, right, np.asarray(mean @ matrix - (mean @ left) @ right, dtype=np.float64))


def _strongest(gram: Matrix, keep_energy: float) -> Matrix:
    """The eigenvectors of the largest eigenvalues that hold this share of their sum, as columns."""
    values, vectors = np.linalg.eigh(gram)
    energy = np.cumsum(np.maximum(values[::-1], 0)) / max(values.clip(0).sum(), 1e-30)
    rank = min(-(-int(np.searchsorted(energy, keep_energy) + 1) // ROUND) * ROUND, len(values))
    return np.asarray(vectors[:, ::-1][:, :rank])


def _large_layers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    weights = Weights(model)
    readers = graphs.consumers(model.graph)
    found = []
    for node in model.graph.node:
        if node.op_type not in graphs.DENSE or node.input[1] not in weights or len(readers[node.input[1]]) > 1:
            continue
        shape = weights.shape(node.input[1])
        if len(shape) == 2 and min(shape) >= MIN_SIDE and max(shape) <= MAX_SIDE and channel_groups.is_plain(node):
            found.append(node)
    return found


def _matrix(model: onnx.ModelProto, node: onnx.NodeProto) -> Matrix:
    values = Weights(model).get(node.input[1]).astype(np.float64)
    return values.T if channel_groups.transposed(node) else values


def _replace(model: onnx.ModelProto, node: onnx.NodeProto, factors: Factors) -> None:
    """MatMul by the left factor, then the layer as it was with the right one; a bias takes the mean loss."""
    name, weights = node.output[0], Weights(model)
    left = numpy_helper.from_array(factors.left.astype(np.float32), f"{name}_left")
    model.graph.initializer.append(left)
    first = helper.make_node("MatMul", [node.input[0], left.name], [f"{name}_thin"], name=f"{name}_first")
    position = next(index for index, each in enumerate(model.graph.node) if each.output[0] == name)
    model.graph.node.insert(position, first)
    second = model.graph.node[position + 1]
    second.input[0] = first.output[0]
    weights.set(second.input[1], factors.right.T if channel_groups.transposed(second) else factors.right)
    channel_groups.shift_bias(model, second, factors.lost)
