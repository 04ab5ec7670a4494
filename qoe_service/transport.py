"""What stands between the ASGI server and Django: a limit on bodies, and a short way for what must be quick when a
whole fleet comes at once: wake-up streams, looks at desired documents, and console pages.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from typing import Any

from django.core.handlers.asgi import ASGIRequest
from django.core.handlers.base import BaseHandler
from django.db import connection
from django.http import HttpResponse, HttpResponseBase, StreamingHttpResponse

from qoe_service.connections import keep_connection
from qoe_service.observability import adopt_trace_id, new_trace_id
from qoe_service.problems import CONTENT_TYPE, headers_of, problem_of, too_large

logger = logging.getLogger(__name__)

Scope = dict[str, Any]
Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

WAKE_UP_PATH = re.compile(r"^/api/v1/devices/[^/]+/wake-up$")
LOOK_PATH = re.compile(r"^/api/v1/devices/[^/]+/desired$")
PAGE_PATH = re.compile(r"^/(?:(?:devices|applications|decisions)/.*)?$")
# So few that a fleet which looks at once, or comes back at once, leaves the interpreter to the console now and then.
WAKE_UP_THREADS, LOOK_THREADS, PAGE_THREADS = 1, 4, 4
WAKE_UP_REST_S = 0.001
# A client that is still sending sees a reset instead of our answer, so some of the rest is read and thrown away.
DRAINED_FACTOR = 8
DRAINED_S = 10.0


class ThreadsHandler(BaseHandler):
    """Django's handler for GETs, with all of a request on one of a few threads that keep a database connection.

    Under ASGI Django changes threads for every synchronous middleware, and gives each request a thread and a database
    connection of its own, a wake-up stream for minutes; what is asked here costs less than that. Views and middleware
    are the same. What a view streams is sent by the event loop, and holds no thread.
    """

    def __init__(self, name: str, *, threads: int, rest_s: float = 0.0) -> None:
        """``rest_s`` is how long a thread leaves the processor to others after each request."""
        super().__init__()
        self.load_middleware()
        self._rest_s = rest_s
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # It is a GET: whatever body it may have is not read.
        answer = await asyncio.get_running_loop().run_in_executor(self._threads, self._answer, scope)
        if isinstance(answer, StreamingHttpResponse):
            await _send_while_connected(answer, receive, send)
        else:
            assert isinstance(answer, HttpResponse), "an answer is whole or a stream"
            answer.setdefault("Content-Length", str(len(answer.content)))
            await send(_head(answer))
            await send({"type": "http.response.body", "body": answer.content})

    def _answer(self, scope: Scope) -> HttpResponseBase:
        keep_connection()
        answer = self.get_response(ASGIRequest(scope, BytesIO()))
        if connection.errors_occurred:
            connection.close()
        time.sleep(self._rest_s)
        return answer


async def _send_while_connected(answer: StreamingHttpResponse, receive: Receive, send: Send) -> None:
    """Sends a stream to its end, or until the client goes away."""
    sending = asyncio.create_task(_send_stream(answer, send))
    leaving = asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        sending.cancel()
        leaving.cancel()
        await asyncio.wait({sending, leaving})
    if not sending.cancelled():
        sending.result()


async def _send_stream(answer: StreamingHttpResponse, send: Send) -> None:
    await send(_head(answer))
    async for part in answer:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _head(answer: HttpResponseBase) -> Message:
    headers = [(name.lower().encode("ascii"), value.encode("latin1")) for name, value in answer.items()]
    cookies = [(b"set-cookie", cookie.output(header="").strip().encode("ascii")) for cookie in answer.cookies.values()]
    return {"type": "http.response.start", "status": answer.status_code, "headers": headers + cookies}


def short_ways() -> dict[re.Pattern[str], ThreadsHandler]:
    """What is quick when a whole fleet comes at once, by path. Django is set up before."""
    return {
        WAKE_UP_PATH: ThreadsHandler("wake-up", threads=WAKE_UP_THREADS, rest_s=WAKE_UP_REST_S),
        LOOK_PATH: ThreadsHandler("look", threads=LOOK_THREADS),
        PAGE_PATH: ThreadsHandler("page", threads=PAGE_THREADS),
    }


def route(ways: Mapping[re.Pattern[str], Application], *, otherwise: Application) -> Application:
    """Sends GETs of the paths that match to applications of their own, and the rest to ``otherwise``."""

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        is_get = scope["type"] == "http" and scope["method"] == "GET"
        found = (application for path, application in ways.items() if is_get and path.match(scope["path"]))
        await next(found, otherwise)(scope, receive, send)

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
