"""8-bit weights and activations: with ranges calibrated beforehand, or found at run time."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.calibrate import (
    CalibrationMethod,
    EntropyCalibrater,
    MinMaxCalibrater,
    PercentileCalibrater,
    save_tensors_data,
)

from . import graph as graphs
from .datasets import Dataset
from .interface import Pass, Task
from .memory import Held
from .refusal import Refusal

PREPARED, AUGMENTED, RANGES = Path("prepared.onnx"), Path("augmented.onnx"), Path("ranges.json")
MIN_DENSE_SHARE, MIN_SHARE = 0.5, 0.1
BATCH, AT_A_TIME = 8, 32
# bandwidth-bound operators between two quantised ones stay in 8 bits; element-wise scaling of inputs does not
OPERATORS = (
    *("Conv", "ConvTranspose", "Gemm", "MatMul", "Relu", "Clip", "Add", "Concat"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "Flatten", "Reshape", "Transpose"),
)
LAYERS = graphs.DENSE | graphs.CONVOLUTIONS
RANGES_BY = {
    "minmax": (MinMaxCalibrater, CalibrationMethod.MinMax),
    "entropy": (EntropyCalibrater, CalibrationMethod.Entropy),
    "percentile": (PercentileCalibrater, CalibrationMethod.Percentile),
}


class StaticInt8:
    """8-bit weights and activations with calibrated ranges; for convolutional and dense models."""

    name = "static-int8"
    uses_calibration = True

    def why_not(self, model: onnx.ModelProto, data: Dataset | None) -> str | None:
        """It needs weights to quantise, and samples to calibrate on."""
        if quantised := graphs.why_quantised(model):
            return quantised
        if data is None:
            return "it needs calibration samples, and the application has no data set"
        layers, recurrent = graphs.weights_in(model, LAYERS), graphs.weights_in(model, graphs.RECURRENT)
        if layers == 0:
            return "the model has no convolution or dense layer with constant weights"
        if layers < MIN_SHARE * (layers + recurrent):
            return "recurrent layers, which it leaves alone, hold nearly all weights; dynamic-int8 is for them"
        return None

    def held_bytes(self, layers: Held, task: Task) -> int:
        """Ranges other than MinMax are read off whole tensors, of all samples between two sums."""
        is_watched = task.parameters["ranges"] != "minmax"
        return AT_A_TIME * layers.in_all if is_watched else BATCH * layers.at_once

    def apply(self, task: Task) -> None:
        """Calibrate, then insert QDQ pairs."""
        assert task.data is not None
        model = graphs.prepare(task.source, PREPARED)
        samples = task.data.calibration_inputs[: task.parameters["calibration_samples"]]
        calibrate(samples, model.graph.input[0].name, str(task.parameters["ranges"]), task)
        insert_pairs(task.target, task.parameters)


class DynamicInt8(Pass):
    """8-bit weights of dense and recurrent layers, with activation ranges found at run time."""

    name = "dynamic-int8"
    uses_calibration = False

    def why_not(self, model: onnx.ModelProto, data: Dataset | None) -> str | None:  # noqa: ARG002 - needs no data
        """Convolutions quantised this way run slower than before, so it is for dense models."""
        if quantised := graphs.why_quantised(model):
            return quantised
        dense = graphs.weights_in(model, graphs.DENSE | {"LSTM"})
        convolutions = graphs.weights_in(model, graphs.CONVOLUTIONS)
        if dense == 0:
            return "the model has no dense layer or LSTM with constant weights"
        share = dense / (dense + convolutions)
        if share < MIN_DENSE_SHARE:
            return f"dense layers hold only {share:.0%} of the weights, so there is little to win"
        return None

    def apply(self, task: Task) -> None:
        """Replace MatMul and LSTM by their integer forms; convolutions of a mixed model stay as they are."""
        graphs.prepare(task.source, PREPARED)
        quantize_dynamic(
            PREPARED,
            task.target,
            op_types_to_quantize=["MatMul", "LSTM", "Attention"],
            per_channel=task.parameters["per_channel"],
            reduce_range=task.parameters["reduce_range"],
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )


def calibrate(samples: NDArray[Any], input_name: str, ranges: str, task: Task) -> None:
    """Write the activation ranges of the prepared model."""
    if ranges not in RANGES_BY:
        raise Refusal(f"ranges {ranges!r} are not known; there are {', '.join(RANGES_BY)}")
    calibrator = RANGES_BY[ranges][0](PREPARED, list(OPERATORS), augmented_model_path=str(AUGMENTED))
    calibrator.augment_graph()
    calibrator.infer_session = _one_thread_session()
    for start in range(0, len(samples), AT_A_TIME):  # histograms of a few batches, or memory grows with the samples
        task.tell(0.6 * start / len(samples))
        with contextlib.redirect_stdout(io.StringIO()):  # it tells people what it does
            calibrator.collect_data(Samples(samples[start : start + AT_A_TIME], input_name))
    with contextlib.redirect_stdout(io.StringIO()):
        save_tensors_data(calibrator.compute_data(), RANGES)


def insert_pairs(target: Path, parameters: dict[str, Any], leave_out: Sequence[str] = ()) -> None:
    """Quantise the prepared model with the ranges found before, but for the nodes to leave out."""
    is_signed = parameters["activations"] == "int8"
    quantize_static(
        PREPARED,
        target,
        None,
        calibration_cache_path=RANGES,
        op_types_to_quantize=list(OPERATORS),
        per_channel=parameters["per_channel"],
        reduce_range=parameters["reduce_range"],
        activation_type=QuantType.QInt8 if is_signed else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=list(leave_out),
        calibrate_method=RANGES_BY[parameters["ranges"]][1],
        extra_options={"MatMulConstBOnly": True},
    )
    model = onnx.load(target)
    if not is_signed and _take_bytes_as_they_come(model):
        onnx.save(model, target)


def _take_bytes_as_they_come(model: onnx.ModelProto) -> bool:
    """Where the model scales uint8 input to floats and quantises that again, read the bytes as quantised already."""
    graph, writers, readers = model.graph, graphs.producers(model.graph), graphs.consumers(model.graph)
    constants = {each.name: each for each in graph.initializer}
    for node in [each for each in graph.node if each.op_type == "QuantizeLinear"]:
        scale = writers.get(node.input[0])
        cast = writers.get(scale.input[0]) if scale is not None and scale.op_type == "Mul" else None
        if scale is None or cast is None or cast.op_type != "Cast" or cast.input[0] != graph.input[0].name:
            continue
        if graph.input[0].type.tensor_type.elem_type != onnx.TensorProto.UINT8 or scale.input[1] not in constants:
            continue
        factor = numpy_helper.to_array(constants[scale.input[1]])
        chain = (node.input[0], scale.input[0])
        if factor.size != 1 or factor.item() <= 0 or any(len(readers[name]) != 1 for name in chain):
            continue
        for name, value in zip(node.input[1:3], (np.float32(factor.item()), np.uint8(0)), strict=True):
            constants[name].CopyFrom(numpy_helper.from_array(np.asarray(value), name))
        for reader in readers[node.output[0]]:
            reader.input[0] = cast.input[0]
        for gone in (node, scale, cast):
            graph.node.remove(gone)
        return True
    return False


def _one_thread_session() -> onnxruntime.InferenceSession:
    """The calibrator's own session would take every core and starve the neighbours."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(AUGMENTED), options, providers=["CPUExecutionProvider"])


class Samples(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    """Hands calibration inputs over in small batches."""

    def __init__(self, inputs: Any, name: str, batch: int = BATCH) -> None:
        self._batches = ({name: inputs[start : start + batch]} for start in range(0, len(inputs), batch))

    def get_next(self) -> dict[str, Any] | None:
        """The next batch; None at the end."""
        return next(self._batches, None)
