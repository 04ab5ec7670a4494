"""What others make of a model with their defaults, and what the product makes of it: files to be measured alike."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.compression_cases import Case
from qoe_service.catalogue import sandbox
from qoe_service.catalogue.passes import JOIN, PASSES, chain

OLIVE = Path(".venv-peers/olive/bin/python")
OURS, PEER, BASE = "ours", "peer", "base"
WORKERS = 2  # what is not timed may use both cores


@dataclass(frozen=True)
class Contestant:
    """One file; ``side`` says whose it is."""

    name: str
    side: str
    path: Path
    precision: str = ""

    @property
    def digest(self) -> str:
        """Tells whether ours is a peer's own output."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    """All calibration pictures, one at a time, as the documentation's examples do."""

    def __init__(self, name: str, pictures: Any) -> None:
        self._rows: Iterator[dict[str, Any]] = iter({name: pictures[i : i + 1]} for i in range(len(pictures)))

    def get_next(self) -> dict[str, Any] | None:
        """The next picture; None at the end."""
        return next(self._rows, None)


def runtime_defaults(case: Case, folder: Path) -> list[Contestant]:
    """ONNX Runtime as documented: pre-process, then quantize_static or quantize_dynamic with every default."""
    prepared = folder / "prepared.onnx"
    quant_pre_process(case.path, prepared, skip_symbolic_shape=True)
    static, dynamic = folder / "ort-static.onnx", folder / "ort-dynamic.onnx"
    quantize_static(prepared, static, Reader("image", case.data.calibration_inputs))
    quantize_dynamic(prepared, dynamic)
    return [Contestant("ort static", PEER, static), Contestant("ort dynamic", PEER, dynamic)]


def olive_defaults(case: Case, data: Path, folder: Path) -> list[Contestant]:
    """Olive's passes with every default; nothing where it is not installed or fails."""
    if not OLIVE.exists():
        return []
    script = str(Path(__file__).with_name("compression_olive.py"))
    command = [str(OLIVE), script, str(case.path), str(data), str(folder / "olive")]
    environment = {**os.environ, "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        print(f"  olive fails on {case.name}: {done.stderr.strip().splitlines()[-1][:150]}")
    made = [(name, folder / "olive" / f"{name}.onnx") for name in ("static", "dynamic")]
    return [Contestant(f"olive {name}", PEER, path) for name, path in made if path.exists()]


def ours(case: Case, data: Path, folder: Path, chains: Sequence[str]) -> tuple[list[Contestant], dict[str, str]]:
    """Every chain of passes, run in the product's sandbox; and why the others were refused."""
    made: dict[str, Path] = {"": case.path}
    refused: dict[str, str] = {}

    def derive(whole: str) -> None:
        before, _, name = whole.rpartition(JOIN)
        if before in refused:
            refused[whole] = refused[before]
            return
        try:
            _derive(made[before], data, folder / f"{whole}.onnx", name)
            made[whole] = folder / f"{whole}.onnx"
        except sandbox.Refused as reason:
            refused[whole] = str(reason)

    for length in range(1, 1 + max(text.count(JOIN) + 1 for text in chains)):
        due = dict.fromkeys(JOIN.join(text.split(JOIN)[:length]) for text in chains if text.count(JOIN) + 1 >= length)
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(derive, due))
    wanted = [(text, made[text]) for text in chains if text in made]
    return [Contestant(text, OURS, path, _precision(text)) for text, path in wanted], refused


def _derive(base: Path, data: Path, target: Path, name: str) -> None:
    chosen = PASSES[name]
    with sandbox.opened() as box:
        box.add("model.onnx", base.open("rb"))
        box.add("data.npz", data.open("rb"))
        box.ask({"command": "compress", "pass": chosen.method, "parameters": dict(chosen.parameters), "samples": 8})
        with box.open("derived.onnx") as derived:
            target.write_bytes(derived.read())


def _precision(text: str) -> str:
    return next((each.precision for each in reversed(chain(text)) if each.precision), "fp32")
