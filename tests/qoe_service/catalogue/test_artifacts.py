from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest

from qoe_service.catalogue import artifacts
from qoe_service.catalogue.models import Artifact
from qoe_service.errors import NotFound, TooLarge
from tests.builders import NOW

pytestmark = pytest.mark.django_db


class CountingStream(io.BytesIO):
    """Remembers the largest read."""

    largest = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.largest = max(self.largest, 2**40 if size is None or size < 0 else size)
        return super().read(size)


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_bytes_are_kept_under_their_sha256(artifact_folder: Path) -> None:
    digest = hashlib.sha256(b"model").hexdigest()
    artifact = artifacts.store(io.BytesIO(b"model"), now=NOW)
    assert (artifact.digest, artifact.size_bytes) == (digest, 5)
    assert files_in(artifact_folder) == [artifact_folder / "sha256" / digest[:2] / digest]
    with artifacts.open_for_reading(digest) as file:
        assert file.read() == b"model"


def test_the_same_bytes_are_kept_once(artifact_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    path.write_bytes(b"model")
    assert artifacts.store(io.BytesIO(b"model"), now=NOW) == artifacts.store(path, now=NOW)
    assert Artifact.objects.count() == 1
    assert len(files_in(artifact_folder)) == 1


def test_a_lost_file_comes_back_when_it_is_stored_again(artifact_folder: Path) -> None:
    digest = artifacts.store(io.BytesIO(b"model"), now=NOW).digest
    files_in(artifact_folder)[0].unlink()
    artifacts.store(io.BytesIO(b"model"), now=NOW)
    with artifacts.open_for_reading(digest) as file:
        assert file.read() == b"model"


def test_large_files_pass_through_in_small_reads() -> None:
    stream = CountingStream(b"x" * 3_000_000)
    artifacts.store(stream, now=NOW)
    assert 0 < stream.largest <= 262_144


def test_a_file_above_the_bound_leaves_nothing_behind(artifact_folder: Path) -> None:
    with pytest.raises(TooLarge):
        artifacts.store(io.BytesIO(b"x" * 11), now=NOW, max_bytes=10)
    assert not Artifact.objects.exists()
    assert files_in(artifact_folder) == []


def test_a_stream_that_breaks_off_leaves_nothing_behind(artifact_folder: Path) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise ConnectionError

    with pytest.raises(ConnectionError):
        artifacts.store(Broken(), now=NOW)
    assert files_in(artifact_folder) == []


@pytest.mark.parametrize("digest", ["0" * 64, "nothing"])
def test_unknown_digests_are_not_found(digest: str) -> None:
    with pytest.raises(NotFound):
        artifacts.open_for_reading(digest)
