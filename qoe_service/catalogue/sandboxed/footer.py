"""The end of a container, by which it is known (``containers.py``); needs no ONNX, so the service may read it too."""

from __future__ import annotations

import struct

MAGIC, FOOTER = b"QOE-ONNX", struct.Struct("<Q8s")
WEIGHTS, GRAPH = "weights.bin", "graph.onnx"


def span_of_graph(last: bytes, size_bytes: int) -> tuple[int, int] | None:
    """(start, stop) of the graph in a file that ends with these bytes; None when it is no container.

    >>> span_of_graph(FOOTER.pack(100, MAGIC), 5000)
    (4884, 4984)
    """
    if len(last) != FOOTER.size:
        return None
    length, magic = FOOTER.unpack(last)
    stop = size_bytes - FOOTER.size
    return (stop - length, stop) if magic == MAGIC and length <= stop else None
