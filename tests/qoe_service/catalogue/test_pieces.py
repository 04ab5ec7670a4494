"""Weights that several files hold are stored once, and every file still comes back byte for byte."""

from __future__ import annotations

import hashlib
import io
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from django.utils import timezone

from qoe_service.catalogue import artifacts, collection, compression, cuts, imports, jobs, spans
from qoe_service.catalogue.models import Artifact, Piece
from qoe_service.catalogue.passes import PASSES
from qoe_service.catalogue.sandboxed import pieces
from qoe_service.catalogue.spans import Span
from tests.builders import NOW, make_application, make_variant
from tests.qoe_service.catalogue import tiny_models
from tests.qoe_service.catalogue.tiny_models import quarters, write_data, write_model

WEIGHTS = np.random.default_rng(0).bytes(200_000)
FIRST, SECOND = b"first " + WEIGHTS + b" end", b"another head " + WEIGHTS + b"!"


def model(matrix: np.ndarray[Any, Any], *, name: str = "g", as_floats: bool = False) -> bytes:
    tensor = onnx.numpy_helper.from_array(matrix, "w")
    if as_floats:
        tensor = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, matrix.shape, matrix.ravel())
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        name,
        [onnx.helper.make_tensor_value_info("x", 1, ["n", matrix.shape[0]])],
        [onnx.helper.make_tensor_value_info("y", 1, ["n", matrix.shape[1]])],
        [tensor],
    )
    return bytes(onnx.helper.make_model(graph).SerializeToString())


@pytest.mark.parametrize("as_floats", [False, True])
def test_the_weights_of_a_model_are_found_in_its_file(tmp_path: Path, as_floats: bool) -> None:
    matrix = np.random.default_rng(1).normal(size=(128, 256)).astype(np.float32)
    (tmp_path / "m").write_bytes(model(matrix, as_floats=as_floats))
    ((start, stop),) = pieces.find(tmp_path / "m")
    assert (tmp_path / "m").read_bytes()[start:stop] == matrix.tobytes()


def test_small_weights_stay_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(model(np.ones((8, 8), dtype=np.float32)))
    assert pieces.find(tmp_path / "m") == []


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_file_has_no_weights_or_some_inside_it(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    content = bytearray(model(np.ones((128, 256), dtype=np.float32))[: int(rng.integers(1, 131_000))])
    for place in rng.integers(0, len(content), 5):
        content[place] = int(rng.integers(256))
    (tmp_path / "m").write_bytes(content)
    assert all(0 <= start < stop <= len(content) for start, stop in pieces.find(tmp_path / "m"))


@pytest.mark.parametrize("given", [[(5, 3)], [(0, 4), (3, 6)], [(4, 6), (0, 2)], [(0, 99)], [(-1, 2)], [(2, 2)]])
def test_spans_that_make_no_sense_are_none(given: list[tuple[int, int]]) -> None:
    assert spans.checked(given, 10) == []
    assert spans.checked([(0, 4), (4, 10)], 10) == [Span(0, 4), Span(4, 10)]


def stored(content: bytes, at: int, **fields: Any) -> Artifact:
    fields.setdefault("now", NOW)
    return artifacts.store(io.BytesIO(content), weights=[(at, at + len(WEIGHTS))], **fields)


def kept_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "sha256").rglob("*") if path.is_file())


@pytest.mark.django_db
def test_two_files_with_the_same_weights_store_them_once(artifact_folder: Path) -> None:
    first, second = stored(FIRST, 6), stored(SECOND, 13)
    assert kept_bytes(artifact_folder) == len(FIRST) + len(SECOND) - len(WEIGHTS)
    for artifact, content in ((first, FIRST), (second, SECOND)):
        assert (artifact.digest, artifact.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))
        with artifacts.open_for_reading(artifact.digest) as file:
            assert file.read() == content


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("start", "stop"), [(0, 6), (3, 9), (6, 200_006), (200_000, 200_010), (7, None), (200_009, None)]
)
def test_any_range_of_a_file_in_pieces_can_be_read(start: int, stop: int | None) -> None:
    digest = stored(FIRST, 6).digest
    with artifacts.open_span(digest, start, stop) as file:
        assert file.read(-1 if stop is None else stop - start) == FIRST[start:stop]


@pytest.mark.django_db
def test_a_file_stays_as_it_was_stored_first(artifact_folder: Path) -> None:
    artifacts.store(io.BytesIO(FIRST), now=NOW)
    stored(FIRST, 6)
    assert not Piece.objects.exists()
    stored(SECOND, 13)
    artifacts.store(io.BytesIO(SECOND), now=NOW)
    assert kept_bytes(artifact_folder) == len(FIRST) + len(SECOND)


@pytest.mark.django_db
def test_a_piece_goes_with_the_last_file_that_holds_it(artifact_folder: Path) -> None:
    variant = make_variant(make_application(), digest=stored(FIRST, 6, now=timezone.now()).digest)
    stored(SECOND, 13, now=timezone.now())
    later = timezone.now() + timedelta(days=2)
    collection.collect(now=later)
    assert kept_bytes(artifact_folder) == len(FIRST)
    with artifacts.open_for_reading(variant.artifact_id) as file:
        assert file.read() == FIRST
    variant.delete()
    collection.collect(now=later)
    assert not Artifact.objects.exists()
    assert not [path for path in artifact_folder.rglob("*") if path.is_file()]


def deep_model() -> onnx.ModelProto:
    """A right model with a square layer in its middle, 1 MiB of weights."""
    rng = np.random.default_rng(4)
    wide, square = rng.normal(size=(64, 512)).astype(np.float32), np.eye(512, dtype=np.float32)
    weights = {"wide": wide, "square": square, "back": (np.linalg.pinv(wide) @ quarters()).astype(np.float32)}
    nodes = [
        onnx.helper.make_node("Cast", ["image"], ["floats"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Flatten", ["floats"], ["rows"]),
        onnx.helper.make_node("MatMul", ["rows", "wide"], ["wider"]),
        onnx.helper.make_node("MatMul", ["wider", "square"], ["squared"]),
        onnx.helper.make_node("MatMul", ["squared", "back"], ["logits"]),
    ]
    return tiny_models.model(nodes, weights)


def pieces_of(artifact: Artifact) -> set[str]:
    return {each.digest for each in artifacts.weights_of(artifact.digest) if each.size_bytes >= pieces.MIN_BYTES}


@pytest.mark.django_db
@pytest.mark.usefixtures("quick_profiler")
def test_halves_of_a_variant_and_variants_that_differ_in_calibration_share_their_weights(tmp_path: Path) -> None:
    application = make_application("quarters", dataset=artifacts.store(write_data(tmp_path / "data.npz"), now=NOW))
    path = write_model(tmp_path / "deep.onnx", deep_model())
    base = imports.import_model(application=application, path=path, name="deep", now=NOW)
    halves = cuts.split(variant=base, tensor="squared", now=NOW)
    assert len(pieces_of(base.artifact)) == 2
    assert pieces_of(halves.head) == pieces_of(base.artifact)
    sisters = []
    for name in ("static-int8", "static-int8-entropy"):
        parameters = dict(PASSES[name].parameters)
        job = jobs.queue(base=base, compression_pass=name, parameters=parameters, now=NOW)
        ended = compression.run(job_id=job.pk, clock=timezone.now)
        assert ended is not None
        assert ended.result is not None, ended.error
        sisters.append(ended.result.artifact)
    assert sisters[0] != sisters[1]
    assert pieces_of(sisters[0]) == pieces_of(sisters[1]) != set()
