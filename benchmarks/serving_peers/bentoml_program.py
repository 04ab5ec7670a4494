# mypy: disable-error-code="import-not-found,misc,unused-ignore,untyped-decorator"
"""BentoML's side: its adaptive batcher under the SLO, base64 in JSON. Runs in .venv-peers/bentoml only."""

from __future__ import annotations

import base64
import os
from typing import Any

import bentoml
import numpy as np
import onnxruntime as ort

BATCH = int(os.environ["BATCH"])


@bentoml.service(workers=1, traffic={"timeout": 5})
class Onnx:
    """One ONNX file; answers at once where there is none."""

    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        path = os.environ.get("MODEL", "")
        self._session: Any = ort.InferenceSession(path, options) if path else None
        self._row = tuple(int(size) for size in os.environ["ROW"].split(","))

    @bentoml.api(batchable=BATCH > 1, max_batch_size=max(2, BATCH), max_latency_ms=int(os.environ["SLO_MS"]))
    def infer(self, items: list[str]) -> list[list[float]]:
        packed = b"".join(base64.b64decode(each) for each in items)
        x = np.frombuffer(packed, dtype=np.float32).reshape(-1, *self._row)
        y = self._session.run(None, {"x": x})[0] if self._session else x
        answers: list[list[float]] = y.reshape(len(items), -1).tolist()
        return answers
