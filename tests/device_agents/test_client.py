"""Downloads, refusals and back-off of the client, over a transport in memory, or a socket where it must break."""

from __future__ import annotations

import random
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import httpx
import pytest

from device_agents.client import DOWNLOAD_ATTEMPTS, PROGRESS_BYTES, ServiceClient, full_jitter_s
from device_agents.config import AgentConfig
from device_agents.errors import AttemptFailed, BadConfiguration, ServiceRefused, ServiceUnreachable, Superseded
from device_agents.inspection import examine
from device_agents.store import Identity
from device_agents.throughput import LONGEST_KNOWN_S, SMALLEST_BYTES, Throughput
from device_agents.wake_ups import WakeUps
from device_agents.wire import CheckIn, Outcome, VariantReference
from tests.device_agents.fake_service import NOW, URL, Body, FakeService, variant
from tests.device_agents.models import Model, scaling
from tests.device_agents.serving import listening

MODEL = Model(bytes(range(256)) * 8)
IDENTITY = Identity(service_url=URL, device_id="device-1", credential="secret")


@pytest.fixture
def client(service: FakeService) -> ServiceClient:
    service.offer(MODEL)
    return ServiceClient(URL, identity=IDENTITY, transport=service.transport, rng=random.Random(1))


def fetch(client: ServiceClient, part: Path, wanted: VariantReference | None = None) -> int:
    waits: list[float] = []
    return client.download(wanted or variant(MODEL), part, is_cancelled=lambda: False, wait=waits.append)


def test_a_credential_goes_to_no_other_host_and_the_owner_is_told_what_to_do(service: FakeService) -> None:
    identity = Identity(service_url="https://qoe.example.org", device_id="device-1", credential="secret")
    ServiceClient("https://qoe.example.org/", identity=identity, transport=service.transport)
    with pytest.raises(BadConfiguration, match=r"enrolled at https://qoe\.example\.org.*identity\.json.*--token"):
        ServiceClient("https://other.example.org", identity=identity, transport=service.transport)
    ServiceClient("http://localhost:2", identity=IDENTITY, transport=service.transport)


@pytest.fixture
def _dead_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_dead_proxy")
def test_this_machine_is_reached_by_no_proxy(tmp_path: Path) -> None:
    with listening({}) as local:
        url = str(local.base_url).rstrip("/")
        client = ServiceClient(url, identity=IDENTITY)
        with pytest.raises(ServiceRefused):
            client.check_in(CheckIn(sent_at=NOW))
        client.close()
        findings = {f.what: f.detail for f in examine(AgentConfig(service_url=url, state_dir=tmp_path / "state"))}
    assert "says 404" in findings["service"]


def test_the_doctor_looks_with_the_trust_that_the_agent_has(tmp_path: Path) -> None:
    config = AgentConfig(service_url="https://127.0.0.1:9", ca_bundle="nowhere.pem", state_dir=tmp_path / "state")
    findings = {finding.what: finding.detail for finding in examine(config)}
    assert "nowhere.pem" in findings["service"]


@pytest.mark.parametrize("cut", [0, 1, 64, 1000, len(MODEL.content) - 1])
def test_a_download_resumes_where_the_line_went_dead(
    client: ServiceClient, service: FakeService, tmp_path: Path, cut: int
) -> None:
    service.cut_after = cut
    fetched = fetch(client, tmp_path / "m.part")
    assert (tmp_path / "m.part").read_bytes() == MODEL.content
    assert fetched == len(MODEL.content)
    if cut:
        assert service.requests[-1].headers["Range"] == f"bytes={cut}-"
        assert service.requests[-1].headers["If-Range"] == f'"{MODEL.digest}"'


def test_a_part_of_an_earlier_run_is_completed(client: ServiceClient, service: FakeService, tmp_path: Path) -> None:
    (tmp_path / "m.part").write_bytes(MODEL.content[:2000])
    assert fetch(client, tmp_path / "m.part") == len(MODEL.content) - 2000
    assert (tmp_path / "m.part").read_bytes() == MODEL.content


def test_a_complete_part_needs_no_request(client: ServiceClient, service: FakeService, tmp_path: Path) -> None:
    (tmp_path / "m.part").write_bytes(MODEL.content)
    assert fetch(client, tmp_path / "m.part") == 0
    assert service.requests == []


@pytest.mark.parametrize(
    "answer", [httpx.Response(416), httpx.Response(206, headers={"Content-Range": "bytes 7-9/10"})]
)
def test_a_wrong_range_starts_over(tmp_path: Path, answer: httpx.Response) -> None:
    answers = [answer, httpx.Response(200, stream=Body(MODEL.content, None))]
    client = ServiceClient(URL, identity=IDENTITY, transport=httpx.MockTransport(lambda request: answers.pop(0)))
    (tmp_path / "m.part").write_bytes(b"old")
    fetch(client, tmp_path / "m.part")
    assert (tmp_path / "m.part").read_bytes() == MODEL.content


def test_more_bytes_than_announced_are_refused(client: ServiceClient, tmp_path: Path) -> None:
    with pytest.raises(AttemptFailed) as failed:
        fetch(client, tmp_path / "m.part", variant(MODEL, size_bytes=1000))
    assert failed.value.outcome is Outcome.VERIFY_FAILED
    assert (tmp_path / "m.part").stat().st_size <= 1000


@pytest.mark.parametrize(
    ("status", "attempts"), [(404, 1), (410, 1), (403, 1), (503, DOWNLOAD_ATTEMPTS), (429, DOWNLOAD_ATTEMPTS)]
)
def test_attempts_end_at_once_on_4xx_and_are_bounded_otherwise(
    client: ServiceClient, service: FakeService, tmp_path: Path, status: int, attempts: int
) -> None:
    service.failing = status
    with pytest.raises(AttemptFailed) as failed:
        fetch(client, tmp_path / "m.part")
    assert failed.value.outcome is Outcome.DOWNLOAD_FAILED
    assert len(service.requests) == attempts


def test_a_download_stops_when_it_is_overtaken(client: ServiceClient, service: FakeService, tmp_path: Path) -> None:
    with pytest.raises(Superseded):
        client.download(variant(MODEL), tmp_path / "m.part", is_cancelled=lambda: True, wait=lambda _: None)


def test_the_credential_goes_to_the_service_alone(client: ServiceClient, service: FakeService, tmp_path: Path) -> None:
    fetch(client, tmp_path / "a.part")
    fetch(
        client, tmp_path / "b.part", variant(MODEL, url=f"https://storage.example.org/artifacts/sha256/{MODEL.digest}")
    )
    own, foreign = service.requests
    assert own.headers["Authorization"] == "Bearer secret"
    assert foreign.url.host == "storage.example.org"
    assert "Authorization" not in foreign.headers


@pytest.mark.parametrize(
    "url", ["http://qoe.example.org", "http://10.0.0.7:8000", "ftp://127.0.0.1", "qoe.example.org", ""]
)
def test_an_address_that_would_send_the_credential_in_the_clear_is_refused(url: str) -> None:
    with pytest.raises(BadConfiguration):
        ServiceClient(url)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000", "http://localhost", "http://[::1]:8000", "https://qoe.example.org"]
)
def test_loopback_and_https_are_allowed(url: str) -> None:
    ServiceClient(url).close()


def test_plaintext_is_allowed_on_request() -> None:
    ServiceClient("http://10.0.0.7:8000", allow_plaintext=True).close()


def test_a_trace_id_is_passed_on(client: ServiceClient, service: FakeService) -> None:
    client.check_in(CheckIn(sent_at=NOW), trace_id="ab" * 16)
    assert service.requests[0].headers["traceparent"].startswith(f"00-{'ab' * 16}-")


def test_an_answer_that_cannot_be_understood_is_no_reason_to_give_up() -> None:
    client = ServiceClient(
        URL, identity=IDENTITY, transport=httpx.MockTransport(lambda _: httpx.Response(200, text="<html>"))
    )
    with pytest.raises(ServiceUnreachable) as unreachable:
        client.check_in(CheckIn(sent_at=NOW))
    assert not unreachable.value.permanent


def test_retry_after_is_kept() -> None:
    answer = httpx.Response(429, headers={"Retry-After": "7"}, json={"title": "slow down"})
    client = ServiceClient(URL, identity=IDENTITY, transport=httpx.MockTransport(lambda _: answer))
    with pytest.raises(ServiceRefused) as refused:
        client.check_in(CheckIn(sent_at=NOW))
    assert refused.value.retry_after_s == 7
    assert not refused.value.permanent


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        ("7", 7),
        ("99999999", 300),
        ("Tue, 01 Jan 2030 00:00:40 GMT", 40),
        ("Tue, 01 Jan 2030 00:00:40 -0000", 40),
        ("Mon, 31 Dec 2029 23:59:00 GMT", 0),
        ("Fri, 31 Dec 2032 23:59:00 GMT", 300),
        ("Fri, 31 Dec 99999999999999999999 23:59:59 GMT", None),
        ("soon", None),
        ("-7", None),
        ("\u00b2", None),
        ("", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_by_the_services_clock(asked: str, seconds: float | None) -> None:
    headers = [(b"Date", b"Tue, 01 Jan 2030 00:00:00 GMT"), (b"Retry-After", asked.encode("latin-1"))]
    answer = httpx.Response(503, headers=headers)
    client = ServiceClient(URL, identity=IDENTITY, transport=httpx.MockTransport(lambda _: answer))
    with pytest.raises(ServiceRefused) as refused:
        client.check_in(CheckIn(sent_at=NOW))
    assert refused.value.retry_after_s == seconds


def test_a_date_to_come_back_at_counts_from_now_where_the_answer_tells_no_time() -> None:
    until = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    answer = httpx.Response(429, headers={"Retry-After": until})
    client = ServiceClient(URL, identity=IDENTITY, transport=httpx.MockTransport(lambda _: answer))
    with pytest.raises(ServiceRefused) as refused:
        client.check_in(CheckIn(sent_at=NOW))
    assert refused.value.retry_after_s == pytest.approx(100, abs=10)


class Hearing(threading.Event):
    """Notes for how long it is waited on, and is set by that."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0.0)
        self.set()
        return True


@pytest.mark.parametrize(
    ("status", "headers", "at_least_s", "at_most_s"),
    [
        (429, {"Retry-After": "120"}, 120, 120),
        (503, {"Retry-After": "1"}, 1, 1),
        (503, {}, 0, 0.5),
        (401, {"Retry-After": "1"}, 30, 30),
    ],
)
def test_the_ear_for_wake_ups_comes_back_no_sooner_than_it_was_asked_to(
    status: int, headers: dict[str, str], at_least_s: float, at_most_s: float
) -> None:
    answer = httpx.Response(status, headers=headers, json={"title": "slow down"})
    client = ServiceClient(URL, identity=IDENTITY, transport=httpx.MockTransport(lambda _: answer))
    stopping = Hearing()
    WakeUps(client, on_wake=lambda _: None, rng=random.Random(1), stopping=stopping).listen()
    assert len(stopping.waits) == 1
    assert at_least_s <= stopping.waits[0] <= at_most_s


def test_back_off_is_fully_jittered_and_bounded() -> None:
    rng = random.Random(3)
    waits = [full_jitter_s(failures, rng, base_s=1, cap_s=60) for failures in range(200)]
    assert all(wait <= min(60, 2**failures) for failures, wait in enumerate(waits))
    assert min(waits[10:]) < 6
    assert max(waits) > 50


def test_an_unknown_digest_is_told_with_the_services_words(client: ServiceClient, tmp_path: Path) -> None:
    with pytest.raises(AttemptFailed, match="unknown digest"):
        fetch(client, tmp_path / "m.part", variant(scaling(5)))


def test_a_redirect_leads_to_no_plain_http_elsewhere(tmp_path: Path) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.host == "127.0.0.1", "the request went out in the clear"
        return httpx.Response(302, headers={"Location": "http://storage.example.org/model"})

    client = ServiceClient(URL, identity=IDENTITY, transport=httpx.MockTransport(answer))
    with pytest.raises(AttemptFailed, match="https://") as failed:
        fetch(client, tmp_path / "m.part")
    assert failed.value.outcome is Outcome.DOWNLOAD_FAILED


def test_a_line_that_breaks_often_but_gets_on_is_no_reason_to_give_up(tmp_path: Path) -> None:
    content = bytes((DOWNLOAD_ATTEMPTS + 2) * PROGRESS_BYTES)

    def answer(request: httpx.Request) -> httpx.Response:
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        body = content[start : start + PROGRESS_BYTES]
        return httpx.Response(206 if start else 200, headers=headers, stream=Body(body, None))

    client = ServiceClient(URL, identity=IDENTITY, transport=httpx.MockTransport(answer))
    wanted = variant(Model(content))
    assert fetch(client, tmp_path / "m.part", wanted) == len(content)


def test_a_download_that_waits_for_bytes_stops_within_a_second_when_it_is_overtaken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        overtaken = threading.Event()

        def stall() -> None:
            connection, _ = listener.accept()
            connection.recv(65_536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nx")
            overtaken.wait(10)
            connection.recv(1)  # until the device hangs up
            connection.close()

        thread = threading.Thread(target=stall)
        thread.start()
        client = ServiceClient(f"http://127.0.0.1:{listener.getsockname()[1]}", identity=IDENTITY)
        threading.Timer(0.3, overtaken.set).start()
        with pytest.raises(Superseded):
            client.download(
                variant(MODEL), tmp_path / "m.part", is_cancelled=overtaken.is_set, wait=lambda _: overtaken.wait(5)
            )
        thread.join(5)
        assert not thread.is_alive()
        client.close()


def test_a_large_download_tells_what_the_network_gives_until_it_is_too_old_to_tell(tmp_path: Path) -> None:
    content, clock_s = bytes(2 * SMALLEST_BYTES), [0.0]
    answers = {"large": content, "small": content[: SMALLEST_BYTES - 1]}

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=Body(answers[request.url.path.strip("/")], None))

    client = ServiceClient(URL, identity=IDENTITY, transport=httpx.MockTransport(answer))
    client.throughput = Throughput(clock=lambda: clock_s[0])
    fetch(client, tmp_path / "small.part", variant(Model(answers["small"]), url="/small"))
    assert client.throughput.mbps() is None, "so few bytes tell of the latency"
    fetch(client, tmp_path / "large.part", variant(Model(content), url="/large"))
    measured = client.throughput.mbps()
    assert measured is not None
    assert measured > 0
    clock_s[0] += LONGEST_KNOWN_S + 1
    assert client.throughput.mbps() is None, "the device may be elsewhere by now"


def test_the_rate_of_a_slow_line_is_measured_on_a_real_socket(tmp_path: Path) -> None:
    content, pieces = bytes(2 * SMALLEST_BYTES), 8

    def send_slowly(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.recv(65_536)
        connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\n\r\n".encode())
        for _ in range(pieces):
            time.sleep(0.02)
            connection.sendall(content[: len(content) // pieces])
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=send_slowly, args=(listener,))
        thread.start()
        client = ServiceClient(f"http://127.0.0.1:{listener.getsockname()[1]}", identity=IDENTITY)
        fetch(client, tmp_path / "m.part", variant(Model(content)))
        thread.join(5)
        client.close()
    measured = client.throughput.mbps()
    assert measured is not None
    assert 0 < measured <= len(content) * 8 / 1e6 / (pieces * 0.02) * 1.2
