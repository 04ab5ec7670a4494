"""Reads zips of models: a graph with its external data, or an ONNX Runtime model package (``.ortpackage``).

The package format, schema 1.x in its portable layout: https://github.com/microsoft/onnxruntime/tree/main/model_package
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from .refusal import Refusal

if TYPE_CHECKING:
    import onnx

MANIFEST, COMPONENT = "manifest.json", "component.json"
MAX_FILES, MAX_UNPACKED_BYTES, MAX_JSON_BYTES = 2000, 4 * 2**30, 2**20
MAX_MODEL_BYTES = 2 * 2**30 - 1  # the bound of one protobuf message; above it lie weights before their graph
MAX_VARIANTS = 64
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_ASSET = re.compile(r"sha256:([0-9a-f]{64})(?:/(.*))?")


class Package(NamedTuple):
    """An unpacked package."""

    root: Path
    manifest: Mapping[str, Any]


class Place(NamedTuple):
    """Where a variant stands in its package, and the file that it becomes."""

    folder: Path
    component: str
    name: str
    target: str


def unpack(bundle: Path, folder: Path) -> None:
    """Unpack a zip of plain files. Raises Refusal before anything is written outside ``folder``."""
    try:
        with zipfile.ZipFile(bundle) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            _check_entries(entries)
            for entry in entries:
                _unpack_one(archive, entry, folder)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise Refusal(f"it is not a zip file, or it is damaged: {error}"[:300]) from None


def only_graph(folder: Path) -> Path:
    """The one ONNX file in a bundle."""
    found = sorted(path for path in folder.rglob("*.onnx") if path.is_file())
    if len(found) != 1:
        raise Refusal(f"the zip holds {len(found)} files named *.onnx; one is needed, with its external data beside it")
    return found[0]


def join(graph: Path, target: Path, weights_folder: Path | None = None, *, at_most: int = MAX_MODEL_BYTES) -> None:
    """Write a model whose weights lie in other files as one file: one protobuf where ``at_most`` bytes suffice, a
    container above. Raises Refusal, and what onnx raises."""
    import onnx  # noqa: PLC0415 - most packages that are refused are refused without it

    from . import containers  # noqa: PLC0415 - as above

    if graph.stat().st_size > MAX_MODEL_BYTES:
        raise Refusal(f"{graph.name} is larger than {MAX_MODEL_BYTES} bytes; larger models need external data")
    model = onnx.load(graph, load_external_data=False)
    base = weights_folder or graph.parent
    total = graph.stat().st_size + sum(path.stat().st_size for path in _weight_files(model, base))
    if total > at_most:
        containers.write(model, base, target)
        return
    onnx.load_external_data_for_model(model, str(base))
    onnx.save(model, target)


def root_of(folder: Path) -> Path:
    """Where manifest.json lies: at the top, or in the only folder there."""
    inner = [path for path in folder.iterdir() if path.is_dir()]
    candidates = [folder, *(inner if len(inner) == 1 else [])]
    found = next((each for each in candidates if (each / MANIFEST).is_file()), None)
    if found is None:
        raise Refusal("it holds no manifest.json, so it is no model package")
    return found


def variants_of(root: Path) -> list[dict[str, Any]]:
    """Every variant of a package that a CPU runs, each written as one ONNX file; what the package says about it."""
    manifest = _json(root / MANIFEST)
    _check_manifest(manifest)
    package, found = Package(root, manifest), list[dict[str, Any]]()
    for name, body, folder in _components(root, manifest):
        for variant_name, variant in _mapping(body, "variants", name).items():
            if len(found) >= MAX_VARIANTS:
                raise Refusal(f"it holds more than {MAX_VARIANTS} variants")
            place = Place(folder, name, variant_name, f"variant-{len(found)}.onnx")
            found.append(_variant(package, place, variant))
    if not found:
        raise Refusal("it holds no variant")
    return found


def _check_entries(entries: list[zipfile.ZipInfo]) -> None:
    if len(entries) > MAX_FILES:
        raise Refusal(f"it holds {len(entries)} files; at most {MAX_FILES} are taken")
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > MAX_UNPACKED_BYTES:
        raise Refusal(f"it unpacks to {unpacked} bytes; at most {MAX_UNPACKED_BYTES} are taken")
    for entry in entries:
        confined(entry.filename)
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in {0, stat.S_IFREG}:
            raise Refusal(f"{entry.filename[:200]!r} is no plain file")


def _unpack_one(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path) -> None:
    target = folder / confined(entry.filename)
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(entry) as source, target.open("xb") as file:
        # a zip may claim less than it unpacks to; zipfile stops at the claim and then checks the sum
        shutil.copyfileobj(source, file, 262_144)


def confined(path: str) -> PurePosixPath:
    """A relative path without a way out. Raises Refusal."""
    given = PurePosixPath(path)
    if given.is_absolute() or ".." in given.parts or "\\" in path or "\0" in path or not given.parts:
        raise Refusal(f"the path {path[:200]!r} leads outside")
    return given


def _weight_files(model: onnx.ModelProto, base: Path) -> Iterator[Path]:
    import onnx  # noqa: PLC0415 - as above

    names = set()
    for tensor in onnx.external_data_helper._get_all_tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            names.add(next((each.value for each in tensor.external_data if each.key == "location"), ""))
    for name in sorted(names):
        path = base / confined(name)
        if not path.is_file():
            raise Refusal(f"its weights should lie in {name[:200]!r}, which is not there")
        yield path


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    version = str(manifest.get("schema_version", ""))
    if version.partition(".")[0] != "1":
        raise Refusal(f"manifest.json has schema_version {version!r}; 1.x is read")
    if manifest.get("layout", "portable") != "portable":
        raise Refusal("manifest.json has the installed layout, which points outside; export a portable package")


def _components(root: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Path]]:
    for name, value in _mapping(manifest, "components", MANIFEST).items():
        if isinstance(value, Mapping):
            yield name, value, root
            continue
        if not isinstance(value, str):
            raise Refusal(f"component {name[:80]!r} is neither a path nor an object")
        path = root / confined(value)
        file = path / COMPONENT if path.is_dir() else path
        yield name, _json(file), file.parent


def _variant(package: Package, place: Place, body: Any) -> dict[str, Any]:
    label = f"{place.component}/{place.name}"[:160]
    if not isinstance(body, Mapping):
        raise Refusal(f"variant {label!r} is no object")
    answer: dict[str, Any] = {"component": place.component[:200], "name": place.name[:200], "metadata": {}}
    answer |= {"file": None, "why_not": None}
    if body.get("ep", "CPUExecutionProvider") != "CPUExecutionProvider" or body.get("device", "cpu") != "cpu":
        return {**answer, "why_not": f"made for {body.get('ep') or body.get('device')}, not for a CPU"[:200]}
    own = place.folder / confined(str(body.get("variant_directory", place.name)))
    info = _mapping(body, "executor_info", label).get("ort")
    info = _json(own / confined(info)) if isinstance(info, str) else info
    if not isinstance(info, Mapping) or not isinstance(info.get("model_file"), str):
        return {**answer, "why_not": 'has no model_file under executor_info["ort"]'}
    options = _mapping(info, "session_options", label)
    weights = options.get(WEIGHTS_FOLDER)
    graph = _resolved(package, own, info["model_file"])
    join(graph, Path(place.target), _resolved(package, own, str(weights)) if weights else None)
    metadata = body.get("additional_metadata")
    return {**answer, "file": place.target, "metadata": metadata if isinstance(metadata, Mapping) else {}}


def _resolved(package: Package, base: Path, reference: str) -> Path:
    """The file or folder that a reference names: relative to its variant, or in a shared asset."""
    match = _ASSET.fullmatch(reference)
    if match is None:
        path = base / confined(reference)
    else:
        asset = _asset(package, match[1])
        path = asset / confined(match[2]) if match[2] else asset
    if not path.exists():
        raise Refusal(f"{reference[:200]!r} is not in the package")
    return path


def _asset(package: Package, digest: str) -> Path:
    places = _mapping(package.manifest, "shared_assets", MANIFEST)
    folder = package.root / confined(str(places.get(f"sha256:{digest}", f"shared_assets/sha256-{digest}")))
    if not folder.is_dir():
        raise Refusal(f"the shared asset sha256:{digest} is not in the package")
    if directory_digest(folder) != digest:
        raise Refusal(f"the shared asset sha256:{digest} has other content than its name says")
    return folder


def directory_digest(folder: Path) -> str:
    """sha256 over sorted ``<sha256>  <path>`` lines, as the format defines it."""
    lines = []
    for path in sorted((each for each in folder.rglob("*") if each.is_file()), key=lambda each: each.as_posix()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _mapping(owner: Mapping[str, Any], key: str, what: str) -> Mapping[str, Any]:
    value = owner.get(key, {})
    if not isinstance(value, Mapping):
        raise Refusal(f"{key} of {what[:100]!r} is no object")
    return value


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
        raise Refusal(f"{path.name} is missing, or larger than {MAX_JSON_BYTES} bytes")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{path.name} is not JSON: {error}"[:300]) from None
    if not isinstance(value, dict):
        raise Refusal(f"{path.name} holds no object")
    return value
