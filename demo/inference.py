"""A small Open Inference v2 client: one kept-alive connection, binary tensors, nothing but http.client and numpy.

An app on a small device would not load more than this; any other v2 client works as well.
"""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

HEADER_LENGTH = "Inference-Header-Content-Length"
DATATYPES: dict[str, np.dtype[Any]] = {
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "INT64": np.dtype("<i8"),
    "INT32": np.dtype("<i4"),
}


class Refused(Exception):
    """The device sheds load: 429 or 503, which it may when it cannot answer in time."""


class Failed(Exception):
    """No answer, or one that makes no sense."""


@dataclass(frozen=True)
class Answer:
    """Class indices of the request's images, and the decision under which they were computed."""

    classes: NDArray[np.int64]
    decision_id: str | None


class InferenceConnection:
    """One connection to one device; not for several threads at once."""

    def __init__(self, url: str, model: str, input_name: str = "image", timeout_s: float = 30.0) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=timeout_s)
        self._model, self._input_name = model, input_name

    def is_ready(self) -> bool:
        """Whether the device serves the model."""
        try:
            self._connection.request("GET", f"/v2/models/{self._model}/ready")
            response = self._connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            return False
        return response.status == 200

    def wait_until_ready(self, timeout_s: float, pause_s: float = 0.25) -> bool:
        deadline = time.monotonic() + timeout_s
        while not self.is_ready():
            if time.monotonic() > deadline:
                return False
            time.sleep(pause_s)
        return True

    def classify(self, images: NDArray[np.uint8]) -> Answer:
        """Ask for the classes of uint8 images [n, ...]."""
        body, header_bytes = encode(images, self._input_name)
        response, content = self._post(body, header_bytes)
        if response.status in {429, 503}:
            raise Refused(f"{response.status} {content[:200]!r}")
        if response.status != 200:
            raise Failed(f"{response.status} {content[:200]!r}")
        return Answer(
            decode(content, response.headers.get(HEADER_LENGTH), len(images)), response.headers.get("X-Decision-Id")
        )

    def close(self) -> None:
        self._connection.close()

    def _post(self, body: bytes, header_bytes: int) -> tuple[http.client.HTTPResponse, bytes]:
        was_open = self._connection.sock is not None
        headers = {HEADER_LENGTH: str(header_bytes), "Content-Type": "application/octet-stream"}
        try:
            return self._exchange(body, headers)
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError) as error:
            self._connection.close()
            if not was_open:
                raise Failed(repr(error)) from error
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise Failed(repr(error)) from error
        # A server may close an idle connection just as it is used again; every HTTP client then asks once more.
        try:
            return self._exchange(body, headers)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise Failed(repr(error)) from error

    def _exchange(self, body: bytes, headers: dict[str, str]) -> tuple[http.client.HTTPResponse, bytes]:
        self._connection.request("POST", f"/v2/models/{self._model}/infer", body, headers)
        response = self._connection.getresponse()
        return response, response.read()


def encode(images: NDArray[np.uint8], input_name: str) -> tuple[bytes, int]:
    """The request body, and how many of its bytes are the JSON header."""
    raw = images.tobytes()
    tensor = {
        "name": input_name,
        "shape": list(images.shape),
        "datatype": "UINT8",
        "parameters": {"binary_data_size": len(raw)},
    }
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return header + raw, len(header)


def decode(content: bytes, header_bytes: str | None, count: int) -> NDArray[np.int64]:
    """The class of the highest logit of each of `count` images, from a JSON or a binary answer."""
    end = int(header_bytes) if header_bytes else len(content)
    try:
        output = json.loads(content[:end])["outputs"][0]
        logits = values(output, content[end:]).reshape(output["shape"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise Failed(f"answer not understood: {error!r}") from error
    if len(logits) != count or not np.isfinite(logits).all():
        raise Failed(f"answer of shape {logits.shape} for {count} images, or not finite")
    return np.asarray(logits.argmax(axis=1), dtype=np.int64)


def values(output: dict[str, Any], binary: bytes) -> NDArray[np.float64]:
    """The numbers of one output, flat."""
    if "data" in output:
        return np.asarray(output["data"], dtype=np.float64)
    size: int = output["parameters"]["binary_data_size"]
    return np.frombuffer(binary[:size], DATATYPES[output["datatype"]]).astype(np.float64)
