"""What a download need not fetch: weights that the variant shares with one that is on this device already.

The service says where the large weights of a file lie and what they are (``SharedWeights``); the same list about a
variant that is here was kept beside it. Nothing of this is trusted: a weight is hashed before it is copied, and the
whole file after that.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from device_agents.wire import SharedWeights

logger = logging.getLogger("qoe_agent.reuse")

# A request more is worth it from here on; and each stretch between weights is one more.
LEAST_BYTES, MOST_WEIGHTS = 2**20, 32
CHUNK_BYTES = 262_144


class Local(NamedTuple):
    """Bytes of a file on its way, from ``start`` up to, not including, ``stop``; they lie in another at ``offset``."""

    start: int
    stop: int
    path: Path
    offset: int
    digest: str


def keep(folder: Path, digest: str, listed: SharedWeights) -> None:
    """Remembers what a variant that is here now holds. A full disk costs no more than the bytes saved next time."""
    with suppress(OSError):
        (folder / f"{digest}.weights").write_text(listed.model_dump_json())


def find(folder: Path, listed: SharedWeights) -> tuple[Local, ...]:
    """Which weights of the list are here, in the order of the file: the largest, and none twice."""
    here = dict(_here(folder))
    found, end = list[Local](), 0
    for each in sorted(listed.weights, key=lambda weight: weight.offset):
        if each.offset >= end and each.digest in here:
            path, offset = here[each.digest]
            end = each.offset + each.size_bytes
            found.append(Local(each.offset, end, path, offset, each.digest))
    largest = sorted(found, key=lambda local: local.start - local.stop)[:MOST_WEIGHTS]
    return tuple(sorted(largest))


def append(local: Local, part: Path) -> bool:
    """Adds what is missing of a weight to the end of ``part``. False where it is not what it was, or cannot be read."""
    try:
        if not _is_intact(local):
            logger.warning("weights on disk are damaged file=%s", local.path)
            return False
        have = part.stat().st_size if part.exists() else 0
        with part.open("ab") as target:
            for chunk in _chunks(local.path, local.offset + have - local.start, local.stop - have):
                target.write(chunk)
    except OSError:
        return False
    return True


def _is_intact(local: Local) -> bool:
    sha256 = hashlib.sha256()
    for chunk in _chunks(local.path, local.offset, local.stop - local.start):
        sha256.update(chunk)
    return sha256.hexdigest() == local.digest


def _chunks(path: Path, start: int, size: int) -> Iterator[bytes]:
    with path.open("rb") as source:
        source.seek(start)
        while size > 0 and (chunk := source.read(min(CHUNK_BYTES, size))):
            size -= len(chunk)
            yield chunk


def _here(folder: Path) -> Iterator[tuple[str, tuple[Path, int]]]:
    """Digests of the weights in the variants of a folder, each with a place; lists of evicted variants go."""
    for path in folder.glob("*.weights"):
        variant = path.with_suffix(".onnx")
        if not variant.exists():
            path.unlink(missing_ok=True)
            continue
        try:
            listed = SharedWeights.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            continue
        for each in listed.weights:
            yield each.digest, (variant, each.offset)
