"""Models that no single protobuf can hold: external data comes in, one file goes out. A low bound stands for 2 GiB."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from django.core.management import call_command
from django.utils import timezone

from device_agents.runtime import Session
from qoe_service.catalogue import artifacts, compression, imports, jobs, packages, sandbox
from qoe_service.catalogue.models import Application, Piece, Variant
from qoe_service.catalogue.sandboxed import checks, containers, footer
from qoe_service.catalogue.sandboxed.refusal import Refusal
from qoe_service.errors import InvalidInput, TooLarge
from tests.builders import NOW, make_application
from tests.qoe_service.catalogue.tiny_models import CLASSES, model, pictures, quarters, write_data

LOW = 1000


def large_model(folder: Path) -> Path:
    """A right model whose weights, 128 KiB and some, lie in a file beside it."""
    wide = np.random.default_rng(3).normal(scale=1e-6, size=(CLASSES, 8192)).astype(np.float32)
    wide[:, :CLASSES] = np.eye(CLASSES)
    weights = {"scale": np.array(1 / 255, dtype=np.float32), "quarters": quarters(), "wide": wide}
    weights["narrow"] = np.eye(8192, CLASSES, dtype=np.float32)
    nodes = [
        onnx.helper.make_node("Cast", ["image"], ["floats"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Mul", ["floats", "scale"], ["pixels"]),
        onnx.helper.make_node("Flatten", ["pixels"], ["rows"]),
        onnx.helper.make_node("MatMul", ["rows", "quarters"], ["sums"]),
        onnx.helper.make_node("MatMul", ["sums", "wide"], ["wider"]),
        onnx.helper.make_node("MatMul", ["wider", "narrow"], ["logits"]),
    ]
    folder.mkdir()
    path = folder / "large.onnx"
    onnx.save(model(nodes, weights), path, save_as_external_data=True, location="large.data", size_threshold=1024)
    return path


def container_of(graph: Path, target: Path) -> Path:
    containers.write(onnx.load(graph, load_external_data=False), graph.parent, target)
    return target


def answers(session: onnxruntime.InferenceSession) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.asarray(session.run(None, {"image": pictures(16, seed=5)[0]})[0])


@pytest.fixture
def application(tmp_path: Path, db: None) -> Application:
    return make_application("quarters", dataset=artifacts.store(write_data(tmp_path / "data.npz"), now=NOW))


@pytest.fixture
def variant(application: Application, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Variant:
    """Imported from a folder by the command, as what is too large for one protobuf."""
    monkeypatch.setattr(imports, "MAX_MODEL_BYTES", LOW)
    monkeypatch.setattr(sandbox, "CONTAINER_FACTOR", sandbox.MEASURING_FACTOR)
    call_command("import_model", "quarters", str(large_model(tmp_path / "large").parent), stdout=io.StringIO())
    return Variant.objects.get()


def test_it_comes_in_with_its_external_data_and_is_measured_like_any_other(variant: Variant) -> None:
    assert (variant.name, variant.accuracy) == ("large", 1.0)
    assert variant.profiles.get().a_ms > 0
    assert "MatMul" in variant.operators
    assert variant.details["no_cuts_because"] == "models of 2 GiB and more are not cut"
    assert Piece.objects.filter(whole=variant.artifact).count() == 4  # two weights, what is before and after them


def test_devices_open_the_one_file_and_leave_nothing_beside_it(variant: Variant, tmp_path: Path) -> None:
    path = tmp_path / "device" / f"{variant.artifact_id}.onnx"
    path.parent.mkdir()
    with artifacts.open_for_reading(variant.artifact_id) as file:
        path.write_bytes(file.read())
    session = Session(path, threads=1)
    outputs, _ = session.run({"image": pictures(16, seed=5)[0]})
    graph = tmp_path / "large" / "large.onnx"
    assert np.array_equal(outputs["logits"], answers(onnxruntime.InferenceSession(graph)))
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("format_name", "path"),
    [("zip", "quarters/variants/large/graph.onnx"), ("ortpackage", "quarters.ortpackage/quarters/large/graph.onnx")],
)
def test_it_leaves_as_graph_and_weights_that_any_program_reads(
    variant: Variant, tmp_path: Path, format_name: str, path: str
) -> None:
    content = b"".join(packages.export(variant.application, format_name))
    zipfile.ZipFile(io.BytesIO(content)).extractall(tmp_path / "out")
    there = onnxruntime.InferenceSession(tmp_path / "out" / path)
    graph = tmp_path / "large" / "large.onnx"
    assert np.array_equal(answers(there), answers(onnxruntime.InferenceSession(graph)))


def test_a_package_of_it_comes_back_as_a_model(
    variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imports, "MAX_MODEL_BYTES", 2**31 - 1)
    (tmp_path / "x.ortpackage.zip").write_bytes(b"".join(packages.export(variant.application, "ortpackage")))
    elsewhere = make_application("elsewhere", dataset=variant.application.dataset)
    found = packages.import_package(application=elsewhere, path=tmp_path / "x.ortpackage.zip", now=NOW)
    with artifacts.open_for_reading(found.variants[0].artifact_id) as file:
        (tmp_path / "back.onnx").write_bytes(file.read())
    assert answers(onnxruntime.InferenceSession(tmp_path / "back.onnx")).shape == (16, CLASSES)


def test_the_one_file_itself_comes_in_again_too(variant: Variant, tmp_path: Path) -> None:
    with artifacts.open_for_reading(variant.artifact_id) as file:
        (tmp_path / "again.onnx").write_bytes(file.read())
    elsewhere = make_application("elsewhere", dataset=variant.application.dataset)
    again = imports.import_model(application=elsewhere, path=tmp_path / "again.onnx", name="again", now=NOW)
    assert (again.artifact_id, again.accuracy) == (variant.artifact_id, 1.0)


def test_a_pass_over_it_says_that_it_cannot(variant: Variant) -> None:
    job = jobs.queue(base=variant, compression_pass="float16", parameters={}, now=NOW)
    ended = compression.run(job_id=job.pk, clock=timezone.now)
    assert ended is not None
    assert (ended.state, ended.error) == (
        "refused",
        "passes take models below 2 GiB: the weights of this one lie beside its graph",
    )


def test_a_single_file_above_the_bound_is_refused_with_the_way_out(application: Application, tmp_path: Path) -> None:
    path = tmp_path / "huge.onnx"
    with path.open("wb") as file:
        file.truncate(2 * 2**30)  # sparse: no byte of it is written
    with pytest.raises(TooLarge, match="zip of the graph and its external data"):
        imports.import_model(application=application, path=path, name="huge", now=NOW)


def test_what_would_not_fit_into_memory_is_refused_beforehand(application: Application, tmp_path: Path) -> None:
    path = tmp_path / "huge.zip"
    with path.open("wb") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(InvalidInput, match=r"checking it would need about \d+ MiB of memory"):
        imports.import_model(application=application, path=path, name="huge", now=NOW)


def test_weights_are_written_once_and_at_page_boundaries(tmp_path: Path) -> None:
    path = container_of(large_model(tmp_path / "large"), tmp_path / "model.onnx")
    graph = containers.graph_of(path)
    assert graph is not None
    found = [stretch for _, stretch in containers.external(onnx.load_from_string(graph))]
    assert [each.offset % 4096 for each in found] == [0] * len(found)
    assert checks.check(path)["outputs"][0]["name"] == "logits"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["large", "model.onnx"]


@pytest.mark.parametrize(("key", "value"), [("location", "../secret"), ("offset", "-4096"), ("length", "999999999")])
def test_a_container_that_points_elsewhere_is_refused(tmp_path: Path, key: str, value: str) -> None:
    path = container_of(large_model(tmp_path / "large"), tmp_path / "model.onnx")
    graph = containers.graph_of(path)
    assert graph is not None
    forged = onnx.load_from_string(graph)
    tensor, _ = next(iter(containers.external(forged)))
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    changed = forged.SerializeToString()
    weights = path.read_bytes()[: -len(graph) - footer.FOOTER.size]
    path.write_bytes(weights + changed + footer.FOOTER.pack(len(changed), footer.MAGIC))
    with pytest.raises(Refusal, match=r"does not lie in its container|is not said"):
        checks.check(path)


def test_weights_that_end_too_early_are_refused(tmp_path: Path) -> None:
    graph = large_model(tmp_path / "large")
    (graph.parent / "large.data").write_bytes(b"short")
    with pytest.raises(Refusal, match="ends before the weights"):
        container_of(graph, tmp_path / "model.onnx")
