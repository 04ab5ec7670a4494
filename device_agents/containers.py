"""Opens a variant as an ONNX Runtime session. Models of 2 GiB and more come as weights and graph in one file.

Protobuf cannot hold such a model. Its file is the weights; the ONNX graph, whose external data lies in ``weights.bin``,
which is the file itself; the graph's length in 8 bytes, little endian; and ``QOE-ONNX``.
"""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path

import onnxruntime as ort

FOOTER, MAGIC, WEIGHTS = struct.Struct("<Q8s"), b"QOE-ONNX", "weights.bin"
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def open_session(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    """A session on the CPU. Raises what ONNX Runtime raises, and OSError."""
    graph = graph_of(path)
    if graph is None:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # A link costs no copy, and may go once the weights are mapped into memory.
    with tempfile.TemporaryDirectory(dir=path.absolute().parent) as folder:
        os.link(path, Path(folder) / WEIGHTS)
        options.add_session_config_entry(WEIGHTS_FOLDER, folder)
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def graph_of(path: Path) -> bytes | None:
    """The graph of such a file; None when it is a plain ONNX file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(size - FOOTER.size, 0))
        last = file.read()
        if len(last) < FOOTER.size:
            return None
        length, magic = FOOTER.unpack(last)
        if magic != MAGIC or length > size - FOOTER.size:
            return None
        file.seek(size - FOOTER.size - length)
        return file.read(length)
