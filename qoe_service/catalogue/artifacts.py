"""Immutable bytes by their sha256: stored once, streamed in and out, never read whole into memory.

A file whose large weights are known is kept in pieces: each weight under its own sha256, once, however many files hold
it, and what is left of the file beside them. Who reads it gets the file, byte for byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple

from django.conf import settings
from django.core.files import File
from django.db import transaction
from django.db.models import F

from qoe_service.catalogue import spans as stretches
from qoe_service.catalogue import storages
from qoe_service.catalogue.models import Artifact, Piece
from qoe_service.catalogue.spans import Span
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


def store(
    source: Path | BinaryIO, *, now: datetime, max_bytes: int | None = None, weights: Sequence[tuple[int, int]] = ()
) -> Artifact:
    """Keep the bytes of ``source`` under their sha256; bytes that are there already are kept once.

    ``weights`` are spans (start, stop) that other files may hold too. The row is written after the bytes are safe, so
    a row always has its bytes. Raises TooLarge.
    """
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(source.open("rb")) if isinstance(source, Path) else source
        received = stack.enter_context(incoming())
        digest, size_bytes = _copy_hashed(stream, received, max_bytes)
        pieces = _kept_in_pieces(received, digest, stretches.checked(weights, size_bytes), size_bytes, now)
        if not pieces:
            _keep(_Received(received, name=received.name), digest, size_bytes)
        with transaction.atomic():
            artifact, _ = Artifact.objects.update_or_create(
                digest=digest,
                defaults={"stored_at": now},
                create_defaults={"size_bytes": size_bytes, "created_at": now, "stored_at": now},
            )
            if pieces and not artifact.pieces.exists():
                Piece.objects.bulk_create(pieces)
        if not pieces:
            # once more: a collection that ran in between took the row that it found, and the bytes with it
            _keep(File(received), digest, size_bytes)
    return artifact


def open_for_reading(digest: str) -> BinaryIO:
    """The artifact as a binary file to read from its beginning; the caller closes it. Raises NotFound."""
    return open_span(digest, 0, None)


def open_span(digest: str, start: int, stop: int | None) -> BinaryIO:
    """The artifact from byte ``start`` up to, not including, ``stop``; the caller closes it. Raises NotFound."""
    pieces = list(Piece.objects.filter(whole=digest))
    try:
        return _joined(pieces, start, stop) if pieces else storages.read(name_of(digest), start, stop)
    except FileNotFoundError:
        raise NotFound(f"no artifact {digest[:64]}", field="digest") from None


class Weight(NamedTuple):
    """Bytes of an artifact from ``offset`` on that other artifacts may hold too."""

    digest: str
    offset: int
    size_bytes: int


def weights_of(digest: str) -> list[Weight]:
    """The pieces of an artifact that stand for themselves; what is left of the file beside them does not count."""
    rows = Piece.objects.filter(whole=digest, start=0, size_bytes=F("stored__size_bytes"))
    return [Weight(row.stored_id, row.offset, row.size_bytes) for row in rows]


def digest_of(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return digest_of_stream(file)


def digest_of_stream(source: BinaryIO) -> str:
    """The sha256 of what is left of a stream."""
    sha256 = hashlib.sha256()
    while chunk := source.read(CHUNK_BYTES):
        sha256.update(chunk)
    return sha256.hexdigest()


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


def _kept_in_pieces(
    received: BinaryIO, digest: str, weights: Sequence[Span], size_bytes: int, now: datetime
) -> list[Piece]:
    """Rows of the pieces, whose bytes are safe; none where the file is, or should be, kept as it is."""
    if not weights or storages.size(name_of(digest)) == size_bytes:
        return []

    def opened(start: int) -> BinaryIO:
        file = Path(received.name).open("rb")  # noqa: SIM115 - the stream that reads it closes it
        file.seek(start)
        return file

    rows, rest, left = list[Piece](), stretches.between(weights, size_bytes), 0
    for each in weights:
        with stretches.of_file(opened, [each]) as part:
            stored = store(part, now=now)
        rows.append(Piece(whole_id=digest, stored=stored, offset=each.start, size_bytes=each.stop - each.start))
    with stretches.of_file(opened, rest) as part:
        stored = store(part, now=now)
    for each in rest:
        size = each.stop - each.start
        rows.append(Piece(whole_id=digest, stored=stored, offset=each.start, start=left, size_bytes=size))
        left += size
    return rows


def _joined(pieces: Sequence[Piece], start: int, stop: int | None) -> BinaryIO:
    """The pieces from byte ``start`` of the whole on, as one stream."""
    parts, end = [], sum(each.size_bytes for each in pieces) if stop is None else stop
    for each in pieces:
        first, last = max(start - each.offset, 0), min(end - each.offset, each.size_bytes)
        if first < last:
            parts.append(_Stored(each.stored_id, Span(each.start + first, each.start + last)).opened)
    return io.BufferedReader(stretches.Joined(parts), CHUNK_BYTES)


class _Stored(NamedTuple):
    """A span of a stored file."""

    digest: str
    span: Span

    def opened(self) -> tuple[BinaryIO, int]:
        """The file at the span's beginning, and how much of it to read."""
        return storages.read(name_of(self.digest), *self.span), self.span.stop - self.span.start


def _keep(received: File[bytes], digest: str, size_bytes: int) -> None:
    if storages.size(name_of(digest)) != size_bytes and not Piece.objects.filter(whole=digest).exists():
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
