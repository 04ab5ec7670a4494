"""Does any request harm the agent's server? Sends broken requests and checks each answer and the server after it.

    python -m benchmarks.fuzz [--requests 10000]

Every answer with an error status must be JSON that says why, no connection may be left without an answer or an end, and
after every hundred requests a right one must be answered rightly. Ends with exit status 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.serving_http import Contestant, running
from benchmarks.serving_models import ECHO

WIDTH = 16
NASTY: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 2**70, 1e308, "", "x", "FP32", "BF16", "BYTES", [], {}, [[]], [None], ["1"],
    [-1, 16], [2**40, 2**40], [[[[[[1]]]]]], {"binary_data_size": -5}, {"shared_memory_region": "a"}, "é" * 99,
)  # fmt: skip


def good() -> dict[str, Any]:
    """A request that is served."""
    data = [float(number) for number in range(WIDTH)]
    return {"inputs": [{"name": "x", "shape": [1, WIDTH], "datatype": "FP32", "data": data}]}


def raw(body: bytes, *, path: str = "/v2/models/m/infer", headers: str = "", length: int | None = None) -> bytes:
    """A request as it goes over the wire."""
    size = len(body) if length is None else length
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {size}\r\n\r\n".encode() + body


def _structure(rng: random.Random) -> bytes:
    """JSON in which one part is something else."""
    request = good()
    for _ in range(rng.randint(1, 3)):
        place: Any = rng.choice([request, request["inputs"][0] if _has_input(request) else request])
        key = rng.choice([*place, "parameters", "outputs", "id"])
        place[key] = rng.choice(NASTY)
    return raw(json.dumps(request).encode())


def _has_input(request: dict[str, Any]) -> bool:
    inputs = request.get("inputs")
    return isinstance(inputs, list) and bool(inputs) and isinstance(inputs[0], dict)


def _bytes(rng: random.Random) -> bytes:
    """A right body in which some bytes are others, or missing."""
    body = bytearray(json.dumps(good()).encode())
    for _ in range(rng.randint(1, 8)):
        body[rng.randrange(len(body))] = rng.randrange(256)
    return raw(bytes(body[: rng.randint(0, len(body))]))


def _binary(rng: random.Random) -> bytes:
    """Binary tensors whose sizes do not agree."""
    parameters = {"binary_data_size": rng.choice([0, 63, 64, 65, 2**40])}
    tensor = {"name": "x", "shape": [1, WIDTH], "datatype": "FP32", "parameters": parameters}
    packed = json.dumps({"inputs": [tensor]}).encode()
    size = rng.choice([str(len(packed)), "0", "-1", "9" * 30, "x", str(len(packed) + 7), ""])
    return raw(
        packed + rng.randbytes(rng.choice([0, 64, 65, 1000])), headers=f"Inference-Header-Content-Length: {size}\r\n"
    )


def _head(rng: random.Random) -> bytes:
    """Heads that are too large, wrong, or no HTTP."""
    body = json.dumps(good()).encode()
    return rng.choice(
        [
            raw(body, headers=f"X-Large: {'a' * rng.choice([60_000, 70_000, 200_000])}\r\n"),
            raw(body, headers="X: y\r\n" * rng.choice([10, 20_000])),
            raw(body, length=rng.choice([0, 1, 2**62, len(body) + 9])),
            raw(body, headers="Content-Encoding: gzip\r\n"),
            raw(body, headers="Transfer-Encoding: chunked\r\n"),
            raw(
                body,
                path=rng.choice(["/", "//", "/v2/models/%00/infer", "/v2/models/" + "m" * 5000, "/v2/../etc", "*"]),
            ),
            rng.randbytes(rng.randint(1, 400)),
            b"GET / HTTP/9.9\r\n\r\n",
        ]
    )


KINDS: tuple[Callable[[random.Random], bytes], ...] = (_structure, _structure, _bytes, _binary, _head)


def ask(port: int, request: bytes, *, timeout_s: float = 10.0) -> tuple[int, bytes] | None:
    """Status and body of the first answer; None when the server closed without one. Raises TimeoutError."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
        received = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1 << 16):
                received += part
                head, whole, body = received.partition(b"\r\n\r\n")
                _, has_length, rest = head.lower().partition(b"content-length:")
                if whole and has_length and len(body) >= int(rest.split(b"\r\n", 1)[0]):
                    return int(head[9:12]), body
    return None


def fuzz(port: int, *, count: int, seed: int = 1) -> Counter[str]:
    """Sends ``count`` requests; raises AssertionError on the first answer that is not as promised."""
    rng, found = random.Random(seed), Counter[str]()
    right = raw(json.dumps(good()).encode())
    for number in range(count):
        request = rng.choice(KINDS)(rng)
        answer = ask(port, request)
        found["closed" if answer is None else str(answer[0])] += 1
        if answer is not None and answer[0] >= 400:
            reason = json.loads(answer[1]).get("error")
            assert reason, f"no reason in {answer[1]!r} to {request[:200]!r}"
            assert not str(reason).startswith("internal error"), f"{reason} to {request[:300]!r}"
        if number % 100 == 99 or number == count - 1:
            again = ask(port, right)
            assert again is not None, f"no answer after {request[:200]!r}"
            assert again[0] == 200, f"{again} after {request[:200]!r}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--quick", action="store_true", help="one thousand requests")
    options = parser.parse_args()
    count = 1000 if options.quick else options.requests
    with (
        tempfile.TemporaryDirectory() as scratch,
        running(Contestant("qoe-agent", 4), ECHO, slo_ms=1e9, folder=Path(scratch)) as (port, _),
    ):
        try:
            found = fuzz(port, count=count)
        except (AssertionError, TimeoutError, ValueError) as error:
            print(json.dumps({"fuzzed_requests": count, "failed": str(error)}))
            sys.exit(1)
    print(json.dumps({"fuzzed_requests": count, "answers": dict(sorted(found.items())), "failed": None}))


if __name__ == "__main__":
    main()
