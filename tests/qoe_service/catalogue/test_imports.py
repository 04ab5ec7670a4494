from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qoe_service.catalogue import applications, artifacts, datasets, imports
from qoe_service.catalogue.models import Application, Artifact, Job, Variant
from qoe_service.errors import Conflict, InvalidInput, TooLarge
from tests.builders import NOW, make_application
from tests.qoe_service.catalogue import tiny_models
from tests.qoe_service.catalogue.tiny_models import conv_model, dense_model, write_data, write_model

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("quick_profiler")]


@pytest.fixture
def application(tmp_path: Path) -> Application:
    dataset = artifacts.store(write_data(tmp_path / "data.npz"), now=NOW)
    return make_application("quarters", dataset=dataset, baseline_variant="dense")


def import_model(application: Application, path: Path, name: str = "dense", **others: object) -> Variant:
    return imports.import_model(application=application, path=path, name=name, now=NOW, **others)  # type: ignore[arg-type]


def test_an_imported_model_is_measured_and_may_be_selected(application: Application, tmp_path: Path) -> None:
    path = write_model(tmp_path / "dense.onnx", dense_model())
    variant = import_model(application, path, passes=["static-int8", "dynamic-int8"])
    assert variant.is_selectable
    assert (variant.accuracy, variant.accuracy_high, variant.accuracy_samples) == (1.0, 1.0, 200)
    assert variant.accuracy_low == pytest.approx(0.9812, abs=1e-4)
    assert variant.accuracy_isa.split()[0] in {"x86_64", "aarch64"}
    assert variant.inputs == [{"name": "image", "type": "tensor(uint8)", "shape": ["batch", 1, 8, 8]}]
    assert [each["name"] for each in variant.outputs] == ["logits"]
    assert variant.operators == ["Cast", "Flatten", "MatMul", "Mul"]
    assert variant.provenance == {"opset": 17}
    with artifacts.open_for_reading(variant.artifact_id) as file:
        assert file.read() == path.read_bytes()
    assert [job.compression_pass for job in variant.jobs.filter(state=Job.State.QUEUED)] == [
        *("static-int8", "dynamic-int8")
    ]
    application.refresh_from_db()
    assert application.baseline_digest == variant.artifact_id


def test_importing_again_changes_nothing(application: Application, tmp_path: Path) -> None:
    path = write_model(tmp_path / "dense.onnx", dense_model())
    first = import_model(application, path, passes=["dynamic-int8"])
    assert import_model(application, path, passes=["dynamic-int8"]) == first
    assert (Variant.objects.count(), Job.objects.count()) == (1, 1)
    with pytest.raises(Conflict, match="as 'dense'"):
        import_model(application, path, name="other")
    other = write_model(tmp_path / "other.onnx", dense_model(seed=5))
    with pytest.raises(Conflict, match="another model"):
        import_model(application, other, name="dense")


def test_a_model_without_data_is_kept_but_not_selectable(tmp_path: Path) -> None:
    variant = import_model(make_application("bare"), write_model(tmp_path / "m.onnx", conv_model()))
    assert (variant.accuracy, variant.is_selectable) == (None, False)


def written(content: onnx.ModelProto) -> bytes:
    return bytes(content.SerializeToString())


def truncated() -> bytes:
    content = written(dense_model())
    return content[: len(content) // 2]


def external(location: str) -> bytes:
    content = dense_model()
    tensor = content.graph.initializer[1]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return written(content)


def foreign_operator() -> bytes:
    node = helper.make_node("Backdoor", ["image"], ["logits"], domain="com.example")
    return written(tiny_models.model([node], {}, opsets=[*tiny_models.OPSET, helper.make_opsetid("com.example", 1)]))


def unknown_operator() -> bytes:
    return written(tiny_models.model([helper.make_node("NoSuch", ["image"], ["logits"])], {}))


def circle() -> bytes:
    nodes = [helper.make_node("Relu", ["b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    nodes.append(helper.make_node("Identity", ["a"], ["logits"]))
    return written(tiny_models.model(nodes, {}))


def future_opset() -> bytes:
    content = dense_model()
    content.opset_import[0].version = 99
    return written(content)


def fixed_batch() -> bytes:
    content = dense_model()
    for each in (*content.graph.input, *content.graph.output):
        each.type.tensor_type.shape.dim[0].dim_value = 1
    return written(content)


def other_input() -> bytes:
    content = dense_model()
    content.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 4
    content.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 16
    return written(content)


def not_finite() -> bytes:
    content = dense_model()
    content.graph.initializer[1].CopyFrom(
        onnx.numpy_helper.from_array(np.full((64, 4), np.nan, dtype=np.float32), "weights")
    )
    return written(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: b"", "not an ONNX file"),
        (lambda: b"\xff" * 1000, "not an ONNX file"),
        (lambda: b"PK\x03\x04 not a model", "not an ONNX file"),
        (truncated, "truncated"),
        (lambda: external("../../../../etc/passwd"), "points outside its folder: '../../../../etc/passwd'"),
        (lambda: external("/etc/passwd"), "points outside its folder"),
        (lambda: external("weights.bin"), "lies in another file"),
        (foreign_operator, "com.example.Backdoor"),
        (unknown_operator, "NoSuch"),
        (circle, "topologically sorted"),
        (future_opset, "opset 99"),
        (fixed_batch, "first axis"),
        (other_input, "but the data set holds"),
        (not_finite, "not finite"),
    ],
)
def test_odd_and_hostile_models_are_refused_with_a_reason(
    application: Application, tmp_path: Path, content: Callable[[], bytes], reason: str
) -> None:
    path = tmp_path / "odd.onnx"
    path.write_bytes(content())
    with pytest.raises(InvalidInput, match=r"odd\.onnx is refused") as refusal:
        import_model(application, path)
    assert reason in refusal.value.detail
    assert refusal.value.field == "file"
    assert not Variant.objects.exists()
    assert Artifact.objects.count() == 1  # the data set


def test_an_oversized_model_is_refused_before_it_is_read(application: Application, tmp_path: Path) -> None:
    path = tmp_path / "huge.onnx"
    path.touch()
    os.truncate(path, 2 * 2**30)
    with pytest.raises(TooLarge, match=r"huge\.onnx"):
        import_model(application, path)


@pytest.mark.parametrize(
    ("name", "passes", "field"), [("no spaces", [], "name"), ("", [], "name"), ("good", ["magic"], "passes")]
)
def test_wrong_names_are_refused_by_field(
    application: Application, tmp_path: Path, name: str, passes: list[str], field: str
) -> None:
    with pytest.raises(InvalidInput) as refusal:
        import_model(application, tmp_path / "never-read.onnx", name=name, passes=passes)
    assert refusal.value.field == field


def test_a_missing_file_is_refused(application: Application, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no file"):
        import_model(application, tmp_path / "missing.onnx")


@pytest.mark.parametrize(
    ("replaced", "reason"),
    [
        ({"heldout_labels": np.full(200, np.nan)}, "not finite"),
        ({"calibration_inputs": np.array([{"a": 1}], dtype=object)}, "pickle"),
        ({"calibration_inputs": np.array(["text"])}, "not numbers"),
        ({"heldout_labels": np.arange(3)}, "one class number, or one number"),
        ({"heldout_labels": np.full(200, -1)}, "negative"),
        ({"heldout_labels": np.full((200, 2, 2), 0.5)}, "one class number, or one number"),
        ({"calibration_inputs": np.zeros((4, 1, 9, 9), dtype=np.uint8)}, "differ in shape"),
        ({"calibration_inputs": np.zeros((0, 1, 8, 8), dtype=np.uint8)}, "at least one sample"),
    ],
)
def test_odd_data_sets_are_refused_with_a_reason(
    tmp_path: Path, replaced: dict[str, np.ndarray | None], reason: str
) -> None:
    with pytest.raises(InvalidInput, match=reason) as refusal:
        datasets.import_dataset(path=write_data(tmp_path / "data.npz", **replaced), now=NOW)
    assert refusal.value.field == "data"
    assert not Artifact.objects.exists()


def test_a_file_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(write_data(tmp_path / "whole.npz").read_bytes()[:1000])
    with pytest.raises(InvalidInput, match="truncated"):
        datasets.import_dataset(path=path, now=NOW)


def test_a_baseline_named_before_its_import_is_settled_by_it(tmp_path: Path) -> None:
    application = make_application("bare", baseline_variant="later")
    import_model(application, write_model(tmp_path / "m.onnx", dense_model()), name="sooner")
    assert applications.get("bare").baseline_digest == ""
    later = import_model(application, write_model(tmp_path / "n.onnx", conv_model()), name="later")
    assert applications.get("bare").baseline_digest == later.artifact_id
