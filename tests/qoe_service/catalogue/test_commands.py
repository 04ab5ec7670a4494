from __future__ import annotations

import json
import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command

from qoe_service.catalogue import tasks
from qoe_service.catalogue.models import Application, Job, Variant
from qoe_service.celery import app
from tests.qoe_service.catalogue.test_applications import record
from tests.qoe_service.catalogue.tiny_models import conv_model, dense_model, write_data, write_model

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("quick_profiler")]


@pytest.fixture
def eager() -> Iterator[None]:
    """Tasks run where they are called."""
    app.conf.task_always_eager = app.conf.task_eager_propagates = True
    yield
    app.conf.task_always_eager = app.conf.task_eager_propagates = False


def command(name: str, *arguments: object) -> str:
    out = StringIO()
    call_command(name, *map(str, arguments), stdout=out)
    return out.getvalue()


def define(tmp_path: Path) -> None:
    (tmp_path / "digits.json").write_text(json.dumps(record()))
    command("create_application", tmp_path / "digits.json", "--data", write_data(tmp_path / "data.npz"))


def test_an_application_its_model_and_its_variants_come_from_two_commands(tmp_path: Path) -> None:
    define(tmp_path)
    path = write_model(tmp_path / "dense.onnx", dense_model())
    passes = "--passes=static-int8, dynamic-int8"
    said = command("import_model", "digits", path, "--name", "digits-small", passes, "--wait")
    assert sorted(Variant.objects.values_list("name", flat=True)) == [
        *("digits-small", "digits-small-dynamic-int8", "digits-small-static-int8")
    ]
    assert [line.split()[0] for line in said.splitlines()] == [
        *("digits-small", "digits-small-static-int8", "digits-small-dynamic-int8")
    ]
    assert all(
        re.search(r"accuracy (1\.0000|0\.9\d+) \(top-1, 0\.9\d+ to (1|0)\.\d+, 200 samples\)$", line)
        for line in said.splitlines()
    )
    assert Application.objects.get().baseline_digest == Variant.objects.get(name="digits-small").artifact_id


def test_workers_run_all_queued_jobs_one_after_the_other(tmp_path: Path, eager: None) -> None:
    define(tmp_path)
    path = write_model(tmp_path / "conv.onnx", conv_model())
    command("import_model", "digits", path, "--passes", "dynamic-int8,static-int8")
    assert list(Job.objects.values_list("compression_pass", "state")) == [
        ("dynamic-int8", "refused"),
        ("static-int8", "done"),
    ]
    tasks.run_queued()
    assert set(Job.objects.values_list("attempts", flat=True)) == {1}


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "digits"}'])
def test_a_bad_definition_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(CommandError):
        command("create_application", path)
    assert not Application.objects.exists()


def test_a_bad_model_ends_the_command_with_the_reason(tmp_path: Path) -> None:
    define(tmp_path)
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"nonsense")
    with pytest.raises(CommandError, match=r"file: bad\.onnx is refused: it is not an ONNX file"):
        command("import_model", "digits", path)
    with pytest.raises(CommandError, match="no application"):
        command("import_model", "nothing", path)


def test_jobs_are_listed_with_their_reasons_stopped_and_started_over(tmp_path: Path) -> None:
    define(tmp_path)
    path = write_model(tmp_path / "conv.onnx", conv_model())
    command("import_model", "digits", path, "--passes", "dynamic-int8,float16")
    first, second = Job.objects.order_by("pk")
    assert f"{second.pk} cancelled      float16 of conv" in command("jobs", "digits", "--cancel", second.pk)
    again = command("jobs", "digits", "--again", second.pk)
    assert "queued      float16 of conv" in again
    Job.objects.filter(pk=first.pk).update(state="refused", error="no dense layer")
    Job.objects.exclude(pk=first.pk).update(state="cancelled")
    assert f"{first.pk} refused      dynamic-int8 of conv: no dense layer" in command("jobs", "digits", "--follow")
    with pytest.raises(CommandError, match=f"job {first.pk} has ended already"):
        command("jobs", "digits", "--cancel", first.pk)


class Terminal(StringIO):
    """Somebody looks."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_progress_is_told_all_along(tmp_path: Path) -> None:
    define(tmp_path)
    path, out = write_model(tmp_path / "dense.onnx", dense_model()), Terminal()
    call_command("import_model", "digits", str(path), "--passes", "static-int8", "--wait", stdout=out)
    assert "% checked and measured" in out.getvalue()
