"""ONNX Runtime as the sandbox uses it: one thread, CPU, no custom libraries; and the instruction sets at hand."""

from __future__ import annotations

import platform
from pathlib import Path

import onnxruntime

from . import containers
from .refusal import Refusal

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"

# flag of /proc/cpuinfo -> word that an operator knows
_ISA = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_vnni": "vnni",
    "avx_vnni": "vnni",
    "amx_int8": "amx",
    "asimddp": "neon-dot",
    "i8mm": "i8mm",
}


def new_session(path: Path) -> onnxruntime.InferenceSession:
    """A single-threaded session. Raises Refusal when ONNX Runtime does not take the model."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        graph = containers.graph_of(path)
        if graph is None:
            return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        with containers.linked(path) as folder:
            options.add_session_config_entry(WEIGHTS_FOLDER, str(folder))
            return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - its exception classes share no base but this one
        raise Refusal(f"ONNX Runtime does not load it: {str(error)[:500]}") from None


def instruction_sets() -> str:
    """Where numbers were measured, for example ``x86_64 avx2 avx512 vnni``."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    flags = {
        flag for line in text.splitlines() if line.lower().startswith(("flags", "features")) for flag in line.split()
    }
    words = dict.fromkeys(word for flag, word in _ISA.items() if flag in flags)
    return " ".join([platform.machine(), *words])
