"""Families of variants as files: a zip with a manifest, or an ONNX Runtime model package (``.ortpackage``), zipped.

A package that comes in is unpacked in the sandbox, and each of its variants is imported like any other model: what a
package claims about them is kept as provenance and believed in nothing.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from qoe_service.catalogue import artifacts, imports, sandbox
from qoe_service.catalogue.models import Application, Variant
from qoe_service.catalogue.sandboxed import footer
from qoe_service.errors import Conflict, InvalidInput, ServiceError

FORMATS = ("zip", "ortpackage")
OWN = "edge_qoe"
UNKNOWN_PRECISION = "unknown"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same family gives the same bytes
Text = Annotated[str, Field(max_length=300)]


@dataclass(frozen=True, slots=True)
class Imported:
    """What a package became, and why parts of it became nothing."""

    variants: Sequence[Variant]
    notes: Sequence[str]


class Found(BaseModel):
    """One variant as the sandbox found it in a package."""

    component: Text
    name: Text
    file: Annotated[str, Field(pattern=r"^variant-\d{1,3}\.onnx$")] | None
    why_not: Text | None
    metadata: dict[str, Any]


class Contents(BaseModel):
    """The sandbox's answer about a package."""

    variants: list[Found] = Field(min_length=1, max_length=64)


def import_package(
    *,
    application: Application,
    path: Path,
    passes: Sequence[str] = (),
    now: datetime,
    watch: sandbox.Watch | None = None,
) -> Imported:
    """Import every CPU variant of a zipped model package. Raises InvalidInput when none can be used."""
    with sandbox.opened() as box:
        contents = _unpacked(box, path, watch)
        variants, notes = [], []
        for found in contents.variants:
            try:
                with _extracted(box, found) as file:
                    variant = imports.import_model(
                        application=application,
                        path=file,
                        name=_name_of(found, contents),
                        passes=passes,
                        precision=_precision_of(found),
                        provenance={"package": found.model_dump(include={"component", "name", "metadata"})},
                        now=now,
                        watch=watch,
                    )
                variants.append(variant)
            except (ServiceError, sandbox.Refused) as refusal:
                notes.append(f"{found.component}/{found.name}: {refusal}")
    if not variants:
        raise InvalidInput(f"{path.name} is refused: {'; '.join(notes)}"[:2000], field=imports.FIELD)
    _restore_bases(application, contents, variants)
    return Imported(variants, notes)


@contextlib.contextmanager
def as_zip(path: Path) -> Iterator[Path]:
    """A folder as a zip; a file as it is. Links are not followed. Raises InvalidInput."""
    if not path.is_dir():
        if not path.is_file():
            raise InvalidInput(f"there is no file {str(path)!r}", field=imports.FIELD)
        yield path
        return
    with tempfile.TemporaryDirectory(dir=artifacts.incoming_folder()) as folder:
        target = Path(folder) / f"{path.name}.zip"
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            for each in sorted(path.rglob("*")):
                if each.is_file() and not each.is_symlink():
                    archive.write(each, each.relative_to(path))
        yield target


def export(application: Application, format_name: str) -> Iterator[bytes]:
    """The family as the bytes of a zip, a chunk at a time. Raises InvalidInput, Conflict."""
    if format_name not in FORMATS:
        raise InvalidInput(f"{' and '.join(FORMATS)} are written", field="format")
    variants = list(_in_order(application))
    if not variants:
        raise Conflict(f"{application.name} has no variant in use", field="application")
    make = _package if format_name == "ortpackage" else _family
    manifest, entries = make(application, variants)
    folder = f"{application.name}.ortpackage/" if format_name == "ortpackage" else f"{application.name}/"
    return _zipped(folder, manifest, entries)


def described(variant: Variant) -> dict[str, Any]:
    """All that a reader of an export needs to judge a variant and to build it again."""
    return {
        "name": variant.name,
        "digest": f"sha256:{variant.artifact_id}",
        "size_bytes": variant.artifact.size_bytes,
        "precision": variant.precision,
        "base": variant.base.name if variant.base else None,
        "compression_pass": variant.compression_pass or None,
        "accuracy": variant.accuracy,
        "accuracy_kind": variant.accuracy_kind or None,
        "accuracy_interval": [variant.accuracy_low, variant.accuracy_high],
        "accuracy_samples": variant.accuracy_samples,
        "accuracy_isa": variant.accuracy_isa or None,
        "inputs": variant.inputs,
        "outputs": variant.outputs,
        "provenance": variant.provenance,
    }


def _in_order(application: Application) -> Iterator[Variant]:
    """The safe baseline first: where a reader of packages breaks ties by order, it gets what we would fall back to."""
    rows = application.variants.filter(retired_at=None).select_related("artifact", "base")
    return iter(sorted(rows, key=lambda each: (each.artifact_id != application.baseline_digest, each.name)))


def _family(application: Application, variants: Sequence[Variant]) -> tuple[dict[str, Any], list[_Entry]]:
    entries, rows = list[_Entry](), list[dict[str, Any]]()
    for each in variants:
        graph = _graph_of(each)
        path = f"variants/{each.name}.onnx" if graph is None else f"variants/{each.name}/{footer.GRAPH}"
        entries += _entries(each, PurePosixPath(path), graph)
        rows.append({**described(each), "file": path})
    head = {"format": "edge-qoe-family", "version": 1, "application": application.name, "title": application.title}
    return {**head, "baseline": application.baseline_variant or None, "variants": rows}, entries


def _package(application: Application, variants: Sequence[Variant]) -> tuple[dict[str, Any], list[_Entry]]:
    entries, bodies = list[_Entry](), dict[str, Any]()
    for each in variants:
        graph, folder = _graph_of(each), f"{application.name}/{each.name}"
        file = "model.onnx" if graph is None else footer.GRAPH
        entries += _entries(each, PurePosixPath(folder) / file, graph)
        bodies[each.name] = {
            "variant_directory": folder,
            "ep": "CPUExecutionProvider",
            "device": "cpu",
            "executor_info": {"ort": {"model_file": file}},
            "additional_metadata": {OWN: described(each)},
        }
    manifest = {
        "schema_version": "1.0",
        "package_name": application.name,
        "description": application.title,
        "layout": "portable",
        "components": {application.name: {"component_name": application.name, "variants": bodies}},
    }
    return manifest, entries


class _Entry(NamedTuple):
    """One file of an export: an artifact from ``start`` up to, not including, ``stop``."""

    path: str
    digest: str
    start: int
    stop: int


def _graph_of(variant: Variant) -> tuple[int, int] | None:
    """Where the graph lies in a model of 2 GiB and more, which is kept as weights and graph in one file."""
    size = variant.artifact.size_bytes
    with artifacts.open_span(variant.artifact_id, max(size - footer.FOOTER.size, 0), size) as file:
        return footer.span_of_graph(file.read(footer.FOOTER.size), size)


def _entries(variant: Variant, path: PurePosixPath, graph: tuple[int, int] | None) -> list[_Entry]:
    """The files of one variant: its ONNX file, or graph and weights as any program reads them."""
    size = variant.artifact.size_bytes
    if graph is None:
        return [_Entry(str(path), variant.artifact_id, 0, size)]
    weights = _Entry(str(path.with_name(footer.WEIGHTS)), variant.artifact_id, 0, size)
    return [_Entry(str(path), variant.artifact_id, *graph), weights]


class _Outlet(io.RawIOBase):
    """What was written since somebody last looked; a zip needs no more to go back to."""

    def __init__(self) -> None:
        super().__init__()
        self._written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._written += data
        return len(data)

    def taken(self) -> bytes:
        taken = bytes(self._written)
        self._written.clear()
        return taken


def _zipped(folder: str, manifest: dict[str, Any], entries: Sequence[_Entry]) -> Iterator[bytes]:
    # weights hardly compress, so nothing is compressed
    outlet = _Outlet()
    with zipfile.ZipFile(outlet, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo(f"{folder}manifest.json", _EPOCH), json.dumps(manifest, indent=2))
        for each in entries:
            info = zipfile.ZipInfo(folder + each.path, _EPOCH)
            info.file_size = left = each.stop - each.start
            with archive.open(info, "w") as target, artifacts.open_span(each.digest, each.start, each.stop) as source:
                while chunk := source.read(min(artifacts.CHUNK_BYTES, left)):
                    left -= len(chunk)
                    target.write(chunk)
                    yield outlet.taken()
    yield outlet.taken()


def _unpacked(box: sandbox.Sandbox, path: Path, watch: sandbox.Watch | None) -> Contents:
    try:
        sandbox.check_memory(box.limits, path.stat().st_size, 2.0, what="unpacking it")
        box.add(imports.BUNDLE, path.open("rb"))
        request = {"command": "unpack-package", "bundle": imports.BUNDLE}
        return Contents.model_validate(box.ask(request, program="sandboxed.intake", watch=watch))
    except sandbox.Refused as refusal:
        raise InvalidInput(f"{path.name} is refused: {refusal}", field=imports.FIELD) from None
    except ValidationError as error:
        raise InvalidInput(f"{path.name} is refused: {error.errors()[0]['msg']}", field=imports.FIELD) from None


@contextlib.contextmanager
def _extracted(box: sandbox.Sandbox, found: Found) -> Iterator[Path]:
    """The model of one variant outside the sandbox that unpacked it. Raises sandbox.Refused."""
    if found.file is None:
        raise sandbox.Refused(found.why_not or "holds no model")
    with artifacts.incoming() as file, box.open(found.file) as source:
        shutil.copyfileobj(source, file, artifacts.CHUNK_BYTES)
        file.flush()
        yield Path(file.name)


def _precision_of(found: Found) -> str:
    claims = found.metadata.get(OWN)
    claimed = str(claims.get("precision", "")) if isinstance(claims, dict) else ""
    return claimed if imports.PRECISION.match(claimed) else UNKNOWN_PRECISION


def _name_of(found: Found, contents: Contents) -> str:
    components = {each.component for each in contents.variants}
    name = found.name if len(components) == 1 else f"{found.component}-{found.name}"
    return re.sub(r"[^a-zA-Z0-9._-]+", "-", name).strip("-._")[:64] or "variant"


def _restore_bases(application: Application, contents: Contents, variants: Sequence[Variant]) -> None:
    """Our own exports say what was derived from what; a base that came along, or was there, is linked again."""
    claimed = {
        _name_of(found, contents): claims.get("base")
        for found in contents.variants
        if isinstance(claims := found.metadata.get(OWN), dict)
    }
    for variant in variants:
        base = application.variants.filter(name=str(claimed.get(variant.name) or "")).exclude(pk=variant.pk).first()
        if base is not None and variant.base is None and base.base_id != variant.pk:
            variant.base = base
            variant.save(update_fields=["base"])
