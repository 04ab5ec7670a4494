"""Where the large weights of an ONNX file lie, so that files which share weights can share their storage.

Walks the wire format (https://protobuf.dev/programming-guides/encoding/) and copies nothing: model → graph →
initializers → raw data.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import onnx

from . import containers

GRAPH, INITIALIZER, FLOATS, RAW = 7, 5, 4, 9
MIN_BYTES, MOST = 65_536, 256
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5


class Span(NamedTuple):
    """Bytes of a file from ``start`` up to, not including, ``stop``."""

    start: int
    stop: int


def find(path: Path) -> list[tuple[int, int]]:
    """(start, stop) of the largest weights, in the order of the file; none where the file is not what it should be."""
    found = _in_container(path) or _in_protobuf(path)
    large = [each for each in found if each.stop - each.start >= MIN_BYTES]
    largest = sorted(large, key=lambda each: each.start - each.stop)
    return sorted((each.start, each.stop) for each in largest[:MOST])


def _in_container(path: Path) -> list[Span]:
    graph = containers.graph_of(path)
    if graph is None:
        return []
    model = onnx.load_from_string(graph)
    stretches = {stretch for _, stretch in containers.external(model)}
    return [Span(each.offset, each.offset + each.length) for each in stretches]


def _in_protobuf(path: Path) -> list[Span]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        try:
            return list(_weights(view))
        except (IndexError, ValueError):
            return []


def _weights(view: mmap.mmap) -> Iterator[Span]:
    whole = Span(0, len(view))
    for graph in _fields(view, whole, {GRAPH}):
        for tensor in _fields(view, graph, {INITIALIZER}):
            yield from _fields(view, tensor, {FLOATS, RAW})


def _fields(view: mmap.mmap, within: Span, wanted: set[int]) -> Iterator[Span]:
    """Contents of the fields with these numbers that hold bytes. Raises IndexError or ValueError on damage."""
    position = within.start
    while position < within.stop:
        tag, position = _varint(view, position)
        kind, start = tag & 7, position
        if kind == _VARINT:
            _, position = _varint(view, position)
        elif kind == _BYTES:
            size, start = _varint(view, position)
            position = start + size
        elif kind in {_EIGHT, _FOUR}:
            position += 8 if kind == _EIGHT else 4
        else:
            raise ValueError(f"wire type {kind}")
        if position > within.stop:
            raise ValueError("truncated")
        if kind == _BYTES and tag >> 3 in wanted:
            yield Span(start, position)


def _varint(view: mmap.mmap, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[position]
        value, position = value | (byte & 127) << shift, position + 1
        if byte < 128:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("endless number")
