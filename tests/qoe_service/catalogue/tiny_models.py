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


def wide_model(copies: int = 12) -> onnx.ModelProto:
    """Two convolutions and a read-out; the 4 channels between them are there ``copies`` times."""
    rng = np.random.default_rng(5)
    first = np.repeat(rng.normal(size=(4, 1, 3, 3)), copies, axis=0) + rng.normal(size=(4 * copies, 1, 3, 3)) * 1e-3
    # every copy passes the brightness of its place on, and the second convolution adds them up again
    first[:, :, 1, 1] += 2
    second = np.zeros((64, 4 * copies, 3, 3))
    second[:, :, 1, 1] = 1 / (4 * copies) + rng.normal(size=(64, 4 * copies)) * 1e-3
    read_out = quarters().reshape(SIDE * SIDE, CLASSES)[None].repeat(64, axis=0).reshape(-1, CLASSES) / 64
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["pixels"]),
        helper.make_node("Conv", ["pixels", "first", "first_bias"], ["one"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["one"], ["two"]),
        helper.make_node("Conv", ["two", "second", "second_bias"], ["three"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["three"], ["four"]),
        helper.make_node("Flatten", ["four"], ["rows"]),
        helper.make_node("Gemm", ["rows", "read_out", "read_out_bias"], ["logits"]),
    ]
    constants = {
        "scale": np.array(1 / 255),
        "first": first,
        "first_bias": np.zeros(4 * copies),
        "second": second,
        "second_bias": np.zeros(64),
        "read_out": read_out,
        "read_out_bias": np.zeros(CLASSES),
    }
    return model(nodes, {name: np.asarray(value, dtype=np.float32) for name, value in constants.items()})


def factor_model(rank: int = 8) -> onnx.ModelProto:
    """Reads a picture through a 64×128 matrix of this rank."""
    rng = np.random.default_rng(6)
    thin = np.concatenate([quarters(), rng.normal(size=(SIDE * SIDE, rank - CLASSES)) * 0.1], axis=1)
    spread = np.linalg.qr(rng.normal(size=(128, rank)))[0]
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["pixels"]),
        helper.make_node("Flatten", ["pixels"], ["rows"]),
        helper.make_node("MatMul", ["rows", "large"], ["hidden"]),
        helper.make_node("Add", ["hidden", "bias"], ["shifted"]),
        helper.make_node("MatMul", ["shifted", "read_out"], ["logits"]),
    ]
    constants = {"scale": np.array(1 / 255), "large": thin @ spread.T, "bias": np.zeros(128), "read_out": spread[:, :4]}
    return model(nodes, {name: np.asarray(value, dtype=np.float32) for name, value in constants.items()})


def shape_arithmetic_model() -> onnx.ModelProto:
    """The dense model as exporters write it: the shape to flatten to is computed, and a normalisation stays."""
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Identity", ["floats"], ["same"]),
        helper.make_node("BatchNormalization", ["same", "scales", "zeros", "zeros", "ones"], ["pixels"]),
        helper.make_node("Mul", ["two", "half"], ["one"]),
        helper.make_node("Mul", ["pixels", "one"], ["scaled"]),
        helper.make_node("Flatten", ["scaled"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weights"], ["logits"]),
    ]
    constants = {"scales": np.full(1, 1 / 255), "zeros": np.zeros(1), "ones": np.ones(1), "weights": quarters()}
    constants |= {"two": np.array(2.0), "half": np.array(0.5)}
    return model(nodes, {name: np.asarray(value, dtype=np.float32) for name, value in constants.items()})
