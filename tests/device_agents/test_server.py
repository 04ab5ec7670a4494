"""The local inference server over real sockets: Open Inference v2, errors, limits, swaps under load."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from onnx import TensorProto

from device_agents.budget import ThreadBudget
from device_agents.errors import BadConfiguration
from device_agents.executor import Executor
from device_agents.listening import bind
from device_agents.spool import Kept
from device_agents.wire import Feedback
from tests.device_agents.models import dense, echo, not_finite, picky, scaling
from tests.device_agents.serving import client_of, listening, served

INFER = "/v2/models/digits/infer"
ROWS: dict[str, Any] = {
    "inputs": [{"name": "x", "shape": [2, 4], "datatype": "FP32", "data": [1, 2, 3, 4, 5, 6, 7, 8]}]
}


@pytest.fixture
def executor(tmp_path: Path) -> Iterator[Executor]:
    """Doubles its input under decision d1."""
    executor = Executor("digits", queue_requests=64)
    executor.swap(served(scaling(2), tmp_path))
    yield executor
    executor.close()


@pytest.fixture
def feedback() -> list[Feedback]:
    return []


@pytest.fixture
def http(executor: Executor, feedback: list[Feedback]) -> Iterator[httpx.Client]:
    def accept(item: Feedback) -> Kept:
        feedback.append(item)
        return Kept.KEPT

    with listening({"digits": executor}, accept_feedback=accept) as client:
        yield client


def input_with(**changes: Any) -> dict[str, Any]:
    return {"inputs": [ROWS["inputs"][0] | changes]}


def binary(array: np.ndarray[Any, Any], **request: Any) -> tuple[bytes, dict[str, str]]:
    head = json.dumps(
        request
        | {
            "inputs": [
                {
                    "name": "x",
                    "shape": list(array.shape),
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": array.nbytes},
                }
            ]
        }
    ).encode()
    return head + array.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


# -- answers --------------------------------------------------------------------------------------------------------


def test_json_in_json_out_with_the_decision_to_rate(http: httpx.Client) -> None:
    reply = http.post(INFER, json=ROWS | {"id": "seven"})
    assert reply.status_code == 200
    assert reply.json() == {
        "model_name": "digits",
        "model_version": "1",
        "id": "seven",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [2, 4], "data": [2, 4, 6, 8, 10, 12, 14, 16]}],
    }
    assert reply.headers["X-Decision-Id"] == "d1"
    assert reply.headers["X-Model-Digest"] == scaling(2).digest


def test_binary_in_binary_out(http: httpx.Client) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    body, headers = binary(array, parameters={"binary_data_output": True})
    reply = http.post(INFER, content=body, headers=headers)
    size = int(reply.headers["Inference-Header-Content-Length"])
    described = json.loads(reply.content[:size])["outputs"][0]
    assert described == {"name": "y", "datatype": "FP32", "shape": [3, 4], "parameters": {"binary_data_size": 48}}
    np.testing.assert_array_equal(np.frombuffer(reply.content[size:], np.float32).reshape(3, 4), array * 2)


def test_the_form_of_each_output_can_be_chosen(http: httpx.Client) -> None:
    outputs = [{"name": "y", "parameters": {"binary_data": False}}]
    body, headers = binary(np.ones((1, 4), np.float32), parameters={"binary_data_output": True}, outputs=outputs)
    assert http.post(INFER, content=body, headers=headers).json()["outputs"][0]["data"] == [2, 2, 2, 2]


def test_a_whole_body_can_be_the_single_input(http: httpx.Client) -> None:
    content = np.ones(4, np.float32).tobytes()
    reply = http.post(INFER, content=content, headers={"Inference-Header-Content-Length": "0"})
    size = int(reply.headers["Inference-Header-Content-Length"])
    assert np.frombuffer(reply.content[size:], np.float32).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("size", "content", "status", "says"),
    [
        (1, "drei Äpfel".encode(), 200, "drei Äpfel"),
        ("m", b"any size", 200, "any size"),
        (1, b"", 200, ""),
        (1, b"\xff", 400, "UTF-8"),
        (3, b"three?", 400, "one string"),
    ],
    ids=["text", "an open size", "no text", "no UTF-8", "a model of three strings"],
)
def test_a_whole_body_can_be_the_single_string(
    tmp_path: Path, size: int | str, content: bytes, status: int, says: str
) -> None:
    executor = Executor("digits", queue_requests=4)
    executor.swap(served(echo(TensorProto.STRING, size=size, rows="n"), tmp_path))
    with listening({"digits": executor}) as http:
        reply = http.post(INFER, content=content, headers={"Inference-Header-Content-Length": "0"})
    executor.close()
    assert reply.status_code == status
    if status == 200:
        head_bytes = int(reply.headers["Inference-Header-Content-Length"])
        assert json.loads(reply.content[:head_bytes])["outputs"][0]["shape"] == [1, 1]
        assert reply.content[head_bytes + 4 :].decode() == says
    else:
        assert says in reply.json()["error"]


def test_a_compressed_request_is_inflated_and_a_large_answer_compressed_on_request(http: httpx.Client) -> None:
    array = np.zeros((600, 4), np.float32)
    body, headers = binary(array, parameters={"binary_data_output": True})
    reply = http.post(INFER, content=gzip.compress(body), headers=headers | {"Content-Encoding": "gzip"})
    assert reply.headers["Content-Encoding"] == "gzip"
    assert len(reply.content) > array.nbytes  # httpx has inflated it


def test_the_version_may_be_named(http: httpx.Client) -> None:
    assert http.post("/v2/models/digits/versions/1/infer", json=ROWS).status_code == 200
    assert http.post("/v2/models/digits/versions/2/infer", json=ROWS).status_code == 404


def test_what_a_client_asks_before_it_infers(http: httpx.Client) -> None:
    assert http.get("/v2/health/live").json() == {"live": True}
    assert http.get("/v2/health/ready").status_code == 200
    assert http.get("/v2/models/digits/ready").json() == {"name": "digits", "ready": True}
    assert "binary_tensor_data" in http.get("/v2").json()["extensions"]
    assert http.get("/v2/models/digits").json()["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    configuration = http.get("/v2/models/digits/versions/1/config").json()
    assert configuration["max_batch_size"] == 4
    assert configuration["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [4]}]
    assert http.post("/v2/repository/index").json() == [
        {"name": "digits", "version": "1", "state": "READY", "reason": ""}
    ]


def test_statistics_and_metrics_count_requests_runs_and_rows(http: httpx.Client) -> None:
    http.post(INFER, json=ROWS)
    http.post(INFER, json=ROWS)
    (statistics,) = http.get("/v2/models/digits/stats").json()["model_stats"]
    assert (statistics["inference_count"], statistics["execution_count"]) == (4, 2)
    assert statistics["inference_stats"]["success"]["count"] == 2
    assert statistics["batch_stats"][0]["batch_size"] == 2
    text = http.get("/metrics").text
    for codec in ("compute_input", "compute_output"):
        took = statistics["inference_stats"][codec]
        assert took["count"] == 2
        assert took["ns"] > 0
        assert f'nv_inference_{codec}_duration_us{{model="digits",version="1"}} {took["ns"] / 1000:.10g}\n' in text
    assert 'nv_inference_request_success{model="digits",version="1"} 2\n' in text
    host = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line.startswith("nv_cpu_")}
    assert 0 <= host["nv_cpu_utilization"] <= 1
    assert 0 < host["nv_cpu_memory_used_bytes"] < host["nv_cpu_memory_total_bytes"]
    assert 'nv_inference_count{model="digits",version="1"} 4\n' in text
    assert "# TYPE nv_inference_pending_request_count gauge" in text


def test_a_device_without_a_model_says_that_it_is_not_ready() -> None:
    with listening({"digits": Executor("digits", queue_requests=1)}) as http:
        assert http.get("/v2/health/live").status_code == 200
        assert http.get("/v2/health/ready").status_code == 503
        assert http.get("/v2/models/digits/ready").status_code == 503
        reply = http.post(INFER, json=ROWS)
        assert (reply.status_code, reply.headers["Retry-After"]) == (503, "1")
        assert "not ready" in reply.json()["error"]
        assert "X-Decision-Id" not in reply.headers


@pytest.mark.parametrize(
    ("element_type", "datatype", "data"),
    [
        (TensorProto.BOOL, "BOOL", [True, False, True]),
        (TensorProto.UINT8, "UINT8", [0, 1, 255]),
        (TensorProto.UINT64, "UINT64", [0, 1, 2**64 - 1]),
        (TensorProto.INT8, "INT8", [-128, 0, 127]),
        (TensorProto.INT32, "INT32", [-(2**31), 0, 7]),
        (TensorProto.INT64, "INT64", [-(2**63), 0, 2**63 - 1]),
        (TensorProto.DOUBLE, "FP64", [0.1, -2.5, 1e300]),
        (TensorProto.STRING, "BYTES", ["", "ä", "three"]),
    ],
)
def test_every_datatype_goes_through_json_and_binary(
    tmp_path: Path, element_type: int, datatype: str, data: list[Any]
) -> None:
    executor = Executor("digits", queue_requests=4)
    executor.swap(served(echo(element_type), tmp_path))
    request = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": datatype, "data": data}]}
    with listening({"digits": executor}) as http:
        assert http.post(INFER, json=request).json()["outputs"][0]["data"] == data
        reply = http.post(INFER, json=request | {"parameters": {"binary_data_output": True}})
        tensor = reply.content[int(reply.headers["Inference-Header-Content-Length"]) :]
        item = {"name": "x", "shape": [1, 3], "datatype": datatype, "parameters": {"binary_data_size": len(tensor)}}
        head = json.dumps({"inputs": [item]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))}
        assert http.post(INFER, content=head + tensor, headers=headers).json()["outputs"][0]["data"] == data
    executor.close()


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "JSON object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"inputs": 1}', "list"),
        (b'{"inputs": [1]}', "JSON object"),
        (b'{"inputs": []}', "input x is missing"),
        (input_with(name="z"), "input x is missing"),
        (input_with(datatype="FP16"), "binary"),
        (input_with(datatype="FP64"), "must be FP32"),
        (input_with(datatype="FP99"), "not served"),
        (input_with(shape=[2, 5]), "elements"),
        (input_with(shape=[8, 1]), "the model takes [-1, 4]"),
        (input_with(shape=[0, 4], data=[]), "the model takes"),
        (input_with(shape=[-2, -4]), "shape"),
        (input_with(shape="2,4"), "shape"),
        (input_with(data=None), "no data"),
        (input_with(data=[[1, 2], [3]]), "ragged"),
        (input_with(data=["1"] * 8), "not FP32"),
        (input_with(data=[1e300] * 8), "does not fit FP32"),
        (b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [NaN]}]}', "NaN"),
        (input_with(parameters={"binary_data_size": 32}), "0 are left"),
        (input_with(parameters={"binary_data_size": -1}), "whole number"),
        (input_with(parameters={"shared_memory_region": "a"}), "shared memory"),
        (ROWS | {"outputs": [{"name": "z"}]}, "no output z"),
        (
            ROWS | {"outputs": [{"name": "y", "parameters": {"classification": 3}}]},
            "output y: the parameter classification is not served, only binary_data is",
        ),
        (
            ROWS | {"outputs": [{"name": "y", "parameters": {"shared_memory_region": "a"}}]},
            "output y: the parameter shared_memory_region is not served, only binary_data is",
        ),
        ({"inputs": ROWS["inputs"] * 2}, "twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_request_is_told_what_is_wrong_and_harms_nothing(http: httpx.Client, body: Any, says: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = http.post(INFER, content=content)
    assert reply.status_code == 400
    assert says in reply.json()["error"]
    assert (reply.headers["X-Decision-Id"], reply.headers["X-Model-Digest"]) == ("d1", scaling(2).digest)
    assert http.post(INFER, json=ROWS).status_code == 200


@pytest.mark.parametrize("length", ["x", "-1", "99999999"])
def test_a_wrong_length_of_the_json_is_refused(http: httpx.Client, length: str) -> None:
    reply = http.post(INFER, json=ROWS, headers={"Inference-Header-Content-Length": length})
    assert reply.status_code == 400
    assert "Inference-Header-Content-Length" in reply.json()["error"]


def test_bytes_behind_the_last_input_are_refused(http: httpx.Client) -> None:
    body, headers = binary(np.ones((1, 4), np.float32))
    assert "behind" in http.post(INFER, content=body + b"x", headers=headers).json()["error"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/v2/models"),
        ("GET", "/v2/models/nobody"),
        ("GET", "/v2/models/digits/nothing"),
        ("GET", "/v2/models/digits/infer"),
        ("POST", "/v2/models/nobody/infer"),
        ("POST", "/v2/repository/nothing"),
        ("DELETE", "/v2/models/digits"),
    ],
)
def test_an_unknown_address_is_a_json_404(http: httpx.Client, method: str, path: str) -> None:
    reply = http.request(method, path)
    assert reply.status_code == 404
    assert reply.json()["error"]


def test_loading_is_the_services_business(http: httpx.Client) -> None:
    for verb in ("load", "unload"):
        reply = http.post(f"/v2/repository/models/digits/{verb}", content=b"{}")
        assert reply.status_code == 400
        assert "the service decides" in reply.json()["error"]


def test_without_a_service_loading_is_nobodys_business(executor: Executor) -> None:
    with listening({"digits": executor}) as http:
        for verb in ("load", "unload"):
            reply = http.post(f"/v2/repository/models/digits/{verb}", content=b"{}")
            assert reply.status_code == 400
            assert "belongs to no service" in reply.json()["error"]


def chunked(size: int) -> Iterator[bytes]:
    for _ in range(0, size, 10_000):
        yield b"x" * 10_000


@pytest.mark.parametrize("content", [b"x" * 1_000_001, chunked(1_100_000)], ids=["announced", "chunked"])
def test_a_body_above_the_limit_is_refused(http: httpx.Client, content: Any) -> None:
    reply = http.post(INFER, content=content)
    assert reply.status_code == 413
    assert "1000000" in reply.json()["error"]


def test_a_small_body_that_inflates_above_the_limit_is_refused(http: httpx.Client) -> None:
    bomb = gzip.compress(b"0" * 5_000_000)
    assert http.post(INFER, content=bomb, headers={"Content-Encoding": "gzip"}).status_code == 413


@pytest.mark.parametrize(
    ("content", "encoding"),
    [(b"no gzip", "gzip"), (gzip.compress(b"{}")[:-4], "gzip"), (b"", "br")],
    ids=["damaged", "cut", "unknown"],
)
def test_a_damaged_or_unknown_encoding_is_refused(http: httpx.Client, content: bytes, encoding: str) -> None:
    reply = http.post(INFER, content=content, headers={"Content-Encoding": encoding})
    assert reply.status_code == 400
    assert reply.json()["error"]


def test_a_run_that_fails_is_a_json_500_and_the_next_succeeds(tmp_path: Path) -> None:
    executor = Executor("digits", queue_requests=4)
    executor.swap(served(picky(), tmp_path))
    request = {"inputs": [{"name": "index", "shape": [1], "datatype": "INT64", "data": [7]}]}
    with listening({"digits": executor}) as http:
        reply = http.post(INFER, json=request)
        assert reply.status_code == 500
        assert "indices" in reply.json()["error"]
        assert (reply.headers["X-Decision-Id"], reply.headers["X-Model-Digest"]) == ("d1", picky().digest)
        request["inputs"][0]["data"] = [1]
        assert http.post(INFER, json=request).json()["outputs"][0]["data"] == [2, 2, 2, 2]
    executor.close()


def test_infinity_is_no_json_and_says_so(tmp_path: Path) -> None:
    executor = Executor("digits", queue_requests=4)
    executor.swap(served(not_finite(), tmp_path))
    with listening({"digits": executor}) as http:
        reply = http.post(INFER, json=ROWS)
        assert reply.status_code == 500
        assert "binary" in reply.json()["error"]
        assert reply.headers["X-Decision-Id"] == "d1"
    executor.close()


def test_a_full_queue_sheds_with_retry_after_and_the_decision_to_rate(tmp_path: Path) -> None:
    executor = Executor("digits", queue_requests=2)
    executor.swap(served(dense(), tmp_path, max_batch=1))
    replies: list[httpx.Response] = []
    body = {"inputs": [{"name": "x", "shape": [256, 4], "datatype": "FP32", "data": [0.5] * 1024}]}
    with listening({"digits": executor}) as http:
        threads = [threading.Thread(target=lambda: replies.append(http.post(INFER, json=body))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    shed = [reply for reply in replies if reply.status_code == 503]
    assert shed
    assert all(int(reply.headers["Retry-After"]) >= 1 and "waiting" in reply.json()["error"] for reply in shed)
    assert {reply.status_code for reply in replies} == {200, 503}
    assert {(reply.headers["X-Decision-Id"], reply.headers["X-Model-Digest"]) for reply in shed} == {
        ("d1", dense().digest)
    }
    executor.close()


def test_an_error_around_a_swap_names_no_decision_rather_than_a_wrong_one(tmp_path: Path) -> None:
    budget = ThreadBudget(1)
    executor = Executor("digits", queue_requests=4, budget=budget)
    executor.swap(served(picky(), tmp_path))
    replies: list[httpx.Response] = []
    wrong = {"inputs": [{"name": "index", "shape": [1], "datatype": "INT64", "data": [7]}]}
    with listening({"digits": executor}) as http:
        assert budget.try_take(1)  # so the request waits
        asking = threading.Thread(target=lambda: replies.append(http.post(INFER, json=wrong)))
        asking.start()
        while not executor.unanswered:
            time.sleep(0.002)
        executor.swap(served(picky(), tmp_path, decision_id="d2"))
        budget.give_back(1)
        asking.join()
    executor.close()
    assert replies[0].status_code == 500
    assert not {"x-decision-id", "x-model-digest"} & set(replies[0].headers)


# -- feedback -------------------------------------------------------------------------------------------------------


def test_an_app_rates_locally(http: httpx.Client, feedback: list[Feedback]) -> None:
    reply = http.post("/feedback", json={"decision_id": "d1", "rating": 0, "lease_closed": True})
    assert reply.status_code == 202
    (kept,) = feedback
    assert (kept.decision_id, kept.rating, kept.lease_closed) == ("d1", 0, False)
    assert reply.json()["id"] == kept.id


@pytest.mark.parametrize(
    "body", [{}, {"decision_id": "d1"}, {"decision_id": "d1", "rating": 1.5}, {"decision_id": "no spaces", "rating": 1}]
)
def test_feedback_that_says_nothing_right_is_refused(http: httpx.Client, feedback: list[Feedback], body: Any) -> None:
    reply = http.post("/feedback", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]
    assert feedback == []


# -- swaps and life -------------------------------------------------------------------------------------------------


def test_no_request_fails_while_models_are_swapped_under_load(
    http: httpx.Client, executor: Executor, tmp_path: Path
) -> None:
    factors = {"d1": 2} | {f"swap{factor}": factor for factor in range(3, 12)}
    wrong: list[object] = []
    answered: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        with client_of(http.base_url) as own:
            while not stop.is_set():
                reply = own.post(INFER, json=ROWS)
                factor = factors.get(reply.headers.get("X-Decision-Id", ""))
                if reply.status_code != 200 or reply.json()["outputs"][0]["data"][0] != factor:
                    wrong.append(reply.text)
                answered.append(reply.text)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for decision, factor in list(factors.items())[1:]:
        old = executor.swap(served(scaling(factor), tmp_path, decision_id=decision))
        assert old is not None
        assert executor.wait_until_idle(old, timeout_s=5)
        count = len(answered)
        while len(answered) < count + 4 and not wrong:
            time.sleep(0.002)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(BadConfiguration, match="choose another --host or --port"):
            bind("127.0.0.1", taken.getsockname()[1])


def test_an_app_cannot_take_the_id_of_a_lease(http: httpx.Client, feedback: list[Feedback]) -> None:
    reply = http.post("/feedback", json={"id": "lease-1", "decision_id": "d1", "rating": 1})
    assert reply.status_code == 400
    assert "lease-" in reply.json()["error"]
    assert feedback == []


@pytest.mark.parametrize(("kept", "status"), [(Kept.KEPT, 202), (Kept.DUPLICATE, 202), (Kept.LOST, 503)])
def test_an_app_learns_what_became_of_its_rating(executor: Executor, kept: Kept, status: int) -> None:
    with listening({"digits": executor}, accept_feedback=lambda _: kept) as client:
        reply = client.post("/feedback", json={"decision_id": "d1", "rating": 1})
    assert reply.status_code == status
    assert ("Retry-After" in reply.headers) == (kept is Kept.LOST)
