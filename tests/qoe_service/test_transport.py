from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator

import httpx
import pytest
from django.contrib.auth.hashers import ScryptPasswordHasher

from device_agents.wire import Problem, SignedDesired
from qoe_service.transport import LOOK_THREADS, PAGE_THREADS, WAKE_UP_THREADS
from tests.qoe_service.served import MAX_BODY_BYTES, Served

ENROL = "/api/v1/devices/enrol"
# Each of these threads keeps one; the watcher has one more.
KEPT_CONNECTIONS = LOOK_THREADS + PAGE_THREADS + WAKE_UP_THREADS + 1
PASSWORD = "correct horse battery staple"


def chunks(total: int) -> Iterator[bytes]:
    for start in range(0, total, 4096):
        yield b"x" * min(4096, total - start)


def assert_too_large(answer: httpx.Response) -> None:
    assert answer.status_code == 413
    problem = Problem.model_validate_json(answer.content)
    assert (problem.code, problem.fields[0].field) == ("too_large", "body")
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["X-Trace-Id"] == problem.trace_id
    assert int(answer.headers["Retry-After"]) > 0


@pytest.mark.parametrize("factor", [1.01, 3, 6])
def test_a_body_above_the_limit_is_refused_announced_or_chunked(served: Served, factor: float) -> None:
    size = int(MAX_BODY_BYTES * factor)
    assert_too_large(httpx.post(served.url + ENROL, content=b"x" * size))
    assert_too_large(httpx.post(served.url + ENROL, content=chunks(size)))


def test_a_body_at_the_limit_is_read(served: Served) -> None:
    body = json.dumps({"token": served.token, "name": "a", "padding": ""}).encode()
    padded = body[:-2] + b"x" * (MAX_BODY_BYTES - len(body)) + body[-2:]
    assert len(padded) == MAX_BODY_BYTES
    assert httpx.post(served.url + ENROL, content=padded).status_code == 200
    assert httpx.post(served.url + ENROL, content=iter([padded[:1000], padded[1000:]])).status_code == 200


def test_an_endless_body_is_cut_off(served: Served) -> None:
    sent_bytes = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent_bytes
        while sent_bytes < 500 * MAX_BODY_BYTES:
            sent_bytes += 4096
            yield b"x" * 4096

    with contextlib.suppress(httpx.TransportError):
        httpx.post(served.url + ENROL, content=endless())
    assert sent_bytes < 400 * MAX_BODY_BYTES, "more than was drained and lay in the sockets' buffers"
    assert httpx.get(served.url + "/healthz").status_code == 200


def test_a_look_goes_the_short_way_and_is_answered_as_any_other_request(served: Served) -> None:
    [device] = served.enrol("looking")
    [other] = served.enrol("another")
    url = f"{served.url}/api/v1/devices/{device.device_id}/desired"
    mine = {"Authorization": f"Bearer {device.credential}", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    found = httpx.get(url, headers=mine)
    assert found.status_code == 200
    assert SignedDesired.model_validate_json(found.content).signatures
    assert found.headers["X-Trace-Id"] == "a" * 32
    assert httpx.get(url, headers=mine | {"If-None-Match": found.headers["ETag"]}).status_code == 304
    for headers, status in ((mine | {"Authorization": f"Bearer {other.credential}"}, 403), ({}, 401)):
        refused = httpx.get(url, headers=headers)
        assert refused.status_code == Problem.model_validate_json(refused.content).status == status


def test_looks_share_a_few_database_connections_and_outlive_a_database_that_fails(served: Served) -> None:
    [device] = served.enrol("looking-often")
    url = f"{served.url}/api/v1/devices/{device.device_id}/desired"
    mine = {"Authorization": f"Bearer {device.credential}"}
    with httpx.Client(headers=mine) as client:
        assert {client.get(url).status_code for _ in range(20)} == {200}
        assert served.open_database_files() <= KEPT_CONNECTIONS
        served.execute("ALTER TABLE rollouts_desiredversion RENAME TO gone")
        try:
            assert client.get(url).status_code == 500
        finally:
            served.execute("ALTER TABLE gone RENAME TO rollouts_desiredversion")
        assert client.get(url).status_code == 200


def signed_in(served: Served, client: httpx.Client, name: str) -> None:
    """By the form, as a person does."""
    served.execute(
        "INSERT INTO auth_user (username, password, is_superuser, is_staff, is_active, first_name, last_name, email,"
        " date_joined) VALUES (?, ?, 1, 1, 1, '', '', '', '2026-06-01 12:00:00')",
        name,
        ScryptPasswordHasher().encode(PASSWORD, "s" * 22),
    )
    token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', client.get("/login/").text)
    assert token is not None
    answer = client.post(
        "/login/", data={"username": name, "password": PASSWORD, "csrfmiddlewaretoken": token[1]}, follow_redirects=True
    )
    assert answer.url.path == "/", "nobody is sent back to the form"


def test_console_pages_go_a_short_way_that_keeps_its_connections_and_sets_its_cookies(served: Served) -> None:
    with httpx.Client(base_url=served.url) as client:
        asked = client.get("/?page=2")
        assert (asked.status_code, asked.headers["Location"]) == (302, "/login/?next=/%3Fpage%3D2")
        signed_in(served, client, "ada")
        del client.cookies["csrftoken"]
        page = client.get("/")
        assert page.status_code == 200
        assert page.headers["Content-Security-Policy"]
        assert client.cookies["csrftoken"], "the form that logs out needs it"
        assert {client.get("/").status_code for _ in range(20)} == {200}
        assert client.get("/devices/nobody/").status_code == 404
        assert served.open_database_files() <= KEPT_CONNECTIONS
