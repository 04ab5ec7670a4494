"""8-bit weights: with activation ranges calibrated beforehand, or found at run time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.calibrate import MinMaxCalibrater, save_tensors_data

from .datasets import Dataset
from .graph import CONVOLUTIONS, DENSE, prepare, weights_in, why_quantised
from .interface import Task

PREPARED, AUGMENTED, RANGES = Path("prepared.onnx"), Path("augmented.onnx"), Path("ranges.json")
MIN_DENSE_SHARE = 0.5


class StaticInt8:
    """8-bit weights and activations with calibrated ranges; for convolutional and dense models."""

    name = "static-int8"
    uses_calibration = True
    # bandwidth-bound operators between two quantised ones stay in 8 bits; element-wise scaling of inputs does not
    operators = (
        *("Conv", "ConvTranspose", "Gemm", "MatMul", "Relu", "Clip", "Add", "Concat"),
        *("MaxPool", "AveragePool", "GlobalAveragePool", "Flatten", "Reshape", "Transpose"),
    )

    def why_not(self, model: onnx.ModelProto, data: Dataset | None) -> str | None:
        """It needs weights to quantise, and samples to calibrate on."""
        if quantised := why_quantised(model):
            return quantised
        if data is None:
            return "it needs calibration samples, and the application has no data set"
        if weights_in(model, DENSE | CONVOLUTIONS) == 0:
            return "the model has no convolution or dense layer with constant weights"
        return None

    def apply(self, task: Task) -> None:
        """Calibrate, then insert QDQ pairs."""
        assert task.data is not None
        parameters = task.parameters
        prepare(task.source, PREPARED)
        samples = task.data.calibration_inputs[: parameters["calibration_samples"]]
        self._calibrate(samples, onnx.load(PREPARED).graph.input[0].name)
        quantize_static(
            PREPARED,
            task.target,
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
    uses_calibration = False

    def why_not(self, model: onnx.ModelProto, data: Dataset | None) -> str | None:  # noqa: ARG002 - needs no data
        """Convolutions quantised this way run slower than before, so it is for dense models."""
        if quantised := why_quantised(model):
            return quantised
        dense, convolutions = weights_in(model, DENSE), weights_in(model, CONVOLUTIONS)
        if dense == 0:
            return "the model has no dense layer with constant weights"
        share = dense / (dense + convolutions)
        if share < MIN_DENSE_SHARE:
            return f"dense layers hold only {share:.0%} of the weights, so there is little to win"
        return None

    def apply(self, task: Task) -> None:
        """Replace MatMul by its integer form."""
        prepare(task.source, PREPARED)
        quantize_dynamic(
            PREPARED,
            task.target,
            op_types_to_quantize=["MatMul"],
            per_channel=task.parameters["per_channel"],
            reduce_range=task.parameters["reduce_range"],
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
