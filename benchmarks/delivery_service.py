"""A small service on a real socket, for the delivery benchmark: it can be slow, and hold a device up.

It decides nothing: it offers what a scenario wants, signs it as the real one does, and keeps what it is told.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper

from device_agents.wire import (
    CheckIn,
    CheckInReply,
    DesiredApplication,
    DesiredState,
    FeedbackBatch,
    FeedbackBatchReply,
    FeedbackResult,
    FeedbackStatus,
    HealthGate,
    OutcomeReport,
    ServingConfiguration,
    Signature,
    SignedDesired,
    TrustedKey,
    VariantReference,
    WakeUp,
)

APPLICATION = "digits"
DEVICE_ID = "device-1"
WIDTH = 4
SEND_BYTES = 16_384


@dataclass(frozen=True)
class Model:
    """An ONNX file. ``factor`` is what it multiplies by, so that every answer tells which model gave it."""

    content: bytes
    factor: float = 0.0

    @property
    def digest(self) -> str:
        """sha256, as the wire has it."""
        return hashlib.sha256(self.content).hexdigest()


def scaling(factor: float, *, size_bytes: int = 0, seed: int = 0) -> Model:
    """y = x * factor for rows of four, with that many bytes of ballast; infinite factors fail every warm-up."""
    constants = [helper.make_tensor("factor", TensorProto.FLOAT, [1], [factor])]
    if size_bytes:
        constants.append(
            helper.make_tensor("ballast", TensorProto.UINT8, [size_bytes], _ballast(size_bytes, seed), raw=True)
        )
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        "scaling",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", WIDTH])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return Model(model.SerializeToString(), factor)


@cache
def _ballast(size_bytes: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(size_bytes)


@dataclass
class RigService:
    """Desired documents, artifacts, wake-ups and feedback over HTTP/1.1. Its attributes may change at any time."""

    rate_bytes_per_s: float | None = None
    is_holding: bool = False
    """Keeps every request for the desired document waiting until it is released."""
    artifacts: dict[str, bytes] = field(default_factory=dict)
    applications: tuple[DesiredApplication, ...] = ()
    version: int = 0
    outcomes: list[OutcomeReport] = field(default_factory=list)
    check_ins: list[CheckIn] = field(default_factory=list)
    fed_back: Counter[str] = field(default_factory=Counter)
    changed: threading.Condition = field(default_factory=threading.Condition)
    expires: timedelta = timedelta(days=1)

    def __post_init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        rig = self

        class Handler(_Handler):
            service = rig

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self.is_holding = False
            self.version = -1
            self.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        """Where it listens, on loopback."""
        return int(self._server.server_address[1])

    @property
    def trusted_key(self) -> TrustedKey:
        """What a device must know to believe it."""
        return TrustedKey(key_id="k1", public_key=base64.b64encode(self._key.public_key().public_bytes_raw()).decode())

    def want(self, *applications: DesiredApplication) -> None:
        """A new desired document, and a wake-up."""
        with self.changed:
            self.applications = applications
            self.version += 1
            self.changed.notify_all()

    def hold(self, is_holding: bool) -> None:
        """Keeps documents back, or lets them go."""
        with self.changed:
            self.is_holding = is_holding
            self.changed.notify_all()

    def wait_for(self, is_true: Callable[[], bool], timeout_s: float = 30.0) -> bool:
        """Waits for something that a device tells."""
        with self.changed:
            return self.changed.wait_for(is_true, timeout_s)

    def is_past(self, version: int) -> bool:
        """Whether the desired document is another than that one."""
        return self.version != version

    def ended(self, decision_id: str) -> OutcomeReport | None:
        """How a decision ended, once the device has told so."""
        return next((outcome for outcome in self.outcomes if outcome.decision_id == decision_id), None)

    def document(self) -> SignedDesired:
        """The desired document with its signature."""
        now = datetime.now(UTC)
        text = DesiredState(
            version=self.version,
            device_id=DEVICE_ID,
            issued_at=now,
            expires_at=now + self.expires,
            applications=self.applications,
        ).model_dump_json()
        value = base64.b64encode(self._key.sign(text.encode())).decode()
        return SignedDesired(document=text, signatures=(Signature(key_id="k1", value=value),))


def decision(
    model: Model,
    decision_id: str,
    *,
    soak_s: float = 0.0,
    min_requests: int = 0,
    max_batch: int = 4,
    lease_s: float = 3600.0,
) -> DesiredApplication:
    """A decision for a model; by default it is committed on the warm-up alone."""
    return DesiredApplication(
        application=APPLICATION,
        model_name=APPLICATION,
        decision_id=decision_id,
        variant=VariantReference(
            digest=model.digest,
            name="variant",
            size_bytes=len(model.content),
            url=f"/artifacts/sha256/{model.digest}",
        ),
        serving=ServingConfiguration(max_batch=max_batch),
        health_gate=HealthGate(min_requests=min_requests, soak_s=soak_s),
        lease_s=lease_s,
        slo_p95_ms=1000,
    )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    service: RigService

    def do_GET(self) -> None:
        with contextlib.suppress(OSError):
            if self.path.startswith("/artifacts/"):
                self._artifact()
            elif self.path.endswith("/wake-up"):
                self._wake_up()
            else:
                self._desired()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        with contextlib.suppress(OSError, ValueError):  # a device that is killed leaves half a message
            self._check_in(body) if self.path.endswith("/check-in") else self._feedback(body)

    def _check_in(self, body: bytes) -> None:
        message, rig = CheckIn.model_validate_json(body), self.service
        with rig.changed:
            rig.check_ins.append(message)
            rig.outcomes.extend(message.outcomes)
            rig.changed.notify_all()
        reply = CheckInReply(check_in_interval_s=30, desired_version=max(0, rig.version), server_time=datetime.now(UTC))
        self._answer(reply.model_dump_json().encode())

    def _feedback(self, body: bytes) -> None:
        batch, rig = FeedbackBatch.model_validate_json(body), self.service
        with rig.changed:
            rig.fed_back.update(item.id for item in batch.items)
            rig.changed.notify_all()
        results = tuple(FeedbackResult(id=item.id, status=FeedbackStatus.ACCEPTED) for item in batch.items)
        self._answer(FeedbackBatchReply(results=results).model_dump_json().encode())

    def _desired(self) -> None:
        rig = self.service
        with rig.changed:
            rig.changed.wait_for(lambda: not rig.is_holding, 9.0)
            etag, document = f'"{rig.version}"', rig.document()
        if self.headers.get("If-None-Match") == etag:
            self._answer(b"", status=304)
        else:
            self._answer(document.model_dump_json().encode(), {"ETag": etag})

    def _wake_up(self) -> None:
        rig, told = self.service, 0
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        while True:
            with rig.changed:
                rig.changed.wait_for(partial(rig.is_past, told), 5.0)
                told, last = rig.version, told
            if told < 0:
                return
            words = f"event: wake\ndata: {WakeUp(version=told).model_dump_json()}\n\n" if told != last else ": beat\n\n"
            self.wfile.write(words.encode())

    def _artifact(self) -> None:
        digest = self.path.rsplit("/", 1)[-1]
        content, start = self.service.artifacts.get(digest), 0
        if content is None:  # what newer agents ask for beside the file itself: its list of weights
            self._answer(b"{}", status=404)
            return
        if self.headers.get("If-Range") == f'"{digest}"':
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        headers = {"ETag": f'"{digest}"', "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self._begin(200 if start == 0 else 206, len(content) - start, headers)
        for offset in range(start, len(content), SEND_BYTES):
            piece = content[offset : offset + SEND_BYTES]
            self.wfile.write(piece)
            if (rate := self.service.rate_bytes_per_s) is not None:
                time.sleep(len(piece) / rate)

    def _answer(self, body: bytes, headers: Mapping[str, str] | None = None, *, status: int = 200) -> None:
        self._begin(status, len(body), headers or {})
        self.wfile.write(body)

    def _begin(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def handle(self) -> None:
        """A device that is killed hangs up without a word."""
        with contextlib.suppress(OSError):
            super().handle()

    def log_message(self, *_: object) -> None:
        """Nothing: a benchmark prints its table only."""
