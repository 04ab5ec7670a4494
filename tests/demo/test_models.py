"""The committed demo models are what the demo, the benchmarks and the documentation say they are."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest

from demo.measure import count_correct, open_session
from demo.models import (
    MODELS_FOLDER,
    PARITY_SHA256,
    DemoModel,
    digits_models,
    load_data,
    parity_model,
    sha256,
)


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> DemoModel:
    return parity_model(tmp_path_factory.mktemp("parity"))


def heldout_accuracy(model: DemoModel, judged: int) -> float:
    """On the first `judged` held-out pictures, all of different originals up to 600."""
    data = load_data(model.application)
    some = replace(data, heldout_inputs=data.heldout_inputs[:judged], heldout_labels=data.heldout_labels[:judged])
    return count_correct(open_session(model), model, some) / judged


def test_committed_models_are_under_six_megabytes_in_all() -> None:
    committed = list(MODELS_FOLDER.glob("*.onnx"))
    assert {model.path for model in digits_models()} == set(committed)
    assert sum(path.stat().st_size for path in committed) < 6_000_000


def test_each_larger_model_is_at_least_three_points_more_accurate() -> None:
    accuracies = [heldout_accuracy(model, 200) for model in digits_models()]
    assert all(larger - smaller >= 0.03 for smaller, larger in pairwise(accuracies)), accuracies


def test_parity_model_has_learnt_its_task(parity: DemoModel) -> None:
    assert heldout_accuracy(parity, 600) > 0.8


def test_parity_model_is_the_same_bytes_wherever_it_is_built(parity: DemoModel) -> None:
    assert sha256(parity.path) == PARITY_SHA256


def test_a_damaged_parity_model_is_built_again(tmp_path: Path) -> None:
    (tmp_path / "parity-dense.onnx").write_bytes(b"torn")
    assert sha256(parity_model(tmp_path).path) == PARITY_SHA256
    assert [path.name for path in tmp_path.iterdir()] == ["parity-dense.onnx"]


@pytest.mark.parametrize("name", ["digits-small", "digits-medium", "digits-large", "parity-dense"])
def test_models_take_batches_of_raw_pixels_and_answer_logits(name: str, parity: DemoModel) -> None:
    model = next(model for model in (*digits_models(), parity) if model.name == name)
    session = open_session(model)
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, tuple(image.shape)) == ("image", "tensor(uint8)", ("batch", *model.input_shape))
    classes = 10 if model.application == "digits" else 2
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", classes])
    inputs = load_data(model.application).heldout_inputs[:3]
    (together,) = session.run(None, {"image": inputs})
    alone = [session.run(None, {"image": inputs[i : i + 1]})[0][0] for i in range(3)]
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["digits-small", "digits-medium", "digits-large", "parity-dense"])
def test_models_hold_only_operators_that_the_compressors_know(name: str, parity: DemoModel) -> None:
    model = next(model for model in (*digits_models(), parity) if model.name == name)
    operators = {node.op_type for node in onnx.load(model.path).graph.node}
    assert operators <= {"Cast", "Mul", "Conv", "Relu", "MaxPool", "Flatten", "Gemm", "MatMul", "Add"}


@pytest.mark.parametrize("application", ["digits", "parity"])
def test_data_is_enough_to_judge_and_to_calibrate(application: str) -> None:
    data = load_data("digits" if application == "digits" else "parity")
    assert len(data.heldout_inputs) == len(data.heldout_labels) >= 1500
    assert len(data.calibration_inputs) == len(data.calibration_labels) >= 200
    assert data.heldout_inputs.dtype == data.calibration_inputs.dtype == np.uint8
    assert data.heldout_labels.dtype == data.calibration_labels.dtype == np.int64
    shares = np.bincount(data.heldout_labels) / len(data.heldout_labels)
    assert shares.max() - shares.min() < 0.05
