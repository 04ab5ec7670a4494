"""Where models can be cut, and that both halves together are the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qoe_service.catalogue import artifacts, cuts, imports
from qoe_service.catalogue.sandboxed import cuts as sandboxed_cuts
from qoe_service.catalogue.sandboxed import datasets, passes
from qoe_service.catalogue.sandboxed.interface import Task
from qoe_service.catalogue.sandboxed.refusal import Refusal
from qoe_service.errors import InvalidInput
from tests.builders import NOW, make_application
from tests.qoe_service.catalogue.tiny_models import conv_model, model, pictures, wide_model, write_data, write_model

SAMPLE = pictures(2, seed=3)[0]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_cuts_lie_between_layers_with_bytes_and_work_on_both_sides() -> None:
    path = write_model(Path("wide.onnx"), wide_model())
    found = sandboxed_cuts.find(path, SAMPLE)
    work = [2 * 64 * 48 * 9, 2 * 64 * 48 * 64 * 9, 2 * 64 * 64 * 4]  # per layer, by hand
    assert [each["flops_before"] for each in found] == [work[0], work[0] + work[1]]
    assert all(each["flops_before"] + each["flops_after"] == sum(work) for each in found)
    assert [(each["dtype"], each["bytes"]) for each in found] == [("float32", 48 * 64 * 4), ("float32", 64 * 64 * 4)]


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model_is_cut_where_bytes_pass(tmp_path: Path) -> None:
    data = datasets.load(write_data(tmp_path / "data.npz"))
    parameters = {"calibration_samples": 64, "ranges": "minmax", "per_channel": True, "reduce_range": False}
    base, target = write_model(Path("wide.onnx"), wide_model()), Path("int8.onnx")
    passes.apply("static-int8", Task(base, target, {**parameters, "activations": "uint8"}, data))
    found = sandboxed_cuts.find(target, SAMPLE)
    assert [(each["dtype"], each["bytes"]) for each in found] == [("uint8", 48 * 64), ("uint8", 64 * 64)]
    for each in found:
        assert sandboxed_cuts.split(target, each["tensor"], SAMPLE)["largest_difference"] == 0.0


def test_both_halves_are_models_of_their_own_and_together_the_whole() -> None:
    path = write_model(Path("wide.onnx"), wide_model())
    for each in sandboxed_cuts.find(path, SAMPLE):
        assert sandboxed_cuts.split(path, each["tensor"], SAMPLE)["largest_difference"] < 1e-5
        head, tail = onnx.load("head.onnx"), onnx.load("tail.onnx")
        assert [part.graph.input[0].name for part in (head, tail)] == ["image", each["tensor"]]
        assert {node.output[0] for node in head.graph.node}.isdisjoint(node.output[0] for node in tail.graph.node)


def test_a_short_cut_around_a_tensor_forbids_to_cut_there() -> None:
    helper, kernel = onnx.helper, np.ones((1, 1, 3, 3), dtype=np.float32)
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Conv", ["floats", "kernel"], ["first"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["first", "kernel"], ["inside"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["inside", "first"], ["joined"]),
        helper.make_node("Conv", ["joined", "quarter"], ["means"], strides=[4, 4]),
        helper.make_node("Flatten", ["means"], ["logits"]),
    ]
    path = write_model(
        Path("short.onnx"), model(nodes, {"kernel": kernel, "quarter": np.ones((1, 1, 4, 4), np.float32)})
    )
    assert [each["tensor"] for each in sandboxed_cuts.find(path, SAMPLE)] == ["first", "joined"]
    with pytest.raises(Refusal, match="is no cut"):
        sandboxed_cuts.split(path, "inside", SAMPLE)


@pytest.mark.django_db
@pytest.mark.usefixtures("quick_profiler")
def test_a_variant_knows_its_cuts_and_is_cut_in_the_sandbox(tmp_path: Path) -> None:
    application = make_application("quarters", dataset=artifacts.store(write_data(tmp_path / "data.npz"), now=NOW))
    path = write_model(tmp_path / "wide.onnx", wide_model())
    variant = imports.import_model(application=application, path=path, name="wide", now=NOW)
    tensors = [cut["tensor"] for cut in variant.details["cuts"]]
    assert len(tensors) == 2
    halves = cuts.split(variant=variant, tensor=tensors[1], now=NOW)
    assert {halves.head.digest, halves.tail.digest}.isdisjoint({variant.artifact_id})
    with artifacts.open_for_reading(halves.tail.digest) as tail:
        assert onnx.load(tail).graph.input[0].name == tensors[1]
    with pytest.raises(InvalidInput, match="no cut of wide"):
        cuts.split(variant=variant, tensor="nowhere", now=NOW)


def test_a_model_of_one_layer_has_no_cut() -> None:
    assert sandboxed_cuts.find(write_model(Path("conv.onnx"), conv_model()), SAMPLE) == []
