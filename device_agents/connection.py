"""One connection of the local server: uvicorn's, with bounds on what a client may do before its request is whole.

Whatever is no request at all gets its reason as JSON too. What a whole request means is the server's business.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LARGEST_HEAD_BYTES = 64 * 1024
SLOWEST_REQUEST_S = 30.0
LINGER_S = 1.0
CONTINUE = b"HTTP/1.1 100 "


class WholeAnswers:
    """A transport that holds the head of an answer back until its body comes: one packet instead of two."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Sends ``data`` behind the head that was held back, if it is not a head itself."""
        if not self._head and data.endswith(b"\r\n\r\n") and not data.startswith(CONTINUE):
            self._head = data
            return
        head, self._head = self._head, b""
        self._transport.write(head + data)

    def flush(self) -> None:
        """Sends a head that has no body."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        """Ends the connection once everything is out."""
        self.flush()
        self._transport.close()


class BoundedConnection(HttpToolsProtocol):
    """Closes on request heads above ``LARGEST_HEAD_BYTES`` and on requests that take longer than ``slowest_s``."""

    slowest_s = SLOWEST_REQUEST_S

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head_bytes = 0
        self._unfinished_bytes = 0
        self._is_in_head, self._is_whole = True, False
        self._timer: asyncio.TimerHandle | None = None
        self._is_refused = False
        self._has_client_ended = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """A client came; it has a while to ask."""
        self._answers = WholeAnswers(transport)
        super().connection_made(self._answers)  # type: ignore[arg-type]  # all else is the transport's own
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client went."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A part of a request."""
        if self._is_refused or self.transport.is_closing():
            return
        super().data_received(data)
        self._unfinished_bytes = self._unfinished_bytes + len(data) if self._is_in_head else 0
        if self._unfinished_bytes > LARGEST_HEAD_BYTES:
            self._refuse_head()

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio lets it say whether to stay open
        """The client sends no more; what it has asked is answered before the connection ends."""
        self._has_client_ended = True
        is_being_answered = self.cycle is not None and not self.cycle.response_complete
        return is_being_answered and self._is_whole and not self._is_refused

    def on_response_complete(self) -> None:
        """An answer is out."""
        self._answers.flush()
        super().on_response_complete()
        if self._has_client_ended and not self.transport.is_closing():
            self.transport.close()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._is_in_head, self._is_whole, self._head_bytes = True, False, 0
        self._expect_request()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; raises ValueError, which ends the parser, when they are too many."""
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > LARGEST_HEAD_BYTES:
            self._refuse_head()
            raise ValueError("the head is too large")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Its head is whole."""
        self._is_in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """It is whole."""
        self._stop_timer()
        self._is_whole = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        self._refuse("400 Bad Request", msg)

    def _refuse_head(self) -> None:
        self._refuse("431 Request Header Fields Too Large", f"a request head may have {LARGEST_HEAD_BYTES} bytes")

    def _expect_request(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.slowest_s, self._give_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self._refuse("408 Request Timeout", f"the request was not whole within {self.slowest_s:g} s")

    def _refuse(self, status: str, reason: str) -> None:
        """Answers, and reads on without looking for a moment: closing at once would cut the answer off."""
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        self._stop_timer()
        body = json.dumps({"error": reason}).encode()
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)
