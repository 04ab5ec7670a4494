"""The service as an agent sees it, in memory: an httpx transport that keeps what it is told and can misbehave."""

from __future__ import annotations

import base64
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from device_agents.wire import (
    CheckIn,
    CheckInReply,
    DesiredApplication,
    DesiredState,
    EnrolmentReply,
    EnrolmentRequest,
    Feedback,
    FeedbackBatch,
    FeedbackBatchReply,
    FeedbackResult,
    FeedbackStatus,
    HealthGate,
    ProfilingJob,
    ServingConfiguration,
    Signature,
    SignedDesired,
    SignedKeySet,
    TrustedKey,
    VariantReference,
)
from tests.device_agents.models import Model

URL = "http://127.0.0.1:1"
NOW = datetime(2030, 1, 1, tzinfo=UTC)
TOKEN = "token-of-sixteen-characters"


def variant(model: Model, *, size_bytes: int | None = None, url: str = "") -> VariantReference:
    """A reference to a model as the service would give it."""
    return VariantReference(
        digest=model.digest,
        name="variant",
        size_bytes=len(model.content) if size_bytes is None else size_bytes,
        url=url or f"/artifacts/sha256/{model.digest}",
    )


def desired(
    model: Model,
    decision_id: str,
    *,
    application: str = "digits",
    serving: ServingConfiguration | None = None,
    gate: HealthGate | None = None,
    lease_s: float = 3600,
) -> DesiredApplication:
    """A decision for a model."""
    return DesiredApplication(
        application=application,
        model_name=application,
        decision_id=decision_id,
        variant=variant(model),
        serving=serving or ServingConfiguration(max_batch=4),
        health_gate=gate or HealthGate(min_requests=0, soak_s=0),
        lease_s=lease_s,
        slo_p95_ms=1000,
    )


def signed_by(key: Ed25519PrivateKey, document: str, key_id: str = "k1") -> SignedDesired:
    """A document with one signature."""
    value = base64.b64encode(key.sign(document.encode())).decode()
    return SignedDesired(document=document, signatures=(Signature(key_id=key_id, value=value),))


def public_part(key: Ed25519PrivateKey, key_id: str = "k1") -> TrustedKey:
    """What a device is told of a key."""
    return TrustedKey(key_id=key_id, public_key=base64.b64encode(key.public_key().public_bytes_raw()).decode())


@dataclass
class FakeService:
    """Answers like the service. ``failing`` makes it answer with that status; ``cut_after`` breaks downloads."""

    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    key_id: str = "k1"
    key_set: SignedKeySet | None = None
    credential: str | None = None
    drops: frozenset[str] = frozenset()
    """Fields that an older service does not know, and so never sends."""
    device_id: str = "device-1"
    artifacts: dict[str, bytes] = field(default_factory=dict)
    applications: tuple[DesiredApplication, ...] = ()
    profiling: ProfilingJob | None = None
    version: int = 0
    failing: int | None = None
    failing_feedback: int | None = None
    is_away: bool = False
    cut_after: int | None = None
    chunk_pause_s: float = 0.0
    hangs: str | None = None
    released: threading.Event = field(default_factory=threading.Event)
    check_in_interval_s: float = 3600
    clock_offset: timedelta = timedelta(0)
    reject: frozenset[str] = frozenset()
    poison: frozenset[str] = frozenset()
    """Feedback by id, and profiling results by job, that make it refuse the whole message."""
    requests: list[httpx.Request] = field(default_factory=list)
    check_ins: list[CheckIn] = field(default_factory=list)
    feedback: dict[str, Feedback] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    sent_bytes: int = 0
    listeners: list[queue.Queue[str]] = field(default_factory=list)
    is_closed: bool = False
    told: threading.Condition = field(default_factory=threading.Condition)

    @property
    def transport(self) -> httpx.MockTransport:
        """Goes where a network connection would."""
        return httpx.MockTransport(self._answer)

    def offer(self, *models: Model) -> None:
        """Keeps artifacts."""
        self.artifacts |= {model.digest: model.content for model in models}

    def want(self, *applications: DesiredApplication) -> None:
        """A new desired state, and a wake-up to whoever listens."""
        self.applications = applications
        self.version += 1
        for listener in self.listeners:
            listener.put(f'event: wake\ndata: {{"version": {self.version}}}\n\n')

    def hang_up(self) -> None:
        """Ends all wake-up connections."""
        for listener in self.listeners:
            listener.put("")
        self.listeners.clear()

    def close(self) -> None:
        """The same for good: who listens anew is hung up on at once, so that no agent waits for its listener."""
        self.is_closed = True
        self.hang_up()

    def document(self) -> str:
        """The desired document as text."""
        return DesiredState(
            version=self.version,
            device_id=self.device_id,
            issued_at=NOW,
            expires_at=NOW + timedelta(days=1),
            applications=self.applications,
            profiling=self.profiling,
        ).model_dump_json()

    def wait_for(self, what: str, timeout_s: float = 10.0) -> None:
        """Waits until a request of that kind came."""
        with self.told:
            assert self.told.wait_for(lambda: what in self.log, timeout_s), f"no {what} in {self.log}"

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.is_away:
            raise httpx.ConnectError("nobody there")
        path = request.url.path
        if self.credential is not None and request.headers.get("Authorization") != f"Bearer {self.credential}":
            return httpx.Response(401, json={"title": "no", "detail": "revoked", "status": 401, "code": "credential"})
        failing = self.failing or (self.failing_feedback if path.endswith("/batch") else None)
        if failing is not None:
            problem = {"title": "no", "detail": "not now", "status": failing, "code": "no"}
            return httpx.Response(failing, json=problem)
        if path.startswith("/artifacts/"):
            return self._artifact(request)
        kind = path.rsplit("/", 1)[-1]
        reply = getattr(self, f"_{kind.replace('-', '_')}")(request)
        with self.told:
            self.log.append(kind)
            self.told.notify_all()
        assert isinstance(reply, httpx.Response)
        if self.drops and reply.status_code == 200 and kind in {"enrol", "check-in"}:
            known = {name: value for name, value in reply.json().items() if name not in self.drops}
            return httpx.Response(200, json=known)
        return reply

    def _enrol(self, request: httpx.Request) -> httpx.Response:
        if EnrolmentRequest.model_validate_json(request.content).token != TOKEN:
            return httpx.Response(401, json={"title": "no", "detail": "unknown token", "status": 401, "code": "token"})
        reply = EnrolmentReply(device_id=self.device_id, credential="secret", trusted_keys=(public_part(self.key),))
        return httpx.Response(200, text=reply.model_dump_json())

    def _check_in(self, request: httpx.Request) -> httpx.Response:
        message = CheckIn.model_validate_json(request.content)
        if message.profiling and any(result.job_id in self.poison for result in message.profiling.results):
            return httpx.Response(400, json={"title": "no", "detail": "poison", "status": 400, "code": "invalid"})
        self.check_ins.append(message)
        reply = CheckInReply(
            check_in_interval_s=self.check_in_interval_s,
            desired_version=self.version,
            server_time=NOW + self.clock_offset,
            keys=self.key_set,
        )
        return httpx.Response(200, text=reply.model_dump_json())

    def _desired(self, request: httpx.Request) -> httpx.Response:
        etag = f'"{self.version}"'
        if request.headers.get("If-None-Match") == etag:
            return httpx.Response(304)
        signed = signed_by(self.key, self.document(), self.key_id)
        return httpx.Response(200, text=signed.model_dump_json(), headers={"ETag": etag})

    def _wake_up(self, request: httpx.Request) -> httpx.Response:
        events: queue.Queue[str] = queue.Queue()
        events.put(f'event: wake\ndata: {{"version": {self.version}}}\n\n')
        self.listeners.append(events)
        if self.is_closed:
            events.put("")
        return httpx.Response(200, stream=_Stream(events), headers={"Content-Type": "text/event-stream"})

    def _batch(self, request: httpx.Request) -> httpx.Response:
        batch = FeedbackBatch.model_validate_json(request.content)
        if any(item.id in self.poison for item in batch.items):
            return httpx.Response(422, json={"title": "no", "detail": "poison", "status": 422, "code": "invalid"})
        results = tuple(FeedbackResult(id=item.id, status=self._status(item)) for item in batch.items)
        return httpx.Response(200, text=FeedbackBatchReply(results=results).model_dump_json())

    def _status(self, item: Feedback) -> FeedbackStatus:
        if item.id in self.reject:
            return FeedbackStatus.REJECTED
        if item.id in self.feedback:
            return FeedbackStatus.DUPLICATE
        self.feedback[item.id] = item
        return FeedbackStatus.ACCEPTED

    def _artifact(self, request: httpx.Request) -> httpx.Response:
        digest = request.url.path.rsplit("/", 1)[-1]
        if digest not in self.artifacts:
            return httpx.Response(404, json={"title": "no", "detail": "unknown digest", "status": 404, "code": "none"})
        content, headers, status, start = self.artifacts[digest], {"ETag": f'"{digest}"'}, 200, 0
        if "Range" in request.headers and request.headers.get("If-Range") == f'"{digest}"':
            start = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            status = 206 if start < len(content) else 416
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        cut, self.cut_after = self.cut_after, None
        self.sent_bytes += len(body) if cut is None else min(cut, len(body))
        return httpx.Response(status, headers=headers, stream=Body(body, cut, self.chunk_pause_s))


class _Stream(httpx.SyncByteStream):
    def __init__(self, events: queue.Queue[str]) -> None:
        self._events = events

    def __iter__(self) -> Iterator[bytes]:
        yield b": hello\n\n"
        while event := self._events.get():
            yield event.encode()


class Body(httpx.SyncByteStream):
    """Yields small chunks, and breaks the connection after so many bytes."""

    CHUNK = 64

    def __init__(self, body: bytes, cut_after: int | None, pause_s: float = 0.0) -> None:
        self._body = body
        self._cut_after = cut_after
        self._pause_s = pause_s

    def __iter__(self) -> Iterator[bytes]:
        end = len(self._body) if self._cut_after is None else min(self._cut_after, len(self._body))
        for start in range(0, end, self.CHUNK):
            time.sleep(self._pause_s)
            yield self._body[start : min(start + self.CHUNK, end)]
        if end < len(self._body):
            raise httpx.ReadError("the line went dead")
