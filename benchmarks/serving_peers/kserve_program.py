# mypy: disable-error-code="import-not-found,misc,unused-ignore"
"""KServe's side: its Python model server, binary tensors, no batcher of its own. Runs in .venv-peers/kserve only."""

from __future__ import annotations

import os
from typing import Any

import onnxruntime as ort
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer


class Onnx(Model):
    """One ONNX file; answers at once where there is none."""

    def __init__(self) -> None:
        super().__init__("m")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        path = os.environ.get("MODEL", "")
        self._session: Any = ort.InferenceSession(path, options) if path else None
        self.ready = True

    async def predict(self, payload: InferRequest, *_: Any, **__: Any) -> InferResponse:
        x = payload.inputs[0].as_numpy()
        y = self._session.run(None, {"x": x})[0] if self._session else x
        output = InferOutput(name="y", shape=list(y.shape), datatype="FP32")
        output.set_data_from_numpy(y, binary_data=True)
        return InferResponse(response_id=payload.id or "1", model_name=self.name, infer_outputs=[output])


if __name__ == "__main__":
    ModelServer(http_port=int(os.environ["PORT"]), workers=1, enable_grpc=False, access_log_format=None).start([Onnx()])
