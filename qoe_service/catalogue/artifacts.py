"""Immutable bytes by their sha256: stored once, streamed in and out, never read whole into memory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from django.conf import settings
from django.core.files import File
from django.core.files.storage import FileSystemStorage, Storage

from qoe_service.catalogue.models import Artifact
from qoe_service.errors import NotFound, TooLarge

CHUNK_BYTES = 262_144


class _Received(File):  # type: ignore[type-arg]  # generic for the checker only, not when running
    """A complete file beside the store; the storage renames it instead of copying."""

    def temporary_file_path(self) -> str:
        """Where the bytes are: Django's file storage looks for this method."""
        return str(self.name)


def storage() -> Storage:
    """Where artifacts are kept. Writing one twice writes the same bytes twice, so overwriting is safe."""
    return FileSystemStorage(location=settings.ARTIFACT_DIR, allow_overwrite=True)


def name_of(digest: str) -> str:
    """The storage name of an artifact."""
    return f"sha256/{digest[:2]}/{digest}"


def store(source: Path | BinaryIO, *, now: datetime, max_bytes: int | None = None) -> Artifact:
    """Keep the bytes of ``source`` under their sha256; bytes that are there already are kept once.

    The row is written after the bytes are safe, so a row always has its bytes. Raises TooLarge.
    """
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(source.open("rb")) if isinstance(source, Path) else source
        received = stack.enter_context(_incoming())
        digest, size_bytes = _copy_hashed(stream, received, max_bytes)
        if not _is_kept(digest, size_bytes):
            storage().save(name_of(digest), _Received(received, name=received.name))
            _sync_folder(digest)
    artifact, _ = Artifact.objects.get_or_create(digest=digest, defaults={"size_bytes": size_bytes, "created_at": now})
    return artifact


def open_for_reading(digest: str) -> BinaryIO:
    """The artifact as a binary file; the caller closes it. Raises NotFound."""
    try:
        opened: Any = storage().open(name_of(digest), "rb")
    except FileNotFoundError:
        raise NotFound(f"no artifact {digest[:64]}", field="digest") from None
    stream: BinaryIO = opened.file
    return stream


def digest_of(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _incoming() -> Iterator[BinaryIO]:
    folder = Path(settings.ARTIFACT_DIR) / "incoming"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as received:
        try:
            yield received  # type: ignore[misc]  # a named temporary file is a BinaryIO in all but type
        finally:
            Path(received.name).unlink(missing_ok=True)


def _copy_hashed(source: BinaryIO, target: BinaryIO, max_bytes: int | None) -> tuple[str, int]:
    sha256, size_bytes = hashlib.sha256(), 0
    while chunk := source.read(CHUNK_BYTES):
        size_bytes += len(chunk)
        if max_bytes is not None and size_bytes > max_bytes:
            raise TooLarge(f"the file is larger than {max_bytes} bytes", field="file")
        sha256.update(chunk)
        target.write(chunk)
    target.flush()
    os.fsync(target.fileno())
    return sha256.hexdigest(), size_bytes


def _is_kept(digest: str, size_bytes: int) -> bool:
    try:
        return storage().size(name_of(digest)) == size_bytes
    except FileNotFoundError:
        return False


def _sync_folder(digest: str) -> None:
    # a rename survives a power loss only once its folder is on disk
    descriptor = os.open(Path(storage().path(name_of(digest))).parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
