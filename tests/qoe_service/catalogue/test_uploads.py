"""Files come in by parts over HTTP, are resumed, checked and taken in; and what is wrong is told before or after."""

from __future__ import annotations

import hashlib
import itertools
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.utils import timezone

from qoe_service.catalogue import artifacts, uploads
from qoe_service.catalogue.models import Application, Job, Upload, Variant
from qoe_service.errors import Conflict
from tests.builders import NOW, make_application, make_application_key, make_variant
from tests.qoe_service.catalogue.tiny_models import dense_model, pictures, write_data

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("quick_profiler")]
URL = "/api/v1/applications/quarters/uploads"


@pytest.fixture
def application(tmp_path: Path) -> Application:
    return make_application("quarters", dataset=artifacts.store(write_data(tmp_path / "data.npz"), now=NOW))


@pytest.fixture
def operator() -> Client:
    client = Client()
    client.force_login(User.objects.create_superuser("ada"))
    return client


def begin(client: Client, content: bytes, file_name: str = "dense.onnx", **options: Any) -> dict[str, Any]:
    body = {"file_name": file_name, "size_bytes": len(content), "options": options}
    body["sha256"] = hashlib.sha256(content).hexdigest()
    answer = client.post(URL, body, content_type="application/json")
    assert answer.status_code == 201, answer.content
    found: dict[str, Any] = answer.json()
    return found


def put(client: Client, upload: dict[str, Any], content: bytes, first: int, size: int) -> Any:
    part = content[first : first + size]
    headers = {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(content)}"}
    return client.put(f"/api/v1/uploads/{upload['id']}", part, content_type="application/octet-stream", headers=headers)


def send(client: Client, content: bytes, file_name: str = "dense.onnx", **options: Any) -> Upload:
    """The whole file in three parts, then taken in."""
    upload = begin(client, content, file_name, **options)
    size = len(content) // 3 + 1
    for first in range(0, len(content), size):
        assert put(client, upload, content, first, size).status_code == 200
    taken = uploads.run(upload_id=upload["id"], clock=timezone.now)
    assert taken is not None
    return taken


def dense() -> bytes:
    return bytes(dense_model().SerializeToString())


def test_a_model_sent_in_parts_becomes_a_variant_with_its_passes_queued(
    operator: Client, application: Application
) -> None:
    upload = send(operator, dense(), passes=["dynamic-int8"], precision="fp32")
    assert (upload.state, upload.error) == ("done", "")
    variant = Variant.objects.get()
    assert (variant.name, variant.accuracy, upload.result) == ("dense", 1.0, variant)
    assert list(Job.objects.values_list("compression_pass", "state")) == [("dynamic-int8", "queued")]
    assert not upload.parts.exists()
    assert not list(Path(artifacts.incoming_folder()).iterdir())
    shown = operator.get(URL).json()
    assert [(each["state"], each["variant"], each["part_bytes"]) for each in shown] == [("done", "dense", 1_048_576)]


def test_a_broken_off_upload_goes_on_where_it_stopped(operator: Client, application: Application) -> None:
    content = dense()
    upload = begin(operator, content)
    assert put(operator, upload, content, 0, 100).json()["received_bytes"] == 100
    again = put(operator, upload, content, 0, 100)
    assert (again.status_code, again.json()["detail"]) == (409, "the next part begins at 100")
    stands = operator.get(f"/api/v1/uploads/{upload['id']}").json()
    assert (stands["received_bytes"], stands["state"]) == (100, "receiving")
    assert put(operator, upload, content, 100, len(content)).json()["state"] == "queued"
    assert put(operator, upload, content, 100, 5).status_code == 409
    uploads.run(upload_id=upload["id"], clock=timezone.now)
    with artifacts.open_for_reading(Variant.objects.get().artifact_id) as file:
        assert file.read() == content


def test_of_two_senders_of_one_part_the_second_is_told_to_look(application: Application) -> None:
    fields: dict[str, Any] = {"file_name": "a.onnx", "size_bytes": 10, "options": {}}
    upload = uploads.begin(application=application, now=NOW, **fields)
    uploads.append(upload=upload, offset=0, total_bytes=10, part=b"12345", now=NOW)
    with pytest.raises(Conflict, match="another part came first"):
        uploads.append(upload=upload, offset=0, total_bytes=10, part=b"abcde", now=NOW)
    assert Upload.objects.get().received_bytes == 5


@pytest.mark.parametrize(
    ("header", "size"),
    [("bytes 0-9/100", 5), ("bytes 5-1/100", 5), ("0-4/100", 5), ("bytes 0-4/*", 5), ("bytes 0-4/99", 5)],
)
def test_a_part_that_is_not_what_its_header_says_is_refused(
    operator: Client, application: Application, header: str, size: int
) -> None:
    upload = begin(operator, bytes(100))
    answer = operator.put(
        f"/api/v1/uploads/{upload['id']}",
        bytes(size),
        content_type="application/octet-stream",
        headers={"Content-Range": header},
    )
    assert (answer.status_code, answer.json()["fields"][0]["field"]) == (400, "Content-Range")
    assert Upload.objects.get().received_bytes == 0


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"file_name": "model.exe"}, 400, "file_name"),
        ({"size_bytes": 0}, 400, "size_bytes"),
        ({"size_bytes": 2**31}, 413, "file"),
        ({"file_name": "d.npz", "size_bytes": 2**31}, 413, "size_bytes"),
        ({"options": {"passes": ["magic"]}}, 400, "passes"),
        ({"options": {"base": "nobody"}}, 404, "base"),
        ({"options": {"name": "no spaces"}}, 400, "name"),
        ({"options": {"colour": "red"}}, 400, "options.colour"),
        ({"options": {"precision": "FP 32"}}, 400, "precision"),
        ({"sha256": "abc"}, 400, "sha256"),
    ],
)
def test_what_would_be_refused_is_refused_before_a_byte_is_sent(
    operator: Client, application: Application, body: dict[str, Any], status: int, field: str
) -> None:
    answer = operator.post(URL, {"file_name": "m.onnx", "size_bytes": 10, **body}, content_type="application/json")
    assert (answer.status_code, answer.json()["fields"][0]["field"]) == (status, field)
    assert not Upload.objects.exists()


def test_uploads_are_for_operators(application: Application) -> None:
    make_application_key("quarters")
    by_key = {"Authorization": f"Bearer {'k' * 43}"}
    for headers in ({}, by_key):
        answer = Client(headers=headers).post(URL, {"file_name": "m.onnx", "size_bytes": 1}, "application/json")
        assert answer.status_code == 401
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(User.objects.create_superuser("bob"))
    assert strict.post(URL, {"file_name": "m.onnx", "size_bytes": 1}, "application/json").status_code == 403


def test_a_damaged_file_is_refused_and_its_parts_go(operator: Client, application: Application) -> None:
    content = dense()
    upload = begin(operator, content)
    put(operator, upload, content[:-1] + b"x", 0, len(content))
    ended = uploads.run(upload_id=upload["id"], clock=timezone.now)
    assert ended is not None
    assert (ended.state, ended.parts.count()) == ("refused", 0)
    assert "arrived damaged" in ended.error


def test_a_bad_model_is_refused_with_the_reason(operator: Client, application: Application) -> None:
    upload = send(operator, b"nonsense")
    assert (upload.state, upload.error) == (
        "refused",
        "dense.onnx is refused: it is not an ONNX file, or it is truncated",
    )


def test_a_cancelled_upload_takes_nothing_more_and_is_not_imported(operator: Client, application: Application) -> None:
    content = dense()
    upload = begin(operator, content)
    put(operator, upload, content, 0, 100)
    assert operator.delete(f"/api/v1/uploads/{upload['id']}").json()["state"] == "cancelled"
    assert operator.delete(f"/api/v1/uploads/{upload['id']}").status_code == 409
    assert put(operator, upload, content, 100, 100).status_code == 409
    assert uploads.run(upload_id=upload["id"], clock=timezone.now) is None
    assert uploads.runnable(now=timezone.now()) == []
    assert not Upload.objects.get().parts.exists()


def test_cancelling_while_it_is_taken_in_stops_the_import(operator: Client, application: Application) -> None:
    content = dense()
    upload = begin(operator, content)
    put(operator, upload, content, 0, len(content))
    ticks = itertools.count()

    def clock() -> Any:
        if next(ticks) == 2:
            uploads.cancel(upload_id=upload["id"], now=timezone.now())
        return timezone.now()

    ended = uploads.run(upload_id=upload["id"], clock=clock)
    assert ended is not None
    assert (ended.state, Variant.objects.count()) == ("cancelled", 0)


def test_an_import_whose_worker_died_is_taken_over(operator: Client, application: Application) -> None:
    upload = begin(operator, dense())
    put(operator, upload, dense(), 0, len(dense()))
    minute_ago = timezone.now() - timedelta(minutes=1)
    Upload.objects.update(state="running", attempts=1, heartbeat_at=minute_ago)
    assert uploads.runnable(now=timezone.now()) == [upload["id"]]
    Upload.objects.update(attempts=3)
    assert uploads.runnable(now=timezone.now()) == []
    assert Upload.objects.get().state == "failed"


def test_what_nobody_continues_ends_by_itself(operator: Client, application: Application) -> None:
    upload = begin(operator, dense())
    put(operator, upload, dense(), 0, 100)
    uploads.runnable(now=timezone.now() + timedelta(days=2))
    row = Upload.objects.get()
    assert (row.state, row.error, row.parts.count()) == ("cancelled", "nobody sent the rest in time", 0)


def test_open_uploads_of_an_application_are_bounded(operator: Client, application: Application) -> None:
    for _ in range(uploads.OPEN_AT_ONCE):
        begin(operator, b"x")
    answer = operator.post(URL, {"file_name": "m.onnx", "size_bytes": 10}, content_type="application/json")
    assert answer.status_code == 409


def test_a_student_trained_elsewhere_is_a_variant_of_the_same_application(
    operator: Client, application: Application
) -> None:
    teacher = make_variant(application, "teacher")
    send(operator, dense(), "student.onnx", base="teacher")
    student = Variant.objects.get(name="student")
    assert (student.base, student.compression_pass, student.accuracy) == (teacher, "", 1.0)


def npz(path: Path, **arrays: Any) -> bytes:
    np.savez(path, **arrays)
    return path.read_bytes()


def test_data_with_its_labels_named_is_split_into_calibration_and_held_out(
    operator: Client, application: Application, tmp_path: Path
) -> None:
    variant = make_variant(application, "old")
    inputs, labels = pictures(120, seed=5)
    content = npz(tmp_path / "all.npz", pixels=inputs, quarter=labels, ids=np.arange(120))
    refused = send(operator, content, "all.npz", labels_key="quarter")
    assert "which of ids, pixels, quarter are the inputs is not clear" in refused.error
    assert send(operator, content, "all.npz", labels_key="quarter", inputs_key="pixels").state == "done"
    application.refresh_from_db()
    with artifacts.open_for_reading(str(application.dataset_id)) as file:
        data = dict(np.load(file))
    assert {name: len(array) for name, array in data.items()} == {
        "calibration_inputs": 30,
        "heldout_inputs": 90,
        "heldout_labels": 90,
    }
    rows = {row.tobytes(): label for row, label in zip(inputs, labels, strict=True)}
    assert all(
        rows[row.tobytes()] == label for row, label in zip(data["heldout_inputs"], data["heldout_labels"], strict=True)
    )
    again = Job.objects.get(base=variant)
    assert (again.compression_pass, again.parameters) == ("accuracy", {"dataset": application.dataset_id})


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"x": np.zeros((4, 2)), "y": np.zeros(3)}, "y has 3 rows and x 4"),
        ({"x": np.zeros((4, 2)), "z": np.zeros(4)}, "no array named y"),
        ({"x": np.zeros(4), "y": np.zeros(4)}, "shaped [4]"),
        ({"x": np.array([{"a": 1}], dtype=object), "y": np.zeros(1)}, "pickle"),
    ],
)
def test_data_that_cannot_be_split_is_refused(
    operator: Client, application: Application, tmp_path: Path, given: Any, reason: str
) -> None:
    upload = send(operator, npz(tmp_path / "d.npz", **given), "d.npz", labels_key="y")
    assert upload.state == "refused"
    assert reason in upload.error


def test_jobs_are_cancelled_and_run_again_over_http(operator: Client, application: Application, tmp_path: Path) -> None:
    variant = make_variant(application, "base")
    asked = operator.post(
        "/api/v1/applications/quarters/variants/base/passes",
        {"passes": ["dynamic-int8+static-int8", "dynamic-int8"]},
        content_type="application/json",
    )
    assert [(each["compression_pass"], each["after"] is None) for each in asked.json()] == [
        ("static-int8", False),
        ("dynamic-int8", True),
    ]
    first = Job.objects.get(compression_pass="dynamic-int8")
    assert operator.post(f"/api/v1/jobs/{first.pk}/cancel").json()["state"] == "cancelled"
    assert operator.post(f"/api/v1/jobs/{first.pk}/cancel").status_code == 409
    follower = Job.objects.get(compression_pass="static-int8")
    assert (follower.state, follower.error) == ("cancelled", "the pass before it was cancelled")
    again = operator.post(f"/api/v1/jobs/{follower.pk}/run-again").json()
    assert (again["state"], again["compression_pass"], again["base"]) == ("queued", "static-int8", "base")
    states = operator.get("/api/v1/applications/quarters/jobs").json()
    assert [(each["compression_pass"], each["state"]) for each in states] == [
        ("static-int8", "queued"),
        ("dynamic-int8", "queued"),
    ]
    assert operator.post(f"/api/v1/jobs/{again['id']}/run-again").status_code == 409
    assert variant.jobs.count() == 2


def test_variants_are_retired_and_restored_over_http_but_never_the_baseline(
    operator: Client, application: Application
) -> None:
    make_variant(application, "kept")
    safe = make_variant(application, "safe")
    Application.objects.update(baseline_digest=safe.artifact_id)
    path = "/api/v1/applications/quarters/variants"
    assert operator.post(f"{path}/kept/retire").status_code == 204
    assert Variant.objects.get(name="kept").retired_at is not None
    assert operator.post(f"{path}/kept/restore").status_code == 204
    assert Variant.objects.get(name="kept").retired_at is None
    assert operator.post(f"{path}/safe/retire").status_code == 409
    assert operator.post(f"{path}/nobody/retire").status_code == 404


def test_passes_are_listed_with_their_parameters(operator: Client) -> None:
    found = operator.get("/api/v1/passes").json()
    by_name = {each["name"]: each for each in found["passes"]}
    assert by_name["static-int8"]["parameters"]["per_channel"] is True
    assert found["whole_family"] == "family"


def test_two_models_under_one_name_are_told_apart(operator: Client, application: Application) -> None:
    make_variant(application, "dense")
    assert send(operator, dense()).error == "another model is there already as 'dense'"
