"""Immutable bytes by their sha256: stored once, streamed in and out, never read whole into memory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from django.conf import settings
from django.core.files import File

from qoe_service.catalogue import storages
from qoe_service.catalogue.models import Artifact
from qoe_service.errors import NotFound, TooLarge

CHUNK_BYTES = 262_144


class _Received(File):  # type: ignore[type-arg]  # generic for the checker only, not when running
    """A complete file beside the store; a folder renames it instead of copying."""

    def temporary_file_path(self) -> str:
        """Where the bytes are: Django's file storage looks for this method."""
        return str(self.name)


def name_of(digest: str) -> str:
    """The storage name of an artifact."""
    return f"sha256/{digest[:2]}/{digest}"


def store(source: Path | BinaryIO, *, now: datetime, max_bytes: int | None = None) -> Artifact:
    """Keep the bytes of ``source`` under their sha256; bytes that are there already are kept once.

    The row is written after the bytes are safe, so a row always has its bytes. Raises TooLarge.
    """
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(source.open("rb")) if isinstance(source, Path) else source
        received = stack.enter_context(incoming())
        digest, size_bytes = _copy_hashed(stream, received, max_bytes)
        _keep(_Received(received, name=received.name), digest, size_bytes)
        artifact, _ = Artifact.objects.update_or_create(
            digest=digest,
            defaults={"stored_at": now},
            create_defaults={"size_bytes": size_bytes, "created_at": now, "stored_at": now},
        )
        # once more: a collection that ran in between took the row that it found, and the bytes with it
        _keep(File(received), digest, size_bytes)
    return artifact


def open_for_reading(digest: str) -> BinaryIO:
    """The artifact as a binary file to read from its beginning; the caller closes it. Raises NotFound."""
    return open_span(digest, 0, None)


def open_span(digest: str, start: int, stop: int | None) -> BinaryIO:
    """The artifact from byte ``start`` up to, not including, ``stop``; the caller closes it. Raises NotFound."""
    try:
        return storages.read(name_of(digest), start, stop)
    except FileNotFoundError:
        raise NotFound(f"no artifact {digest[:64]}", field="digest") from None


def digest_of(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def incoming_folder() -> Path:
    """A folder of this machine for bytes on their way, on the disk of the store where that is a folder."""
    folder = Path(settings.ARTIFACT_DIR) / "incoming"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def incoming() -> Iterator[BinaryIO]:
    """A file for bytes on their way; it goes away unless the store took it."""
    with tempfile.NamedTemporaryFile(dir=incoming_folder(), delete=False) as received:
        try:
            yield received  # type: ignore[misc]  # a named temporary file is a BinaryIO in all but type
        finally:
            Path(received.name).unlink(missing_ok=True)


def _keep(received: File[bytes], digest: str, size_bytes: int) -> None:
    if storages.size(name_of(digest)) != size_bytes:
        received.seek(0)
        storages.save(name_of(digest), received)


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
