# mypy: disable-error-code="import-not-found,misc,unused-ignore"
"""LitServe's side: one worker, batching where it is asked for, base64 in JSON. Runs in .venv-peers/litserve only."""

import base64
import os
from typing import Any

import litserve as ls
import numpy as np
import onnxruntime as ort
from fastapi import Request

BATCH = int(os.environ["BATCH"])


class Onnx(ls.LitAPI):
    """One ONNX file; answers at once where there is none."""

    def setup(self, device: str) -> None:
        del device
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        path = os.environ.get("MODEL", "")
        self._session: Any = ort.InferenceSession(path, options) if path else None
        self._row = tuple(int(size) for size in os.environ["ROW"].split(","))

    def decode_request(self, request: Request) -> Any:
        return np.frombuffer(base64.b64decode(dict(request)["x"]), dtype=np.float32).reshape(1, *self._row)

    def batch(self, inputs: Any) -> Any:
        return np.concatenate(inputs)

    def unbatch(self, output: Any) -> Any:
        return np.split(output, len(output))

    def predict(self, x: Any) -> Any:
        return self._session.run(None, {"x": x})[0] if self._session else x

    def encode_response(self, output: Any) -> Any:
        return {"y": output.ravel().tolist()}


if __name__ == "__main__":
    api = Onnx(max_batch_size=BATCH, batch_timeout=0.002 if BATCH > 1 else 0.0)
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=5, track_requests=False)
    server.run(port=int(os.environ["PORT"]), generate_client_file=False, log_level="error")
