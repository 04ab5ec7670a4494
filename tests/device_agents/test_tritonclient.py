"""An unmodified tritonclient works against the agent: binary, JSON, compressed, described, refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from device_agents.executor import Executor
from tests.device_agents.models import echo, scaling
from tests.device_agents.serving import listening, served

triton = pytest.importorskip("tritonclient.http")
errors = pytest.importorskip("tritonclient.utils")

X = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder: Path = tmp_path_factory.mktemp("models")
    models = {"digits": scaling(2), "half": echo(TensorProto.FLOAT16), "text": echo(TensorProto.STRING)}
    executors = {name: Executor(name, queue_requests=64) for name in models}
    for name, model in models.items():
        executors[name].swap(served(model, folder))
    with listening(executors) as http:
        client = triton.InferenceServerClient(f"{http.base_url.host}:{http.base_url.port}")
        yield client
        client.close()
    for executor in executors.values():
        executor.close()


def tensor(values: np.ndarray[Any, Any], datatype: str, *, is_binary: bool = True) -> Any:
    made = triton.InferInput("x", list(values.shape), datatype)
    made.set_data_from_numpy(values, binary_data=is_binary)
    return made


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("is_binary", [True, False], ids=["binary", "json"])
def test_it_infers(client: Any, is_binary: bool, compression: str | None) -> None:
    answer = client.infer(
        "digits",
        [tensor(X, "FP32", is_binary=is_binary)],
        outputs=[triton.InferRequestedOutput("y", binary_data=is_binary)],
        request_id="7",
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    np.testing.assert_array_equal(answer.as_numpy("y"), 2 * X)
    assert answer.get_response()["id"] == "7"


def test_it_infers_without_naming_outputs_and_in_the_background(client: Any) -> None:
    np.testing.assert_array_equal(client.infer("digits", [tensor(X, "FP32")]).as_numpy("y"), 2 * X)
    waiting = client.async_infer("digits", [tensor(X, "FP32")], model_version="1")
    np.testing.assert_array_equal(waiting.get_result().as_numpy("y"), 2 * X)


def test_half_precision_and_strings_go_through(client: Any) -> None:
    half = np.array([[0.5, 1.5, -2]], dtype=np.float16)
    np.testing.assert_array_equal(client.infer("half", [tensor(half, "FP16")]).as_numpy("y"), half)
    text = np.array([[b"a", "ö".encode(), b""]], dtype=object)
    np.testing.assert_array_equal(client.infer("text", [tensor(text, "BYTES")]).as_numpy("y"), text)


def test_it_sees_what_is_served(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert client.get_model_metadata("digits")["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert client.get_model_config("digits")["max_batch_size"] == 4
    assert {entry["name"] for entry in client.get_model_repository_index()} == {"digits", "half", "text"}
    before = client.get_inference_statistics("digits")["model_stats"][0]["inference_count"]
    client.infer("digits", [tensor(X, "FP32")])
    assert client.get_inference_statistics("digits")["model_stats"][0]["inference_count"] > before


def test_it_is_told_why_something_is_refused(client: Any) -> None:
    wrong: dict[str, Callable[[], Any]] = {
        "must be FP32": lambda: client.infer("digits", [tensor(X.astype(np.float64), "FP64")]),
        "has shape": lambda: client.infer("digits", [tensor(X[:, :3], "FP32")]),
        "unknown model": lambda: client.infer("letters", [tensor(X, "FP32")]),
        "belongs to no service": lambda: client.load_model("digits"),
        "parameter classification is not served": lambda: client.infer(
            "digits", [tensor(X, "FP32")], outputs=[triton.InferRequestedOutput("y", class_count=2)]
        ),
    }
    for says, ask in wrong.items():
        with pytest.raises(errors.InferenceServerException, match=says):
            ask()


def test_its_time_limit_in_microseconds_is_understood(client: Any) -> None:
    answer = client.infer("digits", [tensor(X, "FP32")], timeout=5_000_000)
    np.testing.assert_array_equal(answer.as_numpy("y"), 2 * X)
