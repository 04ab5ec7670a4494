"""Artifacts in a bucket: a real HTTP server that speaks S3, stored into, ranged over, listed and cleaned up."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.models import User
from django.core.files.base import ContentFile
from django.test import AsyncClient
from django.utils import timezone
from moto.server import ThreadedMotoServer
from pytest_django import Settings

from qoe_service.catalogue import artifacts, collection, sandbox, storages, uploads
from qoe_service.catalogue.models import Artifact
from qoe_service.errors import NotFound, Unavailable
from tests.builders import make_application, make_variant

pytestmark = [
    pytest.mark.django_db,
    # botocore and the test server still use what newer Pythons advise against
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
CONTENT = bytes(range(256)) * 4096


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    running = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture(autouse=True)
def bucket(server: str, settings: Settings) -> None:
    settings.ARTIFACT_BUCKET = "models"
    settings.ARTIFACT_S3_ENDPOINT = server
    settings.ARTIFACT_S3_REGION = "us-east-1"
    settings.ARTIFACT_S3_ACCESS_KEY = settings.ARTIFACT_S3_SECRET_KEY = "any"
    connection().create_bucket(Bucket="models")


def connection() -> Any:
    """What S3 storage has and others have not."""
    return cast(Any, storages.storage()).connection


def test_bytes_are_kept_once_and_come_back() -> None:
    first = artifacts.store(io.BytesIO(CONTENT), now=timezone.now())
    assert first == artifacts.store(io.BytesIO(CONTENT), now=timezone.now())
    assert first.digest == hashlib.sha256(CONTENT).hexdigest()
    names = [each.name for each in storages.names("sha256")]
    assert names == [artifacts.name_of(first.digest)]
    with artifacts.open_for_reading(first.digest) as file:
        assert file.read() == CONTENT
    with sandbox.opened() as box:
        box.add("model.onnx", artifacts.open_for_reading(first.digest))
        assert (box.folder / "model.onnx").read_bytes() == CONTENT
    with pytest.raises(NotFound):
        artifacts.open_for_reading("0" * 64)


def test_downloads_fetch_only_the_range_that_is_asked_for() -> None:
    digest = artifacts.store(io.BytesIO(CONTENT), now=timezone.now()).digest
    make_variant(make_application(), digest=digest)
    user = User.objects.create(username="ada")
    asked: list[str] = []
    connection().meta.client.meta.events.register(
        "before-call.s3.GetObject", lambda params, **_: asked.append(params["headers"]["Range"])
    )

    async def download() -> tuple[int, bytes, str]:
        browser = AsyncClient()
        await browser.aforce_login(user)
        answer: Any = await browser.get(f"/artifacts/sha256/{digest}", headers={"Range": "bytes=100-299"})
        body = b"".join([part async for part in answer.streaming_content])
        return answer.status_code, body, answer["Content-Range"]

    assert async_to_sync(download)() == (206, CONTENT[100:300], f"bytes 100-299/{len(CONTENT)}")
    assert asked == ["bytes=100-299"]


def test_parts_of_uploads_and_garbage_live_there_too() -> None:
    application, now = make_application(), timezone.now()
    upload = uploads.begin(application=application, file_name="a.onnx", size_bytes=9, options={}, now=now)
    uploads.append(upload=upload, offset=0, total_bytes=9, part=b"123", now=now)
    digest = artifacts.store(io.BytesIO(b"left over"), now=now).digest
    uploads.cancel(upload_id=upload.pk, now=now)
    later = now + timedelta(days=2)
    for each in list(storages.names("sha256")):
        if each.name != artifacts.name_of(digest):
            storages.delete(each.name)
    assert len(collection.collect(now=later)) == 2
    assert not Artifact.objects.exists()
    assert list(storages.names("uploads")) == []
    assert storages.size(artifacts.name_of(digest)) is None


def test_a_storage_that_is_away_is_told_as_such(settings: Settings) -> None:
    settings.ARTIFACT_BUCKET = "nowhere"
    with pytest.raises(Unavailable, match="refuses"):
        storages.save("name", ContentFile(b"x"))
