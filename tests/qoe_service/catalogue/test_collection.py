"""Garbage is collected, and nothing that anybody still refers to."""

from __future__ import annotations

import io
from datetime import timedelta
from pathlib import Path

import pytest
from django.core.management import call_command
from django.utils import timezone

from qoe_service.catalogue import artifacts, collection, storages, uploads
from qoe_service.catalogue.models import Artifact
from qoe_service.decisions.models import Ban
from tests import builders
from tests.builders import make_application, make_assignment, make_decision, make_device, make_variant

pytestmark = pytest.mark.django_db
LATER = timedelta(days=2)


def store(content: bytes) -> str:
    return artifacts.store(io.BytesIO(content), now=timezone.now()).digest


def collected(*, is_dry_run: bool = False, after: timedelta = LATER) -> list[str]:
    found = collection.collect(now=timezone.now() + after, is_dry_run=is_dry_run)
    return [each.name.rpartition("/")[2] for each in found]


def test_what_nothing_names_goes_after_a_day_and_a_dry_run_only_says_so() -> None:
    digest = store(b"left over")
    assert collected(after=timedelta(hours=1)) == []
    assert collected(is_dry_run=True) == [digest]
    assert Artifact.objects.filter(pk=digest).exists()
    out = io.StringIO()
    call_command("collect_artifacts", "--dry-run", stdout=out)
    assert out.getvalue() == "would free 0 bytes in 0 files\n"
    assert collected() == [digest]
    assert not Artifact.objects.filter(pk=digest).exists()
    assert storages.size(artifacts.name_of(digest)) is None
    assert collected() == []


def test_bytes_handed_in_again_are_young_again() -> None:
    digest = store(b"twice")
    Artifact.objects.update(created_at=builders.NOW, stored_at=builders.NOW)
    store(b"twice")
    assert collected(after=timedelta(hours=1)) == []
    assert storages.size(artifacts.name_of(digest)) == 5


def test_nothing_goes_that_a_row_of_any_app_names() -> None:
    digests = [store(str(number).encode()) for number in range(7)]
    of_data, of_variant, decided, running, fallback, cached, banned = digests
    application = make_application(dataset_id=of_data)
    device = make_device()
    variant = make_variant(application, digest=of_variant)
    decision = make_decision(device, application, variant)
    type(decision).objects.update(variant_digest=decided)
    make_assignment(device, application, reported_digest=running, last_good_digest=fallback, cached_digests=[cached])
    Ban.objects.create(application=application, variant_digest=banned, reason="slow", created_at=timezone.now())
    assert collected() == []
    assert Artifact.objects.filter(pk__in=digests).count() == 7


def test_a_running_upload_keeps_its_parts_and_an_ended_one_does_not() -> None:
    application = make_application()
    now = timezone.now()
    upload = uploads.begin(application=application, file_name="a.onnx", size_bytes=9, options={}, now=now)
    uploads.append(upload=upload, offset=0, total_bytes=9, part=b"123", now=now)
    assert collected() == []
    type(upload).objects.update(state="failed")
    assert len(collected()) == 1
    assert not upload.parts.exists()


def test_files_of_killed_workers_go_too(artifact_folder: Path) -> None:
    orphan = artifact_folder / "sha256" / "ab" / ("ab" * 32)
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"half a thought")
    (artifact_folder / "sha256" / "ab" / "notes.txt").write_text("somebody else's")
    assert collected() == ["ab" * 32]
    assert [path.name for path in artifact_folder.rglob("*") if path.is_file()] == ["notes.txt"]
