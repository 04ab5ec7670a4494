"""``GET /artifacts/sha256/{digest}``: immutable bytes in resumable ranges (RFC 9110), no thread per client."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import BinaryIO

from asgiref.sync import sync_to_async
from django.db.models import Exists, OuterRef
from django.http import HttpRequest, HttpResponse, HttpResponseBase, StreamingHttpResponse

from device_agents.wire import FieldProblem, Problem, SharedWeights, WeightReference
from qoe_service.catalogue import artifacts
from qoe_service.catalogue.artifacts import CHUNK_BYTES
from qoe_service.catalogue.models import Artifact, ProfilingJob, Variant, Work
from qoe_service.errors import NotAuthenticated, NotFound, RangeNotSatisfiable, ServiceError
from qoe_service.fleet.api import DeviceAuth
from qoe_service.fleet.models import Device
from qoe_service.observability import current_trace_id
from qoe_service.problems import headers_of

_DIGEST = re.compile(r"[0-9a-f]{64}")
_RANGE = re.compile(r"^bytes=\s*(\d*)-(\d*)\s*$")


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes from ``start`` up to, not including, ``stop``."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many bytes."""
        return self.stop - self.start


class Chunks:
    """Reads so many bytes of a file; the file is closed with the response, also when the client goes away."""

    def __init__(self, file: BinaryIO, size_bytes: int) -> None:
        self._file, self._left = file, size_bytes

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while self._left > 0:
            chunk = await asyncio.to_thread(self._file.read, min(CHUNK_BYTES, self._left))
            if not chunk:
                return
            self._left -= len(chunk)
            yield chunk

    def close(self) -> None:
        """Called by Django when the response ends."""
        self._file.close()


async def artifact(request: HttpRequest, digest: str) -> HttpResponseBase:
    """The artifact, a part of it, or a Problem."""
    if request.method not in {"GET", "HEAD"}:
        return HttpResponse(status=405, headers={"Allow": "GET, HEAD"})
    try:
        device = await _authorise(request)
        return await _answer(request, await _size_of(digest, device), digest)
    except ServiceError as error:
        return _problem(error, headers_of(error))


async def weights(request: HttpRequest, digest: str) -> HttpResponseBase:
    """Where the artifact's large weights lie and what they are; a device that has some need not fetch those."""
    if request.method != "GET":
        return HttpResponse(status=405, headers={"Allow": "GET"})
    try:
        device = await _authorise(request)
        await _size_of(digest, device)
        listed = await sync_to_async(artifacts.weights_of)(digest)
    except ServiceError as error:
        return _problem(error, headers_of(error))
    body = SharedWeights(weights=tuple(WeightReference(**each._asdict()) for each in listed))
    return HttpResponse(body.model_dump_json(), content_type="application/json")


def requested_span(header: str, size_bytes: int) -> Span | None:
    """The span that a Range header asks for; None for the whole: no range, several, or one that makes no sense.

    Raises RangeNotSatisfiable when the range lies outside.

    >>> requested_span("bytes=-3", 10)
    Span(start=7, stop=10)
    """
    match = _RANGE.match(header)
    if match is None or not any(match.groups()):
        return None
    first, last = (int(text) if text else None for text in match.groups())
    if first is not None and last is not None and first > last:
        return None
    if first is None:
        span = Span(max(size_bytes - (last or 0), 0), size_bytes)
    else:
        span = Span(first, size_bytes if last is None else min(last + 1, size_bytes))
    if span.size <= 0:
        raise RangeNotSatisfiable(f"the artifact has {size_bytes} bytes", field="Range")
    return span


async def _authorise(request: HttpRequest) -> Device | None:
    """The device that asks; None for an operator."""
    scheme, _, credential = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return await sync_to_async(DeviceAuth().authenticate)(request, credential.strip())
    if not (await request.auser()).is_authenticated:
        raise NotAuthenticated("a device credential is needed, or an operator's session")
    return None


async def _size_of(digest: str, device: Device | None) -> int:
    """How long it is. To a device, data sets do not exist: it gets variants, and the samples of its profiling job."""
    known = Artifact.objects.filter(pk=digest)
    if device is not None:
        given = ProfilingJob.objects.filter(device=device, state=Work.State.RUNNING, samples_digest=OuterRef("pk"))
        known = known.filter(Exists(Variant.objects.filter(artifact=OuterRef("pk"))) | Exists(given))
    # No database is asked about what cannot be a digest: PostgreSQL refuses NUL.
    found = await known.afirst() if _DIGEST.fullmatch(digest) else None
    if found is None:
        raise NotFound(f"no artifact {digest[:64]}", field="digest")
    return found.size_bytes


async def _answer(request: HttpRequest, size_bytes: int, digest: str) -> HttpResponseBase:
    etag = f'"{digest}"'
    headers = {
        "ETag": etag,
        # private: a shared cache must not hand it to whoever has no credential
        "Cache-Control": "private, max-age=31536000, immutable",
        "Accept-Ranges": "bytes",
        "X-Content-Type-Options": "nosniff",
    }
    if _names(request.headers.get("If-None-Match", ""), etag):
        return HttpResponse(status=304, headers=headers)
    if request.method == "HEAD":
        return HttpResponse(headers={**headers, **_content(size_bytes)})
    try:
        span = requested_span(_applicable_range(request, etag), size_bytes)
    except RangeNotSatisfiable as error:
        return _problem(error, {"Content-Range": f"bytes */{size_bytes}", "Accept-Ranges": "bytes"})
    if span is None:
        file = await sync_to_async(artifacts.open_for_reading)(digest)
        return StreamingHttpResponse(Chunks(file, size_bytes), headers={**headers, **_content(size_bytes)})
    file = await sync_to_async(artifacts.open_span)(digest, span.start, span.stop)
    headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{size_bytes}"
    return StreamingHttpResponse(Chunks(file, span.size), status=206, headers={**headers, **_content(span.size)})


def _applicable_range(request: HttpRequest, etag: str) -> str:
    """If-Range wants a strong match; otherwise the client's part is of something else, and it gets the whole."""
    condition = request.headers.get("If-Range")
    return request.headers.get("Range", "") if condition in {None, etag} else ""


def _names(if_none_match: str, etag: str) -> bool:
    tags = {each.strip().removeprefix("W/") for each in if_none_match.split(",")}
    return etag in tags or "*" in tags


def _content(size_bytes: int) -> dict[str, str]:
    return {"Content-Type": "application/octet-stream", "Content-Length": str(size_bytes)}


def _problem(error: ServiceError, headers: dict[str, str] | None = None) -> HttpResponse:
    body = Problem(
        title=error.title,
        status=error.status,
        code=error.code,
        detail=error.detail,
        fields=(FieldProblem(field=error.field, detail=error.detail),) if error.field else (),
        trace_id=current_trace_id(),
    )
    return HttpResponse(
        body.model_dump_json(), status=error.status, content_type="application/problem+json", headers=headers
    )
