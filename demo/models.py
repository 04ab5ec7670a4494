"""The demo's models and data: where they are, and how the one too large to commit is built.

Training is in `training.py`; deploying, serving and compressing them is the product's work.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Application = Literal["digits", "parity"]

HERE = Path(__file__).parent
MODELS_FOLDER, DATA_FOLDER = HERE / "models", HERE / "data"
READOUT_FILE = "parity-readout.npz"
IMAGE_SIDE = 32
DIGITS_CLASSES, PARITY_CLASSES = 10, 2
OPSET, IR_VERSION = 17, 9

PARITY_FEATURES = 8192
PARITY_SEED = 1997
PARITY_SHA256 = "7feff36a249ba14460b1e840c3e59f95c4de28436dad7e0f7284de34b2a8a660"


@dataclass(frozen=True)
class DemoModel:
    """One ONNX model of an application. `input_shape` is one item's, without the batch axis; inputs are uint8."""

    application: Application
    name: str
    path: Path
    input_name: str
    input_shape: tuple[int, ...]
    output_name: str = "logits"

    @property
    def size_bytes(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True)
class DemoData:
    """Raw inputs uint8 [n, *input_shape] and labels int64 [n]. Calibration, held-out and training images come from
    different originals."""

    calibration_inputs: NDArray[np.uint8]
    calibration_labels: NDArray[np.int64]
    heldout_inputs: NDArray[np.uint8]
    heldout_labels: NDArray[np.int64]


def digits_models() -> tuple[DemoModel, ...]:
    """The committed CNNs that read a digit, from the smallest to the largest."""
    shape = (1, IMAGE_SIDE, IMAGE_SIDE)
    names = ("digits-small", "digits-medium", "digits-large")
    return tuple(DemoModel("digits", name, MODELS_FOLDER / f"{name}.onnx", "image", shape) for name in names)


def parity_model(folder: Path) -> DemoModel:
    """The dense model that tells odd digits from even ones, built in `folder` unless it is already there."""
    path = folder / "parity-dense.onnx"
    if not path.exists() or sha256(path) != PARITY_SHA256:
        write_atomically(path, parity_bytes(MODELS_FOLDER / READOUT_FILE))
    return DemoModel("parity", path.stem, path, "image", (IMAGE_SIDE * IMAGE_SIDE,))


def load_data(application: Application) -> DemoData:
    """Calibration and held-out data in the shape of the application's models."""
    with np.load(DATA_FOLDER / "digits.npz") as arrays:
        digits = DemoData(**{name: arrays[name] for name in arrays.files})
    return digits if application == "digits" else as_parity(digits)


def as_parity(digits: DemoData) -> DemoData:
    """The same pictures as flat rows uint8 [n,1024], labelled 1 for an odd digit and 0 for an even one."""
    return DemoData(
        calibration_inputs=digits.calibration_inputs.reshape(len(digits.calibration_labels), -1),
        calibration_labels=digits.calibration_labels % 2,
        heldout_inputs=digits.heldout_inputs.reshape(len(digits.heldout_labels), -1),
        heldout_labels=digits.heldout_labels % 2,
    )


def parity_features() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights [1024,8192] and biases [8192] of the hidden layer, drawn once and never trained.

    A unit compares the mean brightness of two pairs of random rectangles (after Viola and Jones, CVPR 2001). Only
    PCG64's raw output and correctly rounded arithmetic are used, so the bytes depend on no library version.
    """
    raw = np.random.PCG64(PARITY_SEED).random_raw((PARITY_FEATURES, 4, 4))
    extent = 2 + raw[..., :2] % 9  # 2 to 10 pixels
    start = raw[..., 2:] % (IMAGE_SIDE + 1 - extent)
    pixel = np.arange(IMAGE_SIDE, dtype=np.uint64)
    inside = (pixel >= start[..., None]) & (pixel < (start + extent)[..., None])
    signs = np.array([1, -1, 1, -1], dtype=np.float32) / extent.prod(axis=-1).astype(np.float32)
    weights = np.zeros((PARITY_FEATURES, IMAGE_SIDE, IMAGE_SIDE), dtype=np.float32)
    for box in range(4):
        rows, columns = inside[:, box, 0, :, None], inside[:, box, 1, None, :]
        weights += signs[:, box, None, None] * (rows & columns)
    biases = (raw[:, 0, 0] >> np.uint64(32)).astype(np.float32) / np.float32(2**32) - np.float32(0.5)
    return np.ascontiguousarray(weights.reshape(PARITY_FEATURES, -1).T), biases * np.float32(0.5)


def parity_bytes(readout_path: Path) -> bytes:
    """ONNX, `image` uint8 [batch,1024] to `logits` float32 [batch,2]: random features and a trained read-out."""
    nodes, initializers = scaled_pixels("image")
    nodes += [
        helper.make_node("MatMul", ["pixels", "weights"], ["projected"]),
        helper.make_node("Add", ["projected", "biases"], ["shifted"]),
        helper.make_node("Relu", ["shifted"], ["features"]),
        helper.make_node("MatMul", ["features", "readout"], ["scores"]),
        helper.make_node("Add", ["scores", "readout_bias"], ["logits"]),
    ]
    weights, biases = parity_features()
    constants = {"weights": weights, "biases": biases}
    with np.load(readout_path) as readout:
        constants |= {name: readout[name] for name in ("readout", "readout_bias")}
    initializers += [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(
        nodes,
        "parity-dense",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", IMAGE_SIDE * IMAGE_SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", PARITY_CLASSES])],
        initializers,
    )
    content: bytes = checked_model(graph).SerializeToString(deterministic=True)
    return content


def scaled_pixels(name: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes and constants that turn the raw uint8 input `name` into float32 `pixels` in 0..1."""
    nodes = [
        helper.make_node("Cast", [name], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "pixel_scale"], ["pixels"]),
    ]
    return nodes, [numpy_helper.from_array(np.array(1 / 255, dtype=np.float32), "pixel_scale")]


def checked_model(graph: onnx.GraphProto) -> onnx.ModelProto:
    """A model of this graph with the versions pinned that would otherwise follow the installed onnx."""
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="edge-qoe-demo")
    onnx.checker.check_model(model, full_check=True)
    return model


def write_atomically(path: Path, content: bytes) -> None:
    """Several demo processes may build the same model at once: each writes its own file and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
