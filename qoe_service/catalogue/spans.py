"""Parts of files as one stream: what several stored files hold together, or what is left of one without its parts."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple


class Span(NamedTuple):
    """Bytes from ``start`` up to, not including, ``stop``."""

    start: int
    stop: int


class Joined(io.RawIOBase):
    """One part after another, each opened when the one before it has ended."""

    def __init__(self, parts: Sequence[Callable[[], tuple[BinaryIO, int]]]) -> None:
        super().__init__()
        self._parts: Iterator[Callable[[], tuple[BinaryIO, int]]] = iter(parts)
        self._file: BinaryIO | None = None
        self._left = 0

    def readable(self) -> bool:
        """It is for reading."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill some of the buffer; 0 at the end."""
        while self._left == 0:
            self._shut()
            begin = next(self._parts, None)
            if begin is None:
                return 0
            self._file, self._left = begin()
        assert self._file is not None
        found = self._file.read(min(len(buffer), self._left))
        if not found:
            raise OSError("a part of an artifact is shorter than it should be")
        self._left -= len(found)
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        """Close what is open."""
        self._shut()
        super().close()

    def _shut(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def of_file(open_at: Callable[[int], BinaryIO], spans: Sequence[Span]) -> BinaryIO:
    """These spans of one file as a stream. ``open_at`` opens it at a byte."""

    def begun(span: Span) -> tuple[BinaryIO, int]:
        return open_at(span.start), span.stop - span.start

    return io.BufferedReader(Joined([functools.partial(begun, each) for each in spans]))


def checked(spans: Sequence[tuple[int, int]], size_bytes: int) -> list[Span]:
    """Spans that are in order, do not overlap and lie inside; none otherwise: they come from who read hostile bytes."""
    found = [Span(*each) for each in spans]
    edges = [0, *(edge for each in found for edge in each), size_bytes]
    return found if edges == sorted(edges) and all(each.start < each.stop for each in found) else []


def between(spans: Sequence[Span], size_bytes: int) -> list[Span]:
    """What the spans leave over.

    >>> between([Span(2, 4), Span(4, 6)], 10)
    [Span(start=0, stop=2), Span(start=6, stop=10)]
    """
    edges = [0, *(edge for each in spans for edge in each), size_bytes]
    return [Span(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]
