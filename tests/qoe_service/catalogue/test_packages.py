"""Families leave and come back as files; what packages claim, or hide, is not believed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

import onnx
import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.test import AsyncClient, Client
from onnx import external_data_helper

from qoe_service.catalogue import artifacts, imports, packages
from qoe_service.catalogue.models import Application, Variant
from qoe_service.errors import InvalidInput
from tests.builders import NOW, make_application, make_variant
from tests.qoe_service.catalogue.tiny_models import conv_model, dense_model, write_data

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("quick_profiler")]


@pytest.fixture
def application(tmp_path: Path) -> Application:
    return make_application("quarters", dataset=artifacts.store(write_data(tmp_path / "data.npz"), now=NOW))


@pytest.fixture
def family(application: Application) -> Application:
    known: dict[str, Any] = {"accuracy": 1.0, "details": {"accuracy": {"kind": "top-1"}}}
    base = make_variant(application, "dense", digest=stored(dense_model()), **known)
    student = make_variant(application, "conv", digest=stored(conv_model()), base=base, precision="fp16", **known)
    Application.objects.update(baseline_digest=student.artifact_id)
    application.refresh_from_db()
    return application


def stored(content: onnx.ModelProto) -> str:
    return artifacts.store(io.BytesIO(content.SerializeToString(deterministic=True)), now=NOW).digest


def exported(application: Application, format_name: str) -> bytes:
    return b"".join(packages.export(application, format_name))


def manifest_of(content: bytes, path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(zipfile.ZipFile(io.BytesIO(content)).read(path))
    return found


def test_a_family_is_one_zip_with_a_manifest_that_says_how_each_was_made(family: Application) -> None:
    content = exported(family, "zip")
    assert content == exported(family, "zip")
    archive = zipfile.ZipFile(io.BytesIO(content))
    assert archive.testzip() is None
    manifest = manifest_of(content, "quarters/manifest.json")
    facts = ("name", "base", "accuracy", "accuracy_kind")
    assert [tuple(each[fact] for fact in facts) for each in manifest["variants"]] == [
        ("conv", "dense", 1.0, "top-1"),
        ("dense", None, 1.0, "top-1"),
    ]
    for each in manifest["variants"]:
        found = hashlib.sha256(archive.read(f"quarters/{each['file']}")).hexdigest()
        assert each["digest"] == f"sha256:{found}"


def test_a_package_has_the_layout_that_onnx_runtime_documents(family: Application, tmp_path: Path) -> None:
    manifest = manifest_of(exported(family, "ortpackage"), "quarters.ortpackage/manifest.json")
    assert (manifest["schema_version"], manifest["layout"]) == ("1.0", "portable")
    variants = manifest["components"]["quarters"]["variants"]
    assert list(variants) == ["conv", "dense"]  # the safe baseline first, because order breaks ties
    assert (variants["conv"]["ep"], variants["conv"]["device"]) == ("CPUExecutionProvider", "cpu")
    zipfile.ZipFile(io.BytesIO(exported(family, "ortpackage"))).extractall(tmp_path)
    folder = tmp_path / "quarters.ortpackage" / variants["conv"]["variant_directory"]
    assert onnx.load(folder / variants["conv"]["executor_info"]["ort"]["model_file"]).graph.name == "tiny"


def test_an_exported_package_comes_back_the_same_and_is_measured_anew(family: Application, tmp_path: Path) -> None:
    path = tmp_path / "f.ortpackage.zip"
    path.write_bytes(exported(family, "ortpackage"))
    other = make_application("other", dataset=family.dataset)
    found = packages.import_package(application=other, path=path, now=NOW)
    assert found.notes == []
    rows = other.variants.order_by("name").values_list("name", "precision", "base__name", "accuracy_samples")
    assert list(rows) == [("conv", "fp16", "dense", 200), ("dense", "fp32", None, 200)]
    assert set(other.variants.values_list("artifact", flat=True)) == set(
        family.variants.values_list("artifact", flat=True)
    )


def test_the_command_takes_a_package_folder_and_the_other_writes_one(family: Application, tmp_path: Path) -> None:
    call_command("export_family", "quarters", str(tmp_path / "f.zip"), "--format=ortpackage", stdout=io.StringIO())
    with pytest.raises(CommandError, match="exists already"):
        call_command("export_family", "quarters", str(tmp_path / "f.zip"))
    zipfile.ZipFile(tmp_path / "f.zip").extractall(tmp_path)
    make_application("other")
    out = io.StringIO()
    call_command("import_model", "other", str(tmp_path / "quarters.ortpackage"), stdout=out)
    assert [line.split()[0] for line in out.getvalue().splitlines()] == ["conv", "dense"]


def test_exports_are_downloaded_by_operators(family: Application) -> None:
    user = User.objects.create(username="ada")

    async def download(path: str) -> tuple[int, str, bytes]:
        client = AsyncClient()
        await client.aforce_login(user)
        answer: Any = await client.get(path)
        body = b"".join([part async for part in answer.streaming_content]) if answer.streaming else answer.content
        return answer.status_code, answer.get("Content-Disposition", ""), body

    status, disposition, body = async_to_sync(download)("/api/v1/applications/quarters/export?format=ortpackage")
    assert (status, disposition) == (200, 'attachment; filename="quarters.ortpackage.zip"')
    assert body == exported(family, "ortpackage")
    assert async_to_sync(download)("/api/v1/applications/quarters/export?format=tar")[0] == 400
    assert Client().get("/api/v1/applications/quarters/export").status_code == 401


def package(path: Path, manifest: dict[str, Any] | str, **files: bytes) -> Path:
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", text)
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def one_variant(**changes: Any) -> dict[str, Any]:
    body = {"variant_directory": "cpu", "executor_info": {"ort": {"model_file": "model.onnx"}}, **changes}
    return {"schema_version": "1.0", "components": {"net": {"variants": {"cpu": body}}}}


def external_model(folder: Path, name: str = "model.onnx") -> Path:
    """A graph whose weights lie beside it."""
    folder.mkdir(exist_ok=True)
    content = dense_model()
    external_data_helper.convert_model_to_external_data(content, location="weights.bin", size_threshold=0)
    onnx.save(content, folder / name)
    return folder / name


def test_shared_weights_of_a_package_become_part_of_the_one_file_that_devices_get(
    application: Application, tmp_path: Path
) -> None:
    graph = external_model(tmp_path / "external")
    weights = (graph.parent / "weights.bin").read_bytes()
    digest = hashlib.sha256(f"{hashlib.sha256(weights).hexdigest()}  weights.bin\n".encode()).hexdigest()
    info = {"ort": {"model_file": "model.onnx", "session_options": {}}}
    info["ort"]["session_options"] = {"session.model_external_initializers_file_folder_path": f"sha256:{digest}"}
    manifest = one_variant(executor_info=info)
    files = {"cpu/model.onnx": graph.read_bytes(), f"shared_assets/sha256-{digest}/weights.bin": weights}
    found = packages.import_package(
        application=application, path=package(tmp_path / "p.ortpackage.zip", manifest, **files), now=NOW
    )
    assert [(each.name, each.accuracy) for each in found.variants] == [("cpu", 1.0)]
    files[f"shared_assets/sha256-{digest}/weights.bin"] = weights[:-1] + b"x"
    with pytest.raises(InvalidInput, match="other content than its name says"):
        packages.import_package(
            application=application, path=package(tmp_path / "q.ortpackage.zip", manifest, **files), now=NOW
        )


def test_variants_for_other_hardware_are_left_out_with_a_word(application: Application, tmp_path: Path) -> None:
    manifest = one_variant()
    manifest["components"]["net"]["variants"]["cuda"] = {"ep": "CUDAExecutionProvider", "device": "gpu"}
    path = package(tmp_path / "p.zip", manifest, **{"cpu/model.onnx": dense_model().SerializeToString()})
    found = packages.import_package(application=application, path=path, now=NOW)
    assert [each.name for each in found.variants] == ["cpu"]
    assert found.notes == ["net/cuda: made for CUDAExecutionProvider, not for a CPU"]


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "holds no object"),
        ({"schema_version": "2.0"}, "schema_version '2.0'; 1.x is read"),
        ({"schema_version": "1.0", "layout": "installed"}, "installed layout"),
        ({"schema_version": "1.0", "components": {}}, "holds no variant"),
        ({"schema_version": "1.0", "components": []}, "is no object"),
        ({"schema_version": "1.0", "components": {"a": "../../etc"}}, "leads outside"),
        (one_variant(variant_directory="/etc"), "leads outside"),
        (one_variant(executor_info={"ort": {"model_file": "../../../etc/passwd"}}), "leads outside"),
        (one_variant(executor_info={"ort": {"model_file": "missing.onnx"}}), "is not in the package"),
        (one_variant(executor_info={"ort": {"model_file": "sha256:" + "0" * 64}}), "is not in the package"),
        (one_variant(executor_info={}), "has no model_file"),
    ],
)
def test_odd_packages_are_refused_with_a_reason(
    application: Application, tmp_path: Path, manifest: Any, reason: str
) -> None:
    path = package(tmp_path / "p.zip", manifest, **{"cpu/model.onnx": b"nonsense"})
    with pytest.raises(InvalidInput) as refusal:
        packages.import_package(application=application, path=path, now=NOW)
    assert reason in refusal.value.detail
    assert not Variant.objects.exists()


def zipped(path: Path, *entries: tuple[zipfile.ZipInfo | str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in entries:
            archive.writestr(entry, content)
    return path


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([("../outside.onnx", b"x")], "leads outside"),
        ([("/etc/outside.onnx", b"x")], "leads outside"),
        ([(link("model.onnx"), b"/etc/passwd")], "is no plain file"),
        ([("readme.txt", b"x")], "holds 0 files named *.onnx"),
        ([("a.onnx", b"x"), ("b.onnx", b"x")], "holds 2 files named *.onnx"),
        ([("a.onnx", b"\xff\xff")], "is not an ONNX file"),
    ],
)
def test_odd_zips_are_refused_with_a_reason(
    application: Application, tmp_path: Path, entries: list[tuple[Any, bytes]], reason: str
) -> None:
    with pytest.raises(InvalidInput) as refusal:
        imports.import_model(application=application, path=zipped(tmp_path / "m.zip", *entries), name="m", now=NOW)
    assert reason in refusal.value.detail


def test_a_zip_of_a_graph_with_its_weights_becomes_one_model(application: Application, tmp_path: Path) -> None:
    graph = external_model(tmp_path / "external")
    entries = [(path.name, path.read_bytes()) for path in graph.parent.iterdir()]
    variant = imports.import_model(
        application=application, path=zipped(tmp_path / "m.zip", *entries), name="joined", now=NOW
    )
    assert variant.accuracy == 1.0
    with artifacts.open_for_reading(variant.artifact_id) as file:
        content = onnx.load_from_string(file.read())
    assert not [each for each in content.graph.initializer if each.external_data]


def test_weights_that_lie_elsewhere_are_not_followed(application: Application, tmp_path: Path) -> None:
    graph = external_model(tmp_path / "external")
    content = onnx.load(graph, load_external_data=False)
    for tensor in content.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = os.path.relpath("/etc/passwd", tmp_path)
    path = zipped(tmp_path / "m.zip", ("model.onnx", content.SerializeToString()))
    with pytest.raises(InvalidInput, match="leads outside"):
        imports.import_model(application=application, path=path, name="m", now=NOW)
