"""Clients that send nonsense, too much, or nothing: a reason in JSON, and everybody else is served on."""

from __future__ import annotations

import json
import socket
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


def test_a_client_that_rests_between_requests_is_kept(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for _ in range(3):
            connection.sendall(raw(json.dumps(good()).encode()))
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
