"""All talk with the service: enrolment, check-in, desired state, wake-ups, artifacts and feedback.

One httpx client whose transport tests can replace. Every failure is a ServiceUnreachable or a ServiceRefused.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import random
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from device_agents import reuse
from device_agents.errors import (
    AgentError,
    AttemptFailed,
    BadConfiguration,
    ServiceRefused,
    ServiceUnreachable,
    Superseded,
)
from device_agents.store import Identity
from device_agents.throughput import Throughput
from device_agents.wire import (
    CheckIn,
    CheckInReply,
    EnrolmentReply,
    EnrolmentRequest,
    FeedbackBatch,
    FeedbackBatchReply,
    Outcome,
    SharedWeights,
    SignedDesired,
    VariantReference,
    WakeUp,
)

logger = logging.getLogger("qoe_agent.client")

TIMEOUT = httpx.Timeout(10.0)
WAKE_UP_TIMEOUT = httpx.Timeout(10.0, read=60.0)
DOWNLOAD_ATTEMPTS = 6
# A break after that much progress is the line's fault, not a reason to give up: large variants cross bad networks too.
PROGRESS_BYTES = 65_536
CANCEL_TICK_S = 0.25
LONGEST_WAIT_S = 300.0

AnyMessage = TypeVar("AnyMessage", bound=BaseModel)
Wait = Callable[[float], object]


def full_jitter_s(failures: int, rng: random.Random, *, base_s: float = 0.5, cap_s: float = 60.0) -> float:
    """How long to wait after the n-th failure in a row: uniform between zero and a limit that doubles."""
    return rng.uniform(0.0, min(cap_s, base_s * 2.0 ** min(failures, 32)))


def asked_wait_s(error: AgentError) -> float:
    """How long the service asked to be left alone, by ``Retry-After``; zero where it did not."""
    return (error.retry_after_s or 0.0) if isinstance(error, ServiceRefused) else 0.0


def require_safe(url: str, *, allow_plaintext: bool) -> None:
    """Raises BadConfiguration for plain http to another machine, unless that was asked for."""
    if not url:
        raise BadConfiguration("service_url is not set: give --service-url with the address of the service")
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise BadConfiguration(f"{url} is not an address: {error}") from error
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise BadConfiguration(f"{url} must begin with https:// (or http:// for this machine)")
    if parsed.scheme == "http" and not allow_plaintext and not is_loopback(parsed.host):
        raise BadConfiguration(f"{url} sends the credential in the clear: use https:// or --allow-plaintext")


def _require_same_service(identity: Identity, service_url: str) -> None:
    """A credential goes to no other host than the one that gave it. Ports of this machine may change."""
    known, asked = httpx.URL(identity.service_url), httpx.URL(service_url)
    if known.host == asked.host or (is_loopback(known.host) and is_loopback(asked.host)):
        return
    raise BadConfiguration(
        f"service_url is {service_url}, but this device is enrolled at {identity.service_url}: set that one again, or "
        "remove identity.json from the state folder and give --token to enrol at the other"
    )


class ServiceClient:
    """Speaks to one service as one device. Thread-safe."""

    def __init__(
        self,
        service_url: str,
        *,
        identity: Identity | None = None,
        allow_plaintext: bool = False,
        ca_bundle: str = "",
        transport: httpx.BaseTransport | None = None,
        rng: random.Random | None = None,
    ) -> None:
        require_safe(service_url, allow_plaintext=allow_plaintext)
        if identity is not None:
            _require_same_service(identity, service_url)
        self.identity = identity
        self.throughput = Throughput()
        self._origin = httpx.URL(service_url)
        self._allow_plaintext = allow_plaintext
        self._rng = rng or random.Random()
        verify = trust(ca_bundle) if self._origin.scheme == "https" else False
        self._http = httpx.Client(
            base_url=service_url,
            timeout=TIMEOUT,
            transport=transport,
            verify=verify,
            trust_env=not is_loopback(self._origin.host),
            event_hooks={"request": [self._check]},
        )
        self._elsewhere: dict[bool, httpx.Client] = {}
        self._ca_bundle = ca_bundle
        self._transport = transport
        self._wake_up_socket: socket.socket | None = None
        self._lock = threading.Lock()

    # -- identity and reports ------------------------------------------------------------------------------------

    def enrol(self, request: EnrolmentRequest) -> EnrolmentReply:
        """Trades the token for a credential."""
        return self._post("/api/v1/devices/enrol", request, EnrolmentReply)

    def check_in(self, message: CheckIn, *, trace_id: str | None = None) -> CheckInReply:
        """Reports state and telemetry."""
        return self._post(f"{self._device_path}/check-in", message, CheckInReply, trace_id=trace_id)

    def send_feedback(self, batch: FeedbackBatch) -> FeedbackBatchReply:
        """Sends feedback; each item gets its own result."""
        return self._post("/api/v1/feedback/batch", batch, FeedbackBatchReply)

    def desired(self, etag: str = "") -> tuple[SignedDesired, str] | None:
        """The desired document and its ETag, or None when it is still the one with ``etag``."""
        headers = self._headers() | ({"If-None-Match": etag} if etag else {})
        response = self._request("GET", f"{self._device_path}/desired", headers=headers)
        if response.status_code == 304:
            return None
        return _parsed(response, SignedDesired), response.headers.get("ETag", "")

    # -- wake-ups ------------------------------------------------------------------------------------------------

    def wake_ups(self) -> Iterator[WakeUp | None]:
        """Listens until the connection ends: each wake-up, the first with the version that is desired now.

        None stands for one that cannot be understood. A wake-up only says "look"; it is no news by itself.
        """
        headers = self._headers() | {"Accept": "text/event-stream"}
        try:
            url = f"{self._device_path}/wake-up"
            with self._http.stream("GET", url, headers=headers, timeout=WAKE_UP_TIMEOUT) as response:
                _raise_for(response)
                self._wake_up_socket = _socket_of(response)
                for line in response.iter_lines():
                    if line.startswith("data:"):
                        yield _wake_up(line.removeprefix("data:"))
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise ServiceUnreachable(_said(error)) from error
        finally:
            self._wake_up_socket = None

    def hang_up(self) -> None:
        """Ends a ``wake_ups`` that another thread is waiting in."""
        if (waiting := self._wake_up_socket) is not None:
            with contextlib.suppress(OSError):
                waiting.shutdown(socket.SHUT_RDWR)

    # -- artifacts -----------------------------------------------------------------------------------------------

    def download(
        self,
        variant: VariantReference,
        part: Path,
        *,
        is_cancelled: Callable[[], bool],
        wait: Wait,
        trace_id: str | None = None,
    ) -> int:
        """Completes ``part`` up to the announced size and returns the bytes fetched.

        Resumes what is there. Attempts without progress are bounded; raises AttemptFailed(download_failed), or
        Superseded.
        """
        transfer = _Transfer(variant, part, is_cancelled)
        listed = self._weights_of(variant) if variant.size_bytes - transfer.have >= reuse.LEAST_BYTES else None
        transfer.local = reuse.find(part.parent, listed) if listed else ()
        failures = 0
        while failures < DOWNLOAD_ATTEMPTS:
            had_bytes = transfer.fetched
            try:
                while transfer.have < variant.size_bytes:
                    if not transfer.take_local():
                        self._fetch(transfer, trace_id)
                if listed:
                    reuse.keep(part.parent, variant.digest, listed)
                return transfer.fetched
            except (ServiceUnreachable, ServiceRefused) as error:
                if error.permanent:
                    raise AttemptFailed(error.reason, outcome=Outcome.DOWNLOAD_FAILED) from error
                logger.warning("download failed digest=%s reason=%r", variant.digest, str(error))
                failures = 1 if transfer.fetched - had_bytes >= PROGRESS_BYTES else failures + 1
                if failures < DOWNLOAD_ATTEMPTS:
                    pause_s = full_jitter_s(failures - 1, self._rng, cap_s=30.0)
                    wait(max(pause_s, asked_wait_s(error)))
            if is_cancelled():
                raise Superseded("overtaken while downloading")
        reason = f"gave up after {DOWNLOAD_ATTEMPTS} attempts without progress"
        raise AttemptFailed(reason, outcome=Outcome.DOWNLOAD_FAILED)

    def _weights_of(self, variant: VariantReference) -> SharedWeights | None:
        """Which weights the variant may share with others; None where the service does not say."""
        if variant.url != f"/artifacts/sha256/{variant.digest}":
            return None
        try:
            headers = self._headers()
            return _parsed(self._request("GET", f"{variant.url}/weights", headers=headers), SharedWeights)
        except (ServiceUnreachable, ServiceRefused) as error:
            logger.info("nothing known of shared weights digest=%s reason=%r", variant.digest, str(error))
            return None

    def _fetch(self, transfer: _Transfer, trace_id: str | None) -> None:
        client, headers = self._client_for(transfer.variant.url, trace_id)
        # Compressed transfer would make byte ranges meaningless.
        headers |= transfer.range_headers() | {"Accept-Encoding": "identity"}
        try:
            with (
                client.stream("GET", transfer.variant.url, headers=headers, follow_redirects=True) as response,
                _cut_when(transfer.is_cancelled, _socket_of(response)),
            ):
                self._receive(transfer, response)
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise ServiceUnreachable(_said(error)) from error
        except OSError as error:
            raise AttemptFailed(f"cannot write: {error.strerror}", outcome=Outcome.NO_SPACE) from error

    def _receive(self, transfer: _Transfer, response: httpx.Response) -> None:
        """Also what breaks off in the middle tells how fast the line was."""
        had_bytes, started_s = transfer.fetched, time.monotonic()
        try:
            transfer.receive(response)
        finally:
            self.throughput.received(transfer.fetched - had_bytes, took_s=time.monotonic() - started_s)

    def _client_for(self, url: str, trace_id: str | None) -> tuple[httpx.Client, dict[str, str]]:
        """The credential goes to the service alone, never to where it may keep its artifacts."""
        target = self._origin.join(url)
        if (target.scheme, target.host, target.port) == (self._origin.scheme, self._origin.host, self._origin.port):
            return self._http, self._headers(trace_id)
        require_safe(str(target), allow_plaintext=self._allow_plaintext)
        with self._lock:
            is_here = is_loopback(target.host)
            if is_here not in self._elsewhere:
                self._elsewhere[is_here] = httpx.Client(
                    timeout=TIMEOUT,
                    verify=trust(self._ca_bundle),
                    transport=self._transport,
                    trust_env=not is_here,
                    event_hooks={"request": [self._check]},
                )
            return self._elsewhere[is_here], {}

    # -- plumbing ------------------------------------------------------------------------------------------------

    def _check(self, request: httpx.Request) -> None:
        """Every request, those that a redirect leads to as well, goes where the settings permit it."""
        try:
            require_safe(str(request.url), allow_plaintext=self._allow_plaintext)
        except BadConfiguration as error:
            raise AttemptFailed(f"redirected: {error.reason}", outcome=Outcome.DOWNLOAD_FAILED) from error

    @property
    def _device_path(self) -> str:
        if self.identity is None:
            raise BadConfiguration("this device is not enrolled")
        return f"/api/v1/devices/{self.identity.device_id}"

    def _headers(self, trace_id: str | None = None) -> dict[str, str]:
        headers = {"traceparent": f"00-{trace_id or secrets.token_hex(16)}-{secrets.token_hex(8)}-01"}
        if self.identity is not None:
            headers["Authorization"] = f"Bearer {self.identity.credential}"
        return headers

    def _post(
        self, path: str, message: BaseModel, reply: type[AnyMessage], *, trace_id: str | None = None
    ) -> AnyMessage:
        headers = self._headers(trace_id) | {"Content-Type": "application/json"}
        content = message.model_dump_json(exclude_none=True)
        return _parsed(self._request("POST", path, headers=headers, content=content), reply)

    def _request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.HTTPError as error:
            raise ServiceUnreachable(_said(error)) from error
        _raise_for(response)
        return response

    def close(self) -> None:
        """Ends all connections."""
        self.hang_up()
        self._http.close()
        for client in self._elsewhere.values():
            client.close()


@dataclass
class _Transfer:
    """One variant on its way into its part file, over as many connections as it takes."""

    variant: VariantReference
    part: Path
    is_cancelled: Callable[[], bool]
    local: tuple[reuse.Local, ...] = ()
    fetched: int = 0

    @property
    def have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    @property
    def stop(self) -> int:
        """Where the next bytes begin that are on this device already; the end of the file where there are none."""
        return min((each.start for each in self.local if each.start > self.have), default=self.variant.size_bytes)

    def take_local(self) -> bool:
        """Whether the next bytes were on this device."""
        local = next((each for each in self.local if each.start <= self.have < each.stop), None)
        if local is None or reuse.append(local, self.part):
            return local is not None
        self.local = tuple(each for each in self.local if each != local)
        return False

    def range_headers(self) -> dict[str, str]:
        is_to_the_end = self.stop == self.variant.size_bytes
        if not self.have and is_to_the_end:
            return {}
        span = f"bytes={self.have}-{'' if is_to_the_end else self.stop - 1}"
        return {"Range": span, "If-Range": f'"{self.variant.digest}"'}

    def receive(self, response: httpx.Response) -> None:
        if response.status_code == 416:
            self._start_over("the range is not there")
        _raise_for(response)
        resumes = response.status_code == 206
        if resumes and not response.headers.get("Content-Range", "").startswith(f"bytes {self.have}-"):
            self._start_over("another range than asked for")
        size, expected = (self.have, self.stop) if resumes else (0, self.variant.size_bytes)
        with self.part.open("ab" if resumes else "wb") as file:
            # As the network hands it over: a chunk size would hold bytes back, and lose them when the line breaks.
            for chunk in response.iter_raw():
                if self.is_cancelled():
                    raise Superseded("overtaken while downloading")
                size += len(chunk)
                self.fetched += len(chunk)
                if size > expected:
                    raise AttemptFailed("larger than announced", outcome=Outcome.VERIFY_FAILED)
                file.write(chunk)
        if size < expected:
            raise ServiceUnreachable("the connection ended early")

    def _start_over(self, reason: str) -> NoReturn:
        self.part.unlink(missing_ok=True)
        raise ServiceUnreachable(f"{reason}: starting over")


def _raise_for(response: httpx.Response) -> None:
    if response.status_code < 300 or response.status_code == 304:
        return
    try:
        response.read()
        problem = response.json()
        reason = str(problem.get("detail") or problem.get("title") or response.reason_phrase)
    except (ValueError, AttributeError, httpx.HTTPError):
        reason = response.reason_phrase
    raise ServiceRefused(reason[:500], http_status=response.status_code, retry_after_s=_retry_after_s(response))


def _retry_after_s(response: httpx.Response) -> float | None:
    """Seconds, or a date (RFC 9110, 10.2.3), which counts from the answer's own: a device's clock may be wrong."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return min(float(text), LONGEST_WAIT_S)
    until = _date(text)
    if until is None:
        return None
    answered = _date(response.headers.get("Date", "")) or datetime.now(UTC)
    return min(max(0.0, (until - answered).total_seconds()), LONGEST_WAIT_S)


def _date(text: str) -> datetime | None:
    try:
        found = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _parsed(response: httpx.Response, kind: type[AnyMessage]) -> AnyMessage:
    try:
        return kind.model_validate_json(response.content)
    except ValidationError as error:
        raise ServiceUnreachable(f"the answer is not a {kind.__name__}") from error


def _wake_up(text: str) -> WakeUp | None:
    try:
        return WakeUp.model_validate_json(text)
    except ValidationError:
        return None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _socket_of(response: httpx.Response) -> socket.socket | None:
    stream = response.extensions.get("network_stream")
    found = stream.get_extra_info("socket") if stream is not None else None
    return found if isinstance(found, socket.socket) else None


@contextmanager
def _cut_when(is_cancelled: Callable[[], bool], connection: socket.socket | None) -> Iterator[None]:
    """Ends a transfer that is cancelled while it waits for bytes, instead of after its time-out."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(CANCEL_TICK_S):
            if is_cancelled() and connection is not None:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                return

    if connection is not None:
        threading.Thread(target=watch, name="cancel-download", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def trust(ca_bundle: str) -> Any:
    """What httpx verifies servers by: that file, else the system's authorities, else those that come with httpx.

    Raises BadConfiguration for a file that cannot be read.
    """
    try:
        if ca_bundle:
            return ssl.create_default_context(cafile=ca_bundle)
        known = ssl.get_default_verify_paths()
        has_own = known.cafile or (known.capath and any(Path(known.capath).iterdir()))
        return ssl.create_default_context() if has_own else True
    except OSError as error:
        raise BadConfiguration(f"ca_bundle {ca_bundle or 'of the system'}: {error}") from error


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own: its traffic goes by no proxy, and needs no encryption."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
