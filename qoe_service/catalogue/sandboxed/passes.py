"""Compression passes: each says what it is called, when it cannot help, and how it is done. Same input, same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.calibrate import MinMaxCalibrater, save_tensors_data
from onnxruntime.quantization.shape_inference import quant_pre_process

from . import checks
from .datasets import Dataset
from .refusal import Refusal

PREPARED, AUGMENTED, RANGES = Path("prepared.onnx"), Path("augmented.onnx"), Path("ranges.json")
QUANTISED_OPERATORS = {"QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "MatMulInteger"}
DENSE, CONVOLUTIONS = frozenset({"MatMul", "Gemm"}), frozenset({"Conv", "ConvTranspose"})
PER_CHANNEL_OPSET = 13
MIN_DENSE_SHARE = 0.5


class Pass(Protocol):
    """One way to make a smaller or faster model out of a model."""

    name: str

    def refusal(self, model: onnx.ModelProto, data: Dataset | None) -> str | None:
        """Why it cannot help this model; None if it can."""
        ...

    def apply(self, source: Path, target: Path, data: Dataset | None, parameters: dict[str, Any]) -> None:
        """Write the derived model."""
        ...


class StaticInt8:
    """8-bit weights and activations with calibrated ranges; for convolutional and dense models."""

    name = "static-int8"
    # bandwidth-bound operators between two quantised ones stay in 8 bits; element-wise scaling of inputs does not
    operators = (
        *("Conv", "ConvTranspose", "Gemm", "MatMul", "Relu", "Clip", "Add", "Concat"),
        *("MaxPool", "AveragePool", "GlobalAveragePool", "Flatten", "Reshape", "Transpose"),
    )

    def refusal(self, model: onnx.ModelProto, data: Dataset | None) -> str | None:
        """It needs weights to quantise, and samples to calibrate on."""
        if data is None:
            return "it needs calibration samples, and the application has no data set"
        if weights_in(model, DENSE | CONVOLUTIONS) == 0:
            return "the model has no convolution or dense layer with constant weights"
        return None

    def apply(self, source: Path, target: Path, data: Dataset | None, parameters: dict[str, Any]) -> None:
        """Calibrate, then insert QDQ pairs."""
        assert data is not None
        prepare(source)
        samples = data.calibration_inputs[: parameters["calibration_samples"]]
        self._calibrate(samples, onnx.load(PREPARED).graph.input[0].name)
        quantize_static(
            PREPARED,
            target,
            None,
            calibration_cache_path=RANGES,
            op_types_to_quantize=list(self.operators),
            per_channel=parameters["per_channel"],
            reduce_range=parameters["reduce_range"],
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )

    def _calibrate(self, samples: Any, input_name: str) -> None:
        calibrator = OneThreadCalibrator(PREPARED, self.operators, augmented_model_path=str(AUGMENTED))
        calibrator.augment_graph()
        calibrator.create_inference_session()
        calibrator.collect_data(Samples(samples, input_name))
        save_tensors_data(calibrator.compute_data(), RANGES)


class DynamicInt8:
    """8-bit weights of dense layers, with activation ranges found at run time; for mostly dense models."""

    name = "dynamic-int8"

    def refusal(self, model: onnx.ModelProto, data: Dataset | None) -> str | None:  # noqa: ARG002 - needs no data
        """Convolutions quantised this way run slower than before, so it is for dense models."""
        dense, convolutions = weights_in(model, DENSE), weights_in(model, CONVOLUTIONS)
        if dense == 0:
            return "the model has no dense layer with constant weights"
        share = dense / (dense + convolutions)
        if share < MIN_DENSE_SHARE:
            return f"dense layers hold only {share:.0%} of the weights, so there is little to win"
        return None

    def apply(self, source: Path, target: Path, data: Dataset | None, parameters: dict[str, Any]) -> None:  # noqa: ARG002
        """Replace MatMul by its integer form."""
        prepare(source)
        quantize_dynamic(
            PREPARED,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=parameters["per_channel"],
            reduce_range=parameters["reduce_range"],
            weight_type=QuantType.QInt8,
        )


class OneThreadCalibrator(MinMaxCalibrater):  # type: ignore[misc]  # onnxruntime ships no types
    """Its base class takes every core, which would starve the neighbours."""

    def create_inference_session(self) -> None:
        """The base class's session, with one thread."""
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.infer_session = onnxruntime.InferenceSession(
            self.augmented_model_path, options, providers=self.execution_providers
        )


class Samples(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    """Hands calibration inputs over in small batches."""

    def __init__(self, inputs: Any, name: str, batch: int = 32) -> None:
        self._batches = ({name: inputs[start : start + batch]} for start in range(0, len(inputs), batch))

    def get_next(self) -> dict[str, Any] | None:
        """The next batch; None at the end."""
        return next(self._batches, None)


PASSES: dict[str, Pass] = {each.name: each for each in (StaticInt8(), DynamicInt8())}


def apply(name: str, parameters: dict[str, Any], source: Path, target: Path, data: Dataset | None) -> dict[str, Any]:
    """Derive ``target`` from ``source``; says how, so that it can be done again bit for bit. Raises Refusal."""
    chosen, model = PASSES[name], checks.read(source)
    reason = _already_quantised(model) or chosen.refusal(model, data)
    if reason is not None:
        raise Refusal(f"{name} does not help here: {reason}")
    chosen.apply(source, target, data, parameters)
    _write_canonical(target)
    return {
        "calibration_digest": data.calibration_digest if data is not None and name == StaticInt8.name else None,
        "versions": {each.__name__: each.__version__ for each in (np, onnx, onnxruntime)},
    }


def prepare(source: Path) -> None:
    """Infer shapes and fuse what can be fused on every machine, in an opset that knows per-channel scales."""
    model = checks.read(source)
    if checks.opset_of(model) < PER_CHANNEL_OPSET:
        model = onnx.version_converter.convert_version(model, PER_CHANNEL_OPSET)
    onnx.save(model, PREPARED)
    quant_pre_process(PREPARED, PREPARED, skip_symbolic_shape=True)


def weights_in(model: onnx.ModelProto, operators: frozenset[str]) -> int:
    """Number of constant weights that nodes of these kinds multiply with."""
    sizes = {
        each.name: int(np.prod(each.dims, dtype=np.int64)) for each in model.graph.initializer if len(each.dims) > 1
    }
    nodes = (node for node in model.graph.node if node.op_type in operators)
    return sum(sizes.get(name, 0) for node in nodes for name in node.input)


def _already_quantised(model: onnx.ModelProto) -> str | None:
    found = sorted({node.op_type for node in checks.nodes_of(model.graph)} & QUANTISED_OPERATORS)
    return f"the model is quantised already ({', '.join(found)})" if found else None


def _write_canonical(path: Path) -> None:
    model = onnx.load(path)
    path.write_bytes(model.SerializeToString(deterministic=True))
