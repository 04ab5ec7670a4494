"""What a request costs before a server does anything: the agent's kind of loop, and a handler that returns at once."""

from __future__ import annotations

import asyncio
import os
from typing import cast

import uvloop

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 64\r\n\r\n" + bytes(64)


class Handler(asyncio.Protocol):
    """Reads nothing of a request but where its body ends."""

    def __init__(self) -> None:
        self._received = b""
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        _, _, length = head.lower().rpartition(b"\r\ncontent-length: ")
        if end and len(body) >= int(length.partition(b"\r\n")[0]) and self._transport:
            self._received = b""
            self._transport.write(ANSWER)


async def main() -> None:
    """Until it is ended."""
    server = await asyncio.get_running_loop().create_server(Handler, "127.0.0.1", int(os.environ["PORT"]))
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
