"""Every pass, run as the sandbox runs it but in this process: what it makes, what it refuses, that it repeats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from qoe_service.catalogue import passes as catalogue_passes
from qoe_service.catalogue.sandboxed import four_bit, low_rank, passes, reconstruction
from qoe_service.catalogue.sandboxed.channel_groups import Weights
from qoe_service.catalogue.sandboxed.datasets import Dataset, load
from qoe_service.catalogue.sandboxed.interface import Task
from qoe_service.catalogue.sandboxed.refusal import Refusal
from qoe_service.errors import InvalidInput
from tests.qoe_service.catalogue.tiny_models import (
    conv_model,
    dense_model,
    factor_model,
    shape_arithmetic_model,
    weightless_model,
    wide_model,
    write_data,
    write_model,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries warn about themselves


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return load(write_data(tmp_path / "data.npz"))


def derived(content: onnx.ModelProto, name: str, data: Dataset | None, **changed: Any) -> onnx.ModelProto:
    chosen = catalogue_passes.PASSES[name]
    task = Task(write_model(Path("base.onnx"), content), Path("derived.onnx"), {**chosen.parameters, **changed}, data)
    passes.apply(chosen.method, task)
    return onnx.load("derived.onnx")


def answers(content: onnx.ModelProto, data: Dataset) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(content.SerializeToString(), providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, {"image": data.heldout_inputs})[0]
    return found


def accuracy(content: onnx.ModelProto, data: Dataset) -> float:
    return float((answers(content, data).argmax(axis=1) == data.heldout_labels).mean())


def kinds(content: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in content.graph.node}


MAKES = [
    ("clean-up", shape_arithmetic_model, "MatMul"),
    ("static-int8", conv_model, "QuantizeLinear"),
    ("static-int8-7bit", conv_model, "QuantizeLinear"),
    ("static-int8-per-tensor", conv_model, "QuantizeLinear"),
    ("static-int8-arm", conv_model, "QuantizeLinear"),
    ("static-int8-entropy", conv_model, "QuantizeLinear"),
    ("static-int8-percentile", conv_model, "QuantizeLinear"),
    ("dynamic-int8", dense_model, "MatMulInteger"),
    ("dynamic-int8-per-tensor", dense_model, "MatMulInteger"),
    ("int4-weights", lambda: factor_model(64), "MatMulNBits"),
    ("float16", dense_model, "Cast"),
    ("prune", wide_model, "Conv"),
    ("low-rank", factor_model, "MatMul"),
]


@pytest.mark.parametrize(("name", "base", "operator"), MAKES)
def test_a_pass_makes_a_sound_model_that_still_answers_right_and_the_same_bytes_each_time(
    data: Dataset, name: str, base: Callable[[], onnx.ModelProto], operator: str
) -> None:
    first = derived(base(), name, data)
    onnx.checker.check_model(first)
    assert operator in kinds(first)
    assert accuracy(first, data) >= accuracy(base(), data) - 0.02
    assert derived(base(), name, data).SerializeToString() == first.SerializeToString()


def test_a_model_that_takes_plain_numbers_is_halved_in_an_order_that_runs(data: Dataset) -> None:
    plain = dense_model()
    del plain.graph.node[0]  # the cast of its pictures
    plain.graph.node[0].input[0] = "image"
    plain.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    halved = derived(plain, "float16", data)
    onnx.checker.check_model(halved, full_check=True)
    assert halved.graph.node[0].op_type == "Cast"
    numbers = replace(data, heldout_inputs=data.heldout_inputs.astype(np.float32))
    assert accuracy(halved, numbers) == accuracy(plain, numbers) == 1.0


REFUSES = [
    ("clean-up", conv_model, "all 5 nodes are needed"),
    ("static-int8", weightless_model, "no convolution or dense layer"),
    ("mixed-int8", conv_model, "every layer costs more than 25%"),
    ("dynamic-int8", conv_model, "no dense layer or LSTM"),
    ("int4-weights", conv_model, "no dense layer with constant weights"),
    ("float16", weightless_model, "no weights in single precision"),
    ("prune", dense_model, "no layer's channels can be cut"),
    ("low-rank", dense_model, "no dense layer with both sides"),
]


@pytest.mark.parametrize(("name", "base", "reason"), REFUSES)
def test_a_pass_that_cannot_help_says_why(
    data: Dataset, name: str, base: Callable[[], onnx.ModelProto], reason: str
) -> None:
    with pytest.raises(Refusal, match=reason):
        derived(base(), name, data)


def test_passes_that_need_samples_say_so() -> None:
    for name in ("static-int8", "mixed-int8", "prune", "low-rank"):
        with pytest.raises(Refusal, match="needs calibration samples"):
            derived(wide_model(), name, None)


@pytest.mark.parametrize("name", [name for name in catalogue_passes.PASSES if name not in {"clean-up"}])
def test_what_is_quantised_is_left_alone(data: Dataset, name: str) -> None:
    quantised = derived(dense_model(), "dynamic-int8", data)
    with pytest.raises(Refusal, match="quantised already"):
        derived(quantised, name, data)


def test_pruning_takes_copies_of_channels_out_and_the_answer_stays(data: Dataset) -> None:
    base = wide_model()
    pruned = derived(base, "prune-hard", data)
    sizes = {each.name: list(each.dims) for each in pruned.graph.initializer}
    assert sizes["first"][0] == sizes["second"][1] == 16
    # the readers absorbed what the 32 others carried
    assert np.abs(answers(pruned, data) - answers(base, data)).max() < 0.05 * answers(base, data).std()


def test_pruning_without_making_up_for_the_loss_would_not_do(data: Dataset) -> None:
    rows = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    rows = np.concatenate([rows, rows @ np.random.default_rng(1).normal(size=(6, 4)) + 3], axis=1).astype(np.float32)
    order = reconstruction.pivoted_order(rows)
    for some in (rows, rows[:9]):  # more rows than channels, and fewer
        mixture = reconstruction.Mixture.fitted(reconstruction.Moments.of(some), np.sort(order[:7]))
        assert np.allclose(mixture.guess(some[:, mixture.keep]), some[:, mixture.missing], atol=0.1)


def test_low_rank_keeps_an_answer_that_lies_in_few_directions(data: Dataset) -> None:
    base, thin = factor_model(), derived(factor_model(), "low-rank", data)
    assert [list(each.dims) for each in thin.graph.initializer if each.name == "shifted_left"] == [[64, 8]]
    assert np.allclose(answers(thin, data), answers(base, data), atol=0.02)


def test_low_rank_refuses_where_every_direction_matters(data: Dataset) -> None:
    with pytest.raises(Refusal, match="no dense layer loses a quarter"):
        derived(factor_model(64), "low-rank", data, keep_energy=0.9999999)


def test_factors_of_a_full_rank_matrix_lose_no_more_energy_than_asked() -> None:
    rng = np.random.default_rng(2)
    for shape in ((96, 64), (64, 96)):
        matrix, rows = rng.normal(size=shape), rng.normal(size=(500, shape[0])) * np.linspace(3, 0.01, shape[0])
        factors = low_rank.factorise(matrix, rows, 0.99)
        lost = rows @ matrix - rows @ factors.left @ factors.right - factors.lost
        assert (lost**2).sum() / ((rows @ matrix) ** 2).sum() < 0.02


def test_four_bits_hold_a_weight_to_within_half_a_step() -> None:
    matrix = np.random.default_rng(3).normal(size=(50, 7)).astype(np.float32)
    packed, scales = four_bit.pack(matrix, 32)
    assert (packed.shape, scales.shape) == ((7, 2, 16), (14,))
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(7, 2, 32).astype(np.float32)
    restored = ((nibbles - 8) * scales.reshape(7, 2, 1)).reshape(7, 64)[:, :50].T
    assert np.abs(restored - matrix).mean() < np.abs(scales).mean() / 3


def test_pictures_enter_a_quantised_model_as_the_bytes_they_are(data: Dataset) -> None:
    quantised = derived(conv_model(), "static-int8", data)
    (first,) = (node for node in quantised.graph.node if "image" in node.input)
    assert first.op_type == "DequantizeLinear"
    assert "Cast" not in kinds(quantised)


def test_mixed_precision_leaves_the_layer_out_that_suffers_most(data: Dataset) -> None:
    base = wide_model()
    weights = Weights(base)
    damaged = weights.get("read_out")
    damaged[0] *= 3000  # one weight so large that the others vanish beside it
    weights.set("read_out", damaged)
    mixed = derived(base, "mixed-int8", data, keep_share=0.6, per_channel=False)
    gemm = next(node for node in mixed.graph.node if node.op_type == "Gemm")
    assert gemm.input[1] == "read_out"


def test_chains_and_the_family_are_read_by_name_and_unknown_ones_are_refused() -> None:
    (both,) = catalogue_passes.chains(["prune+static-int8"])
    assert [each.method for each in both] == ["prune-channels", "static-int8"]
    family = catalogue_passes.chains(["family", "static-int8"])
    assert len(family) == len(set(family)) == len(catalogue_passes.FAMILY)
    with pytest.raises(InvalidInput, match="no such pass; there are clean-up"):
        catalogue_passes.chains(["static-int8+magic"])
    with pytest.raises(InvalidInput, match="at most 4"):
        catalogue_passes.chains(["+".join(["prune"] * 5)])


def test_every_pass_that_can_be_asked_for_is_known_to_the_sandbox() -> None:
    assert list(dict.fromkeys(each.method for each in catalogue_passes.PASSES.values())) == list(passes.PASSES)
