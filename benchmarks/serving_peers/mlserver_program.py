# mypy: disable-error-code="import-not-found,misc,unused-ignore"
"""MLServer's side: a custom runtime in the server's own process, fed with base64: its HTTP has no binary tensors.

Runs in .venv-peers/mlserver only.
"""

from __future__ import annotations

import base64
import os
from typing import Any

import numpy as np
import onnxruntime as ort
from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput


class Onnx(MLModel):
    """One ONNX file; answers at once where there is none."""

    async def load(self) -> bool:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        path = os.environ.get("MODEL", "")
        self._session: Any = ort.InferenceSession(path, options) if path else None
        self._row = tuple(int(size) for size in os.environ["ROW"].split(","))
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        data = payload.inputs[0].data.root
        packed = b"".join(base64.b64decode(each) for each in data)
        x = np.frombuffer(packed, dtype=np.float32).reshape(-1, *self._row)
        y = self._session.run(None, {"x": x})[0] if self._session else x
        output = ResponseOutput(name="y", datatype="FP32", shape=list(y.shape), data=y.ravel().tolist())
        return InferenceResponse(model_name=self.name, outputs=[output])
