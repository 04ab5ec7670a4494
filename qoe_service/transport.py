"""What stands between the ASGI server and Django: a limit on bodies, wake-up streams without a thread each, and a short
way for the looks that follow when a whole fleet is woken.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from typing import Any

from asgiref.sync import sync_to_async
from django.core.handlers.asgi import ASGIHandler, ASGIRequest
from django.core.handlers.base import BaseHandler
from django.db import connection
from django.http import HttpResponse

from qoe_service.observability import adopt_trace_id, new_trace_id
from qoe_service.problems import CONTENT_TYPE, headers_of, problem_of, too_large

logger = logging.getLogger(__name__)

Scope = dict[str, Any]
Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_WAKE_UP_PATH = re.compile(r"^/api/v1/devices/[^/]+/wake-up$")
_LOOK_PATH = re.compile(r"^/api/v1/devices/[^/]+/desired$")
# So few that a fleet which looks at once leaves the interpreter to the console now and then.
LOOK_THREADS = 4
# A client that is still sending sees a reset instead of our answer, so some of the rest is read and thrown away.
DRAINED_FACTOR = 8
DRAINED_S = 10.0


class SharedThreadHandler(ASGIHandler):
    """Django's handler without a thread for every request.

    Django keeps one thread per request for its synchronous parts until the answer is complete; a wake-up stream
    lasts for minutes. Here these parts run on the one thread that the process shares, which keeps its connection: a
    fleet that comes back after a restart would otherwise open one for each device.
    """

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await sync_to_async(_keep_connection)()
        await self.handle(scope, receive, send)


def _keep_connection() -> None:
    """Of this thread, for one request more, unless it is broken."""
    connection.close_at = None


class LookHandler(BaseHandler):
    """Django's handler for looks at the desired document: all of it on one of a few threads that keep a connection.

    Under ASGI Django changes threads for every synchronous middleware, and gives each request a thread and a database
    connection of its own; a look costs less than that. Views and middleware are the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.load_middleware()
        self._threads = ThreadPoolExecutor(LOOK_THREADS, thread_name_prefix="look")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del receive  # a GET: whatever body it may have is not read
        answer = await asyncio.get_running_loop().run_in_executor(self._threads, self._answer, scope)
        answer.setdefault("Content-Length", str(len(answer.content)))
        headers = [(name.lower().encode("ascii"), value.encode("latin1")) for name, value in answer.items()]
        await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": answer.content})

    def _answer(self, scope: Scope) -> HttpResponse:
        answer = self.get_response(ASGIRequest(scope, BytesIO()))
        assert isinstance(answer, HttpResponse), "a look is answered at once, not streamed"
        if connection.errors_occurred:
            connection.close()
        return answer


def route(*, wake_ups: Application, looks: Application, everything_else: Application) -> Application:
    """Sends wake-up streams and looks at desired documents to applications of their own, and the rest to the third."""

    def choose(scope: Scope) -> Application:
        if scope["type"] != "http" or scope["method"] != "GET":
            return everything_else
        if _WAKE_UP_PATH.match(scope["path"]):
            return wake_ups
        return looks if _LOOK_PATH.match(scope["path"]) else everything_else

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        await choose(scope)(scope, receive, send)

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
