from __future__ import annotations

import hashlib
import io
import json
from collections.abc import AsyncIterable, Mapping
from dataclasses import dataclass
from typing import cast

import pytest
from asgiref.sync import async_to_sync
from django.conf import LazySettings
from django.contrib.auth.models import User
from django.db import connection
from django.http import HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.test import AsyncClient
from django.test.utils import CaptureQueriesContext

from qoe_service.catalogue import artifacts
from qoe_service.catalogue.artifacts import CHUNK_BYTES
from qoe_service.catalogue.models import Application, Piece, ProfilingJob, Variant
from qoe_service.fleet.models import Device
from tests.builders import CREDENTIAL, NOW, make_application, make_device, make_variant

pytestmark = pytest.mark.django_db

CONTENT = bytes(range(256)) * 2400  # more than two chunks
SIZE = len(CONTENT)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
ETAG = f'"{DIGEST}"'
URL = f"/artifacts/sha256/{DIGEST}"


@pytest.fixture(autouse=True)
def stored() -> None:
    make_device()
    artifacts.store(io.BytesIO(CONTENT), now=NOW)
    make_variant(make_application(), digest=DIGEST)


@dataclass(frozen=True)
class Answer:
    """A response that was read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    largest_chunk: int = 0


def fetch(method: str = "get", url: str = URL, *, client: AsyncClient | None = None, **headers: str) -> Answer:
    headers.setdefault("Authorization", f"Bearer {CREDENTIAL}")
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return async_to_sync(_fetch)(client or AsyncClient(), method, url, names)


async def _fetch(client: AsyncClient, method: str, url: str, headers: dict[str, str]) -> Answer:
    response: HttpResponseBase = await getattr(client, method)(url, headers=headers)
    if isinstance(response, StreamingHttpResponse):
        chunks = [chunk async for chunk in cast(AsyncIterable[bytes], response.streaming_content)]
        return Answer(response.status_code, response.headers, b"".join(chunks), max(map(len, chunks)))
    assert isinstance(response, HttpResponse)
    return Answer(response.status_code, response.headers, response.content)


def test_a_device_gets_the_bytes_and_may_keep_them_for_ever() -> None:
    answer = fetch()
    assert answer.status == 200
    assert answer.headers["ETag"] == ETAG
    assert answer.headers["Cache-Control"] == "private, max-age=31536000, immutable"
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert answer.headers["Content-Length"] == str(SIZE)
    assert answer.body == CONTENT
    assert answer.largest_chunk <= CHUNK_BYTES


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-9", 0, 10),
        ("bytes=10-", 10, SIZE),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
        (f"bytes=5-{SIZE * 2}", 5, SIZE),
        ("bytes=-7", SIZE - 7, SIZE),
        (f"bytes=-{SIZE * 2}", 0, SIZE),
        ("bytes=100000-500000", 100_000, 500_001),
    ],
)
def test_a_range_is_answered_with_exactly_its_bytes(asked: str, start: int, stop: int) -> None:
    answer = fetch(Range=asked)
    assert answer.status == 206
    assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert answer.headers["Content-Length"] == str(stop - start)
    assert answer.headers["ETag"] == ETAG
    assert answer.body == CONTENT[start:stop]


@pytest.mark.parametrize("asked", [f"bytes={SIZE}-", f"bytes={SIZE * 2}-{SIZE * 3}", "bytes=-0"])
def test_a_range_outside_is_refused_with_the_size(asked: str) -> None:
    answer = fetch(Range=asked)
    assert answer.status == 416
    assert answer.headers["Content-Range"] == f"bytes */{SIZE}"
    assert json.loads(answer.body)["code"] == "range_not_satisfiable"


@pytest.mark.parametrize("asked", ["bytes=", "bytes=-", "bytes=9-3", "bytes=a-b", "items=0-1", "bytes=0-1,4-5", "0-4"])
def test_a_range_that_makes_no_sense_or_has_parts_gets_the_whole(asked: str) -> None:
    answer = fetch(Range=asked)
    assert answer.status == 200
    assert answer.body == CONTENT


@pytest.mark.parametrize(
    ("condition", "status"),
    [(ETAG, 206), (f"W/{ETAG}", 200), ('"other"', 200), ("Sat, 29 Oct 1994 19:43:31 GMT", 200)],
)
def test_a_resumed_download_continues_only_the_same_bytes(condition: str, status: int) -> None:
    answer = fetch(Range="bytes=10-19", If_Range=condition)
    assert answer.status == status
    assert answer.body == (CONTENT[10:20] if status == 206 else CONTENT)


@pytest.mark.parametrize(
    ("condition", "status"), [(ETAG, 304), (f'"other", W/{ETAG}', 304), ("*", 304), ('"other"', 200)]
)
def test_what_the_client_has_is_not_sent_again(condition: str, status: int) -> None:
    answer = fetch(If_None_Match=condition)
    assert answer.status == status
    assert answer.headers["ETag"] == ETAG
    assert answer.body == (b"" if status == 304 else CONTENT)


def test_head_tells_the_size_and_ignores_ranges() -> None:
    answer = fetch("head", Range="bytes=0-9")
    assert (answer.status, answer.headers["Content-Length"], answer.headers["ETag"]) == (200, str(SIZE), ETAG)
    assert answer.body == b""


@pytest.mark.parametrize("digest", ["0" * 64, "x", DIGEST.upper()])
def test_an_unknown_digest_is_a_problem_that_names_it(digest: str) -> None:
    answer = fetch(url=f"/artifacts/sha256/{digest}")
    problem = json.loads(answer.body)
    assert (answer.status, answer.headers["Content-Type"]) == (404, "application/problem+json")
    assert (problem["code"], problem["fields"][0]["field"]) == ("not_found", "digest")


@pytest.mark.parametrize("authorization", ["", "Bearer wrong", "Basic abc", f"Bearer{CREDENTIAL}"])
def test_without_a_credential_there_is_nothing(authorization: str) -> None:
    answer = fetch(Authorization=authorization)
    assert answer.status == 401
    assert CONTENT[:64] not in answer.body


def test_an_operator_may_download_from_the_console() -> None:
    client = AsyncClient()
    client.force_login(User.objects.create(username="operator"))
    answer = fetch(client=client, Authorization="")
    assert answer.status == 200
    assert answer.body == CONTENT


def test_a_data_set_is_for_operators_only() -> None:
    digest = artifacts.store(io.BytesIO(b"held-out data"), now=NOW).digest
    Application.objects.update(dataset=digest)
    url = f"/artifacts/sha256/{digest}"
    assert fetch(url=url).status == 404
    client = AsyncClient()
    client.force_login(User.objects.create(username="operator"))
    assert fetch(url=url, client=client, Authorization="").body == b"held-out data"


def test_downloads_count_towards_the_devices_requests(settings: LazySettings) -> None:
    settings.DEVICE_REQUESTS_PER_MINUTE = 2
    answers = [fetch() for _ in range(3)]
    assert [each.status for each in answers] == [200, 200, 429]
    assert int(answers[-1].headers["Retry-After"]) > 0


@pytest.mark.parametrize("digest", ["%00", f"%00{DIGEST[3:]}", f"{DIGEST}%0A"])
def test_the_database_is_not_asked_about_what_cannot_be_a_digest(digest: str) -> None:
    with CaptureQueriesContext(connection) as queries:
        assert fetch(url=f"/artifacts/sha256/{digest}").status == 404
    assert not [each for each in queries if "catalogue_artifact" in each["sql"]]


def test_other_methods_are_not_allowed() -> None:
    answer = fetch("put")
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")


def test_a_file_that_is_kept_in_pieces_comes_whole_or_in_ranges_and_no_piece_by_itself() -> None:
    content = b"head" + CONTENT + b"tail"
    digest = artifacts.store(io.BytesIO(content), now=NOW, weights=[(4, 4 + SIZE)]).digest
    make_variant(Application.objects.get(), "in-pieces", digest=digest)
    url = f"/artifacts/sha256/{digest}"
    assert fetch(url=url).body == content
    part = fetch(url=url, Range=f"bytes=2-{SIZE + 5}")
    assert (part.status, part.body) == (206, content[2 : SIZE + 6])
    assert fetch(url=f"/artifacts/sha256/{Piece.objects.get(offset=0).stored_id}").status == 404


def test_a_device_can_ask_where_the_weights_of_a_variant_lie_and_what_they_are() -> None:
    content = b"head" + CONTENT + b"tail"
    digest = artifacts.store(io.BytesIO(content), now=NOW, weights=[(4, 4 + SIZE)]).digest
    make_variant(Application.objects.get(), "in-pieces", digest=digest)
    answer = fetch(url=f"/artifacts/sha256/{digest}/weights")
    assert json.loads(answer.body) == {"weights": [{"digest": DIGEST, "offset": 4, "size_bytes": SIZE}]}
    assert json.loads(fetch(url=f"{URL}/weights").body) == {"weights": []}
    data = artifacts.store(io.BytesIO(b"data"), now=NOW).digest
    assert fetch(url=f"/artifacts/sha256/{data}/weights").status == 404
    assert fetch(url=f"{URL}/weights", Authorization="").status == 401
    assert fetch("post", url=f"{URL}/weights").status == 405


def test_samples_are_for_the_device_that_was_asked_to_measure_and_only_while_it_is() -> None:
    samples = artifacts.store(io.BytesIO(b"samples"), now=NOW)
    url = f"/artifacts/sha256/{samples.digest}"
    assert fetch(url=url).status == 404
    job = ProfilingJob.objects.create(
        variant=Variant.objects.get(),
        device_class="tablet",
        isa="x86_64 avx2",
        device=Device.objects.get(),
        state="running",
        samples_digest=samples.digest,
        created_at=NOW,
    )
    assert fetch(url=url).body == b"samples"
    make_device("stranger")
    assert fetch(url=url, Authorization="Bearer credential-stranger").status == 404
    ProfilingJob.objects.filter(pk=job.pk).update(state="done")
    assert fetch(url=url).status == 404
