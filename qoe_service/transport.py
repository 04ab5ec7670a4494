"""What stands between the ASGI server and Django: a limit on bodies, and wake-up streams without a thread each."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from django.core.handlers.asgi import ASGIHandler

from qoe_service.observability import adopt_trace_id, new_trace_id
from qoe_service.problems import CONTENT_TYPE, headers_of, problem_of, too_large

logger = logging.getLogger(__name__)

Scope = dict[str, Any]
Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_WAKE_UP_PATH = re.compile(r"^/api/v1/devices/[^/]+/wake-up$")
# A client that is still sending sees a reset instead of our answer, so some of the rest is read and thrown away.
DRAINED_FACTOR = 8
DRAINED_S = 10.0


class SharedThreadHandler(ASGIHandler):
    """Django's handler without a thread for every request.

    Django keeps one thread per request for its synchronous parts until the answer is complete; a wake-up stream
    lasts for minutes. Here these parts run on the one thread that the process shares.
    """

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.handle(scope, receive, send)


def route_wake_ups(wake_up: Application, everything_else: Application) -> Application:
    """Sends wake-up streams to one application and the rest to the other."""

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        is_wake_up = scope["type"] == "http" and _WAKE_UP_PATH.match(scope["path"])
        await (wake_up if is_wake_up else everything_else)(scope, receive, send)

    return routed


def limit_bodies(application: Application, limit_bytes: int) -> Application:
    """Refuses bodies above the limit with 413, announced or chunked, before Django stores them."""

    async def limited(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await application(scope, receive, send)
            return
        body = _CountedBody(receive, limit_bytes)
        if _announced_bytes(scope) <= limit_bytes:
            await application(scope, body.receive, send)
            if not body.is_too_large:
                return
        with suppress(TimeoutError):
            await asyncio.wait_for(body.drain(), DRAINED_S)
        await _refuse(scope, send, limit_bytes)

    return limited


class _CountedBody:
    """Passes a body on until it exceeds the limit; from there the application sees a disconnect."""

    def __init__(self, receive: Receive, limit_bytes: int) -> None:
        self._receive = receive
        self._limit_bytes = limit_bytes
        self._received_bytes = 0
        self._is_complete = False

    @property
    def is_too_large(self) -> bool:
        return self._received_bytes > self._limit_bytes

    async def receive(self) -> Message:
        message = await self._receive()
        self._count(message)
        return {"type": "http.disconnect"} if self.is_too_large else message

    async def drain(self) -> None:
        while not self._is_complete and self._received_bytes <= self._limit_bytes * DRAINED_FACTOR:
            self._count(await self._receive())

    def _count(self, message: Message) -> None:
        self._received_bytes += len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)


def _announced_bytes(scope: Scope) -> int:
    announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    return int(announced) if announced.isdigit() else 0


async def _refuse(scope: Scope, send: Send, limit_bytes: int) -> None:
    adopt_trace_id(new_trace_id())
    error = too_large(limit_bytes)
    problem = problem_of(error)
    logger.warning("refused status=413 code=%s method=%s path=%r", problem.code, scope["method"], scope["path"])
    named = {"Content-Type": CONTENT_TYPE, "Connection": "close", "X-Trace-Id": problem.trace_id or ""}
    headers = {**headers_of(error), **named}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": encoded})
    await send({"type": "http.response.body", "body": problem.model_dump_json().encode()})
