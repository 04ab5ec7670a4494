"""Clients that send nonsense, too much, or nothing: a reason in JSON, and everybody else is served on."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from onnx import TensorProto

from benchmarks.fuzz import ask, fuzz, good, raw
from device_agents.connection import BoundedConnection
from device_agents.executor import Executor
from tests.device_agents.models import echo
from tests.device_agents.serving import listening, served


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    executor = Executor("m", queue_requests=64)
    executor.swap(served(echo(TensorProto.FLOAT, size=16), tmp_path))
    with listening({"m": executor}) as http:
        assert http.base_url.port is not None
        yield http.base_url.port
    executor.close()


def test_fuzzed_requests_are_told_what_is_wrong_and_harm_nothing(port: int) -> None:
    found = fuzz(port, count=300)
    assert found["400"] > 100


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (raw(json.dumps(good()).encode(), headers=f"X-Large: {'a' * 70_000}\r\n"), 431),
        (raw(json.dumps(good()).encode(), headers="X: y\r\n" * 20_000), 431),
        (b"NONSENSE\r\n\r\n", 400),
        (raw(b"", path="/v2/models/" + "m" * 5000 + "/infer"), 404),
    ],
    ids=["a large header", "many headers", "no HTTP", "a long path"],
)
def test_a_head_that_cannot_be_served_is_refused_with_a_reason(port: int, request_bytes: bytes, status: int) -> None:
    answer = ask(port, request_bytes)
    assert answer is not None
    assert answer[0] == status
    assert json.loads(answer[1])["error"]


@pytest.mark.parametrize("begun", [b"", b"POST /v2/mod", raw(b"{}", length=900)], ids=["nothing", "a head", "a body"])
def test_a_client_that_does_not_go_on_is_hung_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(BoundedConnection, "slowest_s", 0.2)
    executor = Executor("m", queue_requests=64)
    executor.swap(served(echo(TensorProto.FLOAT, size=16), tmp_path))
    with listening({"m": executor}) as http:
        assert http.base_url.port is not None
        with socket.create_connection(("127.0.0.1", http.base_url.port), timeout=10) as slow:
            slow.sendall(begun)
            received = slow.recv(4096)
            assert received.startswith(b"HTTP/1.1 408")
            assert "whole within" in json.loads(received.partition(b"\r\n\r\n")[2])["error"]
        answer = ask(http.base_url.port, raw(json.dumps(good()).encode()))
        assert answer is not None
        assert answer[0] == 200
    executor.close()


LIMIT_BYTES = 200_000


@pytest.mark.parametrize("is_chunked", [False, True], ids=["announced", "chunked"])
def test_slow_clients_share_a_bounded_room_and_small_requests_go_on(tmp_path: Path, is_chunked: bool) -> None:
    executor = Executor("m", queue_requests=64)
    executor.swap(served(echo(TensorProto.FLOAT, size=16), tmp_path))
    small = raw(json.dumps(good()).encode())
    large = raw(b" " * (LIMIT_BYTES - 1000) + json.dumps(good()).encode())
    with listening({"m": executor}, body_limit_bytes=LIMIT_BYTES) as http, contextlib.ExitStack() as slow:
        port = http.base_url.port
        assert port is not None
        for _ in range(4):
            client = slow.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            client.sendall(begun_chunked(LIMIT_BYTES) if is_chunked else raw(b"{", length=LIMIT_BYTES))
        refused = until(port, large, status=503)
        assert "together" in json.loads(refused[1])["error"]
        assert http.post("/v2/models/m/infer", content=large.partition(b"\r\n\r\n")[2]).headers["Retry-After"] == "1"
        answer = ask(port, small)
        assert answer is not None
        assert answer[0] == 200
        slow.close()
        until(port, large, status=200)
    executor.close()


def test_an_inflated_body_takes_the_room_of_its_inflated_size(tmp_path: Path) -> None:
    executor = Executor("m", queue_requests=64)
    executor.swap(served(echo(TensorProto.FLOAT, size=16), tmp_path))
    body = gzip.compress(b" " * (LIMIT_BYTES - 1000) + json.dumps(good()).encode())
    with listening({"m": executor}, body_limit_bytes=LIMIT_BYTES) as http, contextlib.ExitStack() as slow:
        port = http.base_url.port
        assert port is not None
        packed = raw(body, headers="Content-Encoding: gzip\r\n")
        until(port, packed, status=200)
        for _ in range(4):
            client = slow.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            client.sendall(raw(b"{", length=LIMIT_BYTES - 1000))
        until(port, packed, status=503)
    executor.close()


def begun_chunked(size: int) -> bytes:
    """A request that has sent ``size`` bytes in chunks, and says that there are more."""
    head = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join([b"2710\r\n" + b" " * 10_000 + b"\r\n"] * (size // 10_000))


def until(port: int, request: bytes, *, status: int) -> tuple[int, bytes]:
    """Asks until that is the answer: what other connections sent arrives when it does."""
    ends_s = time.monotonic() + 10
    while (answer := ask(port, request)) is None or answer[0] != status:
        assert time.monotonic() < ends_s, answer
    return answer


def test_a_client_that_rests_between_requests_is_kept(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for _ in range(3):
            connection.sendall(raw(json.dumps(good()).encode()))
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
