"""The way to the service over real sockets: whose certificate counts, and proxies; for every request, streams too."""

from __future__ import annotations

import contextlib
import ipaddress
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from device_agents.agent import Agent
from device_agents.config import AgentConfig
from device_agents.errors import ServiceUnreachable
from tests.device_agents.fake_service import TOKEN, FakeService, desired
from tests.device_agents.models import scaling

PROXIED = "qoe.example.org"


@contextlib.contextmanager
def reachable(service: FakeService, certificate: Path | None = None) -> Iterator[str]:
    """The fake service at an address of this machine, also for whoever takes it for a proxy; with TLS if asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Passes everything on."""
            url = self.path if self.path.startswith("http://") else f"http://127.0.0.1{self.path}"
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = httpx.Request(self.command, url, headers=list(self.headers.items()), content=content)
            reply = service.transport.handle_request(request)
            self.send_response(reply.status_code)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            assert isinstance(reply.stream, httpx.SyncByteStream)
            for chunk in reply.stream:
                self.wfile.write(chunk)

        def do_POST(self) -> None:
            """The same."""
            self.do_GET()

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if certificate is not None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate)
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that does not trust it hangs up
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"{'http' if certificate is None else 'https'}://127.0.0.1:{server.server_port}"
    finally:
        service.hang_up()
        server.shutdown()
        server.server_close()


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A file that certifies this machine's address, and is the authority for it."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "an authority of one")])
    subject = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(subject, critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path / "authority.pem"
    path.write_bytes(secret + certificate.public_bytes(pem))
    return path


def agent_of(url: str, folder: Path, *, ca_bundle: str = "", allow_plaintext: bool = False) -> Agent:
    return Agent(
        AgentConfig(
            service_url=url,
            token=TOKEN,
            state_dir=folder / "state",
            ca_bundle=ca_bundle,
            allow_plaintext=allow_plaintext,
            profile_budget_s=0.05,
            disk_reserve_bytes=0,
        )
    )


def assert_follows(agent: Agent, service: FakeService) -> None:
    """Enrols, is woken, fetches the document and its variant, and serves it."""
    model = scaling(2)
    with agent:
        agent.enrol()
        agent.start()
        service.wait_for("wake-up")
        service.offer(model)
        service.want(desired(model, "d1"))
        ends_s = time.monotonic() + 10
        while "digits" not in agent.executors or agent.executors["digits"].served is None:
            assert time.monotonic() < ends_s
            time.sleep(0.02)
        service.hang_up()


@pytest.mark.parametrize("is_systems", [False, True], ids=["ca_bundle", "an authority of the system"])
def test_an_authority_of_the_owner_is_trusted_for_all_requests(
    tmp_path: Path, service: FakeService, authority: Path, monkeypatch: pytest.MonkeyPatch, is_systems: bool
) -> None:
    if is_systems:
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    with reachable(service, authority) as url:
        assert_follows(agent_of(url, tmp_path, ca_bundle="" if is_systems else str(authority)), service)


def test_a_service_that_nobody_vouches_for_is_told_nothing(
    tmp_path: Path, service: FakeService, authority: Path
) -> None:
    with (
        reachable(service, authority) as url,
        agent_of(url, tmp_path) as agent,
        pytest.raises(ServiceUnreachable, match="certificate"),
    ):
        agent.enrol()
    assert service.requests == []


def test_all_requests_go_through_the_proxy_of_the_environment(
    tmp_path: Path, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy", "http_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with reachable(service) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy)
        assert_follows(agent_of(f"http://{PROXIED}", tmp_path, allow_plaintext=True), service)
    assert {request.url.host for request in service.requests} == {PROXIED}
    assert {request.url.path.split("/")[1] for request in service.requests} == {"api", "artifacts"}
