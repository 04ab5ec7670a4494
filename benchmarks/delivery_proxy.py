"""A TCP proxy between agent and service: counts what artifacts cost on the line, and cuts it at a given byte."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from typing import Self

RECEIVE_BYTES = 65_536
TICK_S = 0.02
RESET = struct.pack("ii", 1, 0)


class CuttingProxy:
    """Forwards connections. ``cut_after`` arms it: an artifact that sends more body bytes than that is cut there."""

    def __init__(self, target_port: int) -> None:
        self.body_bytes = 0
        self.cuts = 0
        self._target_port = target_port
        self._cut_after: int | None = None
        self._resets = False
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def cut_after(self, body_bytes: int, *, resets: bool = False) -> None:
        """Cut once, after so many further body bytes; ``resets``: by RST instead of FIN."""
        with self._lock:
            self._cut_after, self._resets = body_bytes, resets

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._target_port)) as service:
            line = _Line(client, service)
            line.asking.start()
            self._answer(line)
        with contextlib.suppress(OSError):
            client.close()

    def _answer(self, line: _Line) -> None:
        """Service to client, until either ends or the line is cut."""
        while received := line.service.recv(RECEIVE_BYTES):
            body = line.body_of(received)
            if not body:
                line.client.sendall(received)
                continue
            kept, is_cut = self._count(len(body))
            line.client.sendall(received[: len(received) - len(body) + kept])
            if is_cut:
                self._cut(line)
                return
        with contextlib.suppress(OSError):
            line.client.shutdown(socket.SHUT_WR)

    def _count(self, size: int) -> tuple[int, bool]:
        """How many of these body bytes go through, and whether the line is cut after them."""
        with self._lock:
            is_cut = self._cut_after is not None and self._cut_after < size
            kept = self._cut_after if is_cut and self._cut_after is not None else size
            if self._cut_after is not None:
                self._cut_after = None if is_cut else self._cut_after - size
            self.body_bytes += kept
            self.cuts += is_cut
            return kept, is_cut

    def _cut(self, line: _Line) -> None:
        """By FIN, or by RST, which is sent only when no other thread waits in the socket any more."""
        line.is_cut.set()
        line.asking.join()
        if self._resets:
            line.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        for side in (line.client, line.service):
            with contextlib.suppress(OSError):
                side.close()


class _Line:
    """One connection through the proxy. Knows whether what comes back belongs to an artifact."""

    def __init__(self, client: socket.socket, service: socket.socket) -> None:
        self.client = client
        self.service = service
        self.is_cut = threading.Event()
        self.asking = threading.Thread(target=self._ask, daemon=True)
        self._is_artifact = False
        self._head: bytes | None = b""

    def _ask(self) -> None:
        """Client to service, until either ends or the line is cut."""
        with contextlib.suppress(OSError, ValueError):
            while not self.is_cut.is_set():
                if not select.select([self.client], [], [], TICK_S)[0]:
                    continue
                if not (asked := self.client.recv(RECEIVE_BYTES)):
                    break
                self._is_artifact, self._head = asked.startswith(b"GET /artifacts/"), b""
                self.service.sendall(asked)
            self.service.shutdown(socket.SHUT_WR)

    def body_of(self, received: bytes) -> bytes:
        """The part of what was received that is an artifact's body."""
        if not self._is_artifact:
            return b""
        if self._head is None:
            return received
        self._head += received
        head, found, body = self._head.partition(b"\r\n\r\n")
        if not found:
            return b""
        self._head = None
        return body if head else b""
