"""Models of 2 GiB and more as one file: protobuf cannot hold them, so their weights lie before their graph.

A container is the weights, each at a multiple of 4096 bytes; the ONNX graph, whose external data lies in a file called
``weights.bin`` (which is the container itself); the graph's length, 8 bytes, little endian; and 8 bytes that say so. So
it has one digest, comes in ranges like any other artifact, and ONNX Runtime maps its weights into memory as they are.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import onnx

from .footer import FOOTER, GRAPH, MAGIC, WEIGHTS, span_of_graph
from .refusal import Refusal

ALIGNMENT = 4096
CHUNK_BYTES = 262_144


class Stretch(NamedTuple):
    """Bytes of a file that lies beside a graph."""

    location: str
    offset: int
    length: int


def graph_of(path: Path) -> bytes | None:
    """The graph of a container; None when the file is none."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(size - FOOTER.size, 0))
        span = span_of_graph(file.read(), size)
        if span is None:
            return None
        file.seek(span[0])
        return file.read(span[1] - span[0])


def external(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, Stretch]]:
    """Tensors whose bytes lie in another file, and where. Raises Refusal."""
    for tensor in onnx.external_data_helper._get_all_tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            yield tensor, _stretch(tensor.name, entries)


def write(model: onnx.ModelProto, folder: Path, target: Path) -> None:
    """A container of a graph and the weights that it names in ``folder``, each copied once. Raises Refusal."""
    places: dict[Stretch, int] = {}
    with target.open("wb") as out:
        for tensor, stretch in external(model):
            if stretch not in places:
                out.write(bytes(-out.tell() % ALIGNMENT))
                places[stretch] = out.tell()
                _copy(folder / stretch.location, stretch, out)
            length = out.tell() - places[stretch] if stretch.length < 0 else stretch.length
            _point(tensor, places[stretch], length)
        graph = model.SerializeToString(deterministic=True)
        out.write(graph)
        out.write(FOOTER.pack(len(graph), MAGIC))


def check(path: Path, model: onnx.ModelProto, graph_bytes: int) -> None:
    """Raises Refusal unless every weight lies in the container itself, before its graph."""
    end = path.stat().st_size - FOOTER.size - graph_bytes
    for tensor, stretch in external(model):
        if stretch.location != WEIGHTS or stretch.length < 0 or stretch.offset + stretch.length > end:
            raise Refusal(f"tensor {tensor.name[:80]!r} does not lie in its container")


@contextlib.contextmanager
def linked(path: Path) -> Iterator[Path]:
    """A folder in which the container is the file that its graph asks for."""
    with tempfile.TemporaryDirectory(dir=path.absolute().parent) as name:
        os.link(path, Path(name) / WEIGHTS)
        yield Path(name)


@contextlib.contextmanager
def laid_out(path: Path, graph: bytes) -> Iterator[Path]:
    """Graph and weights as two files, for programs that take no links: the container is moved there for the while."""
    with tempfile.TemporaryDirectory(dir=path.absolute().parent) as name:
        folder = Path(name)
        (folder / GRAPH).write_bytes(graph)
        path.rename(folder / WEIGHTS)
        try:
            yield folder / GRAPH
        finally:
            (folder / WEIGHTS).rename(path)


def _stretch(name: str, entries: Mapping[str, str]) -> Stretch:
    try:
        found = Stretch(entries["location"], int(entries.get("offset", "0")), int(entries.get("length", "-1")))
    except (KeyError, ValueError):
        found = Stretch("", -1, -1)
    if not found.location or found.offset < 0:
        raise Refusal(f"where the external data of tensor {name[:80]!r} lies is not said")
    return found


def _copy(path: Path, stretch: Stretch, out: BinaryIO) -> None:
    size = path.stat().st_size
    end = size if stretch.length < 0 else stretch.offset + stretch.length
    if end > size:
        raise Refusal(f"{stretch.location[:200]!r} ends before the weights that should lie in it")
    with path.open("rb") as source:
        source.seek(stretch.offset)
        left = end - stretch.offset
        while left > 0 and (chunk := source.read(min(CHUNK_BYTES, left))):
            out.write(chunk)
            left -= len(chunk)


def _point(tensor: onnx.TensorProto, offset: int, length: int) -> None:
    del tensor.external_data[:]
    for key, value in (("location", WEIGHTS), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
