"""Tiny real ONNX models and a data set that they solve: which quarter of an 8×8 picture is the brightest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

SIDE, CLASSES = 8, 4
OPSET = [helper.make_opsetid("", 17)]


def quarters() -> NDArray[np.float32]:
    """Weights [64, 4] that add up the pixels of each quarter."""
    masks = np.zeros((CLASSES, SIDE, SIDE), dtype=np.float32)
    for each in range(CLASSES):
        row, column = divmod(each, 2)
        masks[each, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = 1.0
    return masks.reshape(CLASSES, -1).T.copy()


def pictures(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pictures uint8 [count, 1, 8, 8] and the number of their brightest quarter."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    images = rng.integers(0, 120, (count, SIDE * SIDE)) + (quarters()[:, labels].T * 100).astype(np.int64)
    return images.astype(np.uint8).reshape(count, 1, SIDE, SIDE), labels


def write_data(path: Path, **replaced: Any) -> Path:
    """A sound data set, but for what is replaced; None leaves an array out."""
    calibration, _ = pictures(64, seed=1)
    inputs, labels = pictures(200, seed=2)
    arrays = {"calibration_inputs": calibration, "heldout_inputs": inputs, "heldout_labels": labels, **replaced}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def dense_model(seed: int = 0) -> onnx.ModelProto:
    """Reads a picture with one MatMul; right on every picture. Seeds make different bytes."""
    noise = np.random.default_rng(seed).normal(scale=1e-4, size=(SIDE * SIDE, CLASSES))
    weights = quarters() + noise.astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["pixels"]),
        helper.make_node("Flatten", ["pixels"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weights"], ["logits"]),
    ]
    return model(nodes, {"scale": np.array(1 / 255, dtype=np.float32), "weights": weights})


def conv_model() -> onnx.ModelProto:
    """Reads a picture with one convolution over quarters; right on every picture."""
    kernel = np.ones((1, 1, 4, 4), dtype=np.float32) / 16
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["pixels"]),
        helper.make_node("Conv", ["pixels", "kernel"], ["means"], strides=[4, 4]),
        helper.make_node("Relu", ["means"], ["positive"]),
        helper.make_node("Flatten", ["positive"], ["logits"]),
    ]
    return model(nodes, {"scale": np.array(1 / 255, dtype=np.float32), "kernel": kernel})


def model(
    nodes: list[onnx.NodeProto],
    constants: dict[str, NDArray[Any]],
    *,
    batch: str | int = "batch",
    opsets: list[onnx.OperatorSetIdProto] | None = None,
) -> onnx.ModelProto:
    """`image` uint8 [batch, 1, 8, 8] to `logits` float32 [batch, 4] by these nodes."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [batch, 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=opsets or OPSET, ir_version=9)


def write_model(path: Path, content: onnx.ModelProto) -> Path:
    path.write_bytes(content.SerializeToString(deterministic=True))
    return path


def weightless_model() -> onnx.ModelProto:
    """The mean of each quarter, without any weight."""
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("AveragePool", ["floats"], ["means"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Flatten", ["means"], ["logits"]),
    ]
    return model(nodes, {})
