"""The models and data of ``benchmarks.compression``: five kinds of network that read the same digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from demo import models

FOLDER = Path(__file__).parent / "data" / "compression"
KINDS = ("residual", "mlp", "transformer", "recurrent")
DEMO_CNN = "digits-large"
# A network of the demo and how many times its channels make 10 MB. The first has 31 multiplications to a byte
# (MobileNetV2 about 21, ResNet-18 about 39), the second 240.
TEN_MEGABYTES = {"usual": ("digits-small", 18.8), "heavy": ("digits-large", 1.62)}


@dataclass(frozen=True)
class Case:
    """One model, written to ``path``, and the data that all contestants get."""

    name: str
    path: Path
    data: models.DemoData


def cases(folder: Path, names: Sequence[str], *, samples: int | None = None) -> list[Case]:
    """The models of these names: ``cnn`` is the demo's largest, the others are trained by ``compression_models``.

    ``samples`` bounds the held-out pictures.
    """
    data, found = models.load_data("digits"), []
    data = replace(data, heldout_inputs=data.heldout_inputs[:samples], heldout_labels=data.heldout_labels[:samples])
    for name in names:
        path = folder / f"{name}.onnx"
        if name == "cnn":
            path.write_bytes(demo_cnn().path.read_bytes())
        else:
            onnx.save(load(name), path)
        found.append(Case(name, path, data))
    return found


def demo_cnn(name: str = DEMO_CNN) -> models.DemoModel:
    """A convolutional network of the demo, by default the largest."""
    return next(each for each in models.digits_models() if each.name == name)


def ten_megabytes(kind: str) -> onnx.ModelProto:
    """A CNN of 10 MB, see ``TEN_MEGABYTES``."""
    name, factor = TEN_MEGABYTES[kind]
    return widened(onnx.load(demo_cnn(name).path), factor)


def load(kind: str) -> onnx.ModelProto:
    """A committed model with its weights in single precision."""
    model = onnx.load(FOLDER / f"{kind}.onnx")
    for each in model.graph.initializer:
        if each.data_type == TensorProto.FLOAT16:
            each.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(each).astype(np.float32), each.name))
    return model


def widened(model: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    """The same function with ``factor`` times the inner channels of a plain CNN: copies share outgoing weights."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    weights = {each.name: each for each in wide.graph.initializer}
    layers = [node for node in wide.graph.node if node.op_type in {"Conv", "Gemm"}]
    source, before = np.zeros(1, dtype=np.int64), 1
    for node in layers:
        values, bias = (numpy_helper.to_array(weights[name]) for name in node.input[1:3])
        share = (1 / np.bincount(source)[source]).astype(np.float32)
        if node.op_type == "Gemm":
            rows = values.reshape(before, -1, values.shape[1])[source] * share[:, None, None]
            _replace(weights[node.input[1]], rows.reshape(-1, values.shape[1]))
            break
        outputs = np.arange(int(len(values) * factor)) % len(values)
        _replace(weights[node.input[1]], values[outputs][:, source] * share[None, :, None, None])
        _replace(weights[node.input[2]], bias[outputs])
        source, before = outputs, len(values)
    return wide


def _replace(tensor: onnx.TensorProto, values: NDArray[np.float32]) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
