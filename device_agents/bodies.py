"""Bodies of requests to the local server: read, inflated and bounded, each by itself and all together.

What they mean is the server's business. Knows one event loop, so there are no locks.
"""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from types import TracebackType
from typing import Any, Self

from device_agents.errors import BadRequest, BodyTooLarge, Overloaded

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

LARGEST_AT_ONCE = 4
UNCOUNTED_BYTES = 64 * 1024  # what the connection holds anyway: small requests go on beside slow large ones


class BodyRoom:
    """Room for the bodies of all requests that are not answered yet: ``LARGEST_AT_ONCE`` of the largest."""

    def __init__(self, *, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.room_bytes = LARGEST_AT_ONCE * limit_bytes
        self.held_bytes = 0

    def body(self) -> Body:
        """The place of one request's body, to be entered before it is read."""
        return Body(self)


class Body:
    """One body. It holds its room until the ``with`` ends, which is when its request has its answer."""

    def __init__(self, room: BodyRoom) -> None:
        self._room = room
        self._held_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._room.held_bytes -= self._held_bytes
        self._held_bytes = 0

    async def read(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        """The whole body, inflated. An announced length takes its room at once, any other as it comes.

        Raises BadRequest, BodyTooLarge, and Overloaded where other bodies leave no room.
        """
        announced = headers.get(b"content-length", b"")
        self._grow_to(int(announced) if announced.isdigit() else 0)
        parts: list[bytes] = []
        size, is_more = 0, True
        while is_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise BadRequest("the client went away")
            part = message.get("body", b"")
            size += len(part)
            self._grow_to(size)
            parts.append(part)
            is_more = message.get("more_body", False)
        body = b"".join(parts)
        encoding = headers.get(b"content-encoding", b"").lower()
        return body if encoding in (b"", b"identity") else self._inflated(body, encoding)

    def _grow_to(self, size: int) -> None:
        room = self._room
        if size > room.limit_bytes:
            raise BodyTooLarge(f"a body may have {room.limit_bytes} bytes")
        if size <= max(UNCOUNTED_BYTES, self._held_bytes):
            return
        more = size - self._held_bytes
        if room.held_bytes + more > room.room_bytes:
            raise Overloaded(f"all bodies under way may have {room.room_bytes} bytes together")
        room.held_bytes += more
        self._held_bytes = size

    def _inflated(self, body: bytes, encoding: bytes) -> bytes:
        if encoding not in (b"gzip", b"deflate"):
            raise BadRequest(f"content encoding {encoding.decode(errors='replace')} is not served")
        inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # knows gzip and zlib by their headers
        try:
            inflated = inflater.decompress(body, self._room.limit_bytes + 1)
        except zlib.error as error:
            raise BadRequest("the compressed body is damaged") from error
        self._grow_to(len(inflated))
        if not inflater.eof:
            raise BadRequest("the compressed body is cut off")
        return inflated
