"""The load generator: raw keep-alive HTTP connections from one pinned process, timed from when each request was due.

    python -m benchmarks.load < SPEC.json

Open loop (``rate_rps`` given): Poisson arrivals; a request that finds all connections busy waits, and its wait counts.
Closed loop (no rate): a connection asks again once it was answered, after ``think_s``, and after a pause when it was
refused: asking on at once would measure how fast a server refuses. Needs nothing but the standard library, so that it
costs little beside the server that it measures.
"""

from __future__ import annotations

import base64
import heapq
import json
import os
import random
import select
import socket
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

GRACE_S = 1.0
REFUSED_PAUSE_S = 0.02
LARGEST_PART = 1 << 16  # larger ones would cost two system calls for memory each


@dataclass(frozen=True)
class Load:
    """What to send, and how. ``request`` is the whole HTTP request in base64."""

    port: int
    request: str
    seconds: float
    slo_ms: float
    connections: int = 64
    rate_rps: float | None = None
    think_s: float = 0.0
    seed: int = 1
    core: int | None = None
    steps: tuple[tuple[float, float], ...] = ()
    """(from second, rate) where the rate changes."""


@dataclass
class Measured:
    """What came back. A request without an answer in time is a miss, whatever the reason."""

    sent: int = 0
    in_time: int = 0
    ok: int = 0
    refused: int = 0
    failed: int = 0
    seconds: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Rates per second, milliseconds, shares."""
        ordered = sorted(self.latencies_ms) or [0.0]
        return {
            "sent": self.sent,
            "throughput_rps": round(self.ok / self.seconds, 2),
            "goodput_rps": round(self.in_time / self.seconds, 2),
            "miss_share": round(1 - self.in_time / max(1, self.sent), 4),
            "refused_share": round(self.refused / max(1, self.sent), 4),
            "failed": self.failed,
            "p50_ms": round(ordered[len(ordered) // 2], 4),
            "p95_ms": round(ordered[int(len(ordered) * 0.95)], 4),
            "mean_ms": round(sum(ordered) / len(ordered), 4),
        }


class Connection:
    """One keep-alive connection with at most one request under way."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(10)
        self.due_s = 0.0
        self.was_refused = False
        self._received = b""

    def send(self, request: bytes, due_s: float) -> None:
        """Sends one request that was due then."""
        self.due_s = due_s
        self.socket.sendall(request)

    def receive(self) -> int | None:
        """The status once the whole answer is here; raises OSError when the server hung up."""
        part = self.socket.recv(LARGEST_PART)
        if not part:
            raise ConnectionError("closed")
        self._received += part
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator or not _is_whole(head.lower(), body):
            return None
        self._received = b""
        return int(head[9:12])


def _is_whole(head: bytes, body: bytes) -> bool:
    _, found, rest = head.partition(b"content-length:")
    if found:
        return len(body) >= int(rest.split(b"\r\n", 1)[0])
    return body.endswith(b"0\r\n\r\n")


def arrivals(load: Load) -> list[float]:
    """Seconds after the start at which requests are due."""
    rng, at_s = random.Random(load.seed), 0.0
    found: list[float] = []
    while True:
        rate = load.rate_rps or 1.0
        for since_s, changed in load.steps:
            rate = changed if at_s >= since_s else rate
        at_s += rng.expovariate(rate)
        if at_s >= load.seconds:
            return found
        found.append(at_s)


class Generator:
    """One run of one load."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._request = base64.b64decode(load.request)
        self._measured = Measured(seconds=load.seconds)
        self._epoll = select.epoll()
        self._busy: dict[int, Connection] = {}
        self._idle: list[Connection] = []

    def run(self) -> Measured:
        """Sends everything and waits a little for the last answers."""
        for _ in range(self._load.connections):
            self._idle.append(self._connect())
        if self._load.rate_rps is None:
            self._closed()
        else:
            self._open()
        return self._measured

    def _connect(self) -> Connection:
        connection = Connection(self._load.port)
        self._epoll.register(connection.socket.fileno(), select.EPOLLIN)
        return connection

    def _send(self, due_s: float) -> None:
        connection = self._idle.pop()
        self._measured.sent += 1
        self._busy[connection.socket.fileno()] = connection
        connection.send(self._request, due_s)

    def _poll(self, timeout_s: float) -> list[Connection]:
        """Connections that got their answer within that time."""
        answered = []
        for number, _ in self._epoll.poll(max(0.0, timeout_s)):
            connection = self._busy.get(number)
            if connection is None:
                self._replace(number)
                continue
            try:
                status = connection.receive()
            except OSError:
                del self._busy[number]
                self._measured.failed += 1
                self._replace(number, connection)
                continue
            if status is not None:
                del self._busy[number]
                self._count(connection, status)
                self._idle.append(connection)
                answered.append(connection)
        return answered

    def _replace(self, number: int, connection: Connection | None = None) -> None:
        """The server hung up: another connection takes the place."""
        old = connection or next(each for each in self._idle if each.socket.fileno() == number)
        if connection is None:
            self._idle.remove(old)
        self._epoll.unregister(number)
        old.socket.close()
        self._idle.append(self._connect())

    def _count(self, connection: Connection, status: int) -> None:
        latency_ms = (time.perf_counter() - connection.due_s) * 1000
        connection.was_refused = status in (429, 503)
        if status == 200:
            self._measured.ok += 1
            self._measured.latencies_ms.append(latency_ms)
            self._measured.in_time += latency_ms <= self._load.slo_ms
        elif connection.was_refused:
            self._measured.refused += 1
        else:
            self._measured.failed += 1

    def _open(self) -> None:
        started_s = time.perf_counter()
        due = deque(started_s + at_s for at_s in arrivals(self._load))
        ends_s = started_s + self._load.seconds + GRACE_S
        late: deque[float] = deque()
        while (due or late or self._busy) and time.perf_counter() < ends_s:
            now_s = time.perf_counter()
            while due and due[0] <= now_s:
                late.append(due.popleft())
            while late and self._idle:
                self._send(late.popleft())
            # The timer of epoll is coarse: the last millisecond is waited for without sleeping.
            wait_s = (due[0] - time.perf_counter() if due else ends_s - now_s) - 0.001
            self._poll(wait_s if not late else 0.001)
        self._measured.sent += len(late)

    def _closed(self) -> None:
        ends_s = time.perf_counter() + self._load.seconds
        waiting: list[tuple[float, int]] = [(0.0, index) for index in range(len(self._idle))]
        while time.perf_counter() < ends_s:
            now_s = time.perf_counter()
            while waiting and waiting[0][0] <= now_s and self._idle:
                heapq.heappop(waiting)
                self._send(time.perf_counter())
            for connection in self._poll(waiting[0][0] - now_s if waiting else ends_s - now_s):
                pause_s = max(self._load.think_s, REFUSED_PAUSE_S if connection.was_refused else 0.0)
                heapq.heappush(waiting, (time.perf_counter() + pause_s, 0))


def main() -> None:
    specification: dict[str, Any] = json.load(sys.stdin)
    specification["steps"] = tuple(tuple(step) for step in specification.get("steps", ()))
    load = Load(**specification)
    if load.core is not None:
        os.sched_setaffinity(0, {load.core})
    print(json.dumps(Generator(load).run().summary()))


def specification(load: Load) -> str:
    """What ``main`` reads."""
    return json.dumps(asdict(load))


if __name__ == "__main__":
    main()
