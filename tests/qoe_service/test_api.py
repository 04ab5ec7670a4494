from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.conf import LazySettings
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver

from qoe_service import errors, problems
from qoe_service.decisions.models import Feedback
from qoe_service.fleet.models import Device
from tests.builders import make_device
from tests.qoe_service import calls

pytestmark = pytest.mark.django_db
DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "http.md").read_text()
API_ROOT = "/api/"  # ninja's own, which answers 404


def routes(patterns: list[URLPattern | URLResolver], prefix: str = "/") -> Iterator[str]:
    """Every path of the service, with its parameters as {name}."""
    for pattern in patterns:
        path = prefix + re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", str(pattern.pattern))
        if isinstance(pattern, URLResolver):
            yield from routes(pattern.url_patterns, path)
        else:
            yield path


def test_every_route_is_documented() -> None:
    found = set(routes(get_resolver().url_patterns))
    assert "/api/v1/devices/{device_id}/check-in" in found
    assert len(found) > 10
    assert not [path for path in sorted(found - {API_ROOT}) if f" {path}`" not in DOCUMENT]


def test_no_route_is_documented_that_does_not_exist() -> None:
    named = set(re.findall(r"^\| `[A-Z]+ (/[^` ]*)`", DOCUMENT, flags=re.MULTILINE))
    assert not named - set(routes(get_resolver().url_patterns))


def test_every_error_code_is_documented_with_its_status() -> None:
    tree = [errors.ServiceError, *errors.ServiceError.__subclasses__()]
    codes = {(each.status, each.code) for each in tree} | {(n, code) for n, (code, _) in problems.GENERIC.items()}
    assert not [code for status, code in sorted(codes) if f"| {status} | `{code}` |" not in DOCUMENT]


def test_the_interactive_documentation_needs_no_other_host() -> None:
    page = Client().get("/api/docs").content.decode()
    links = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert len(links) >= 3
    assert all(link.startswith("/static/") for link in links)
    assert "//" not in re.sub(r"<!--.*?-->", "", page)
    for link in links:
        asset = Client().get(link)
        assert asset.status_code == 200
        asset.close()


def test_the_openapi_document_knows_the_wire_messages() -> None:
    document = Client().get("/api/openapi.json").json()
    assert {"CheckIn", "EnrolmentRequest", "FeedbackBatch", "SignedDesired"} <= set(document["components"]["schemas"])
    assert "/api/v1/devices/{device_id}/wake-up" in document["paths"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1,]", b"\xff\xfe", b"{'a': 1}", b'{"sent_at": tomorrow}', b"[" * 100_000, b"9" * 5000]
)
def test_malformed_json_is_refused(body: bytes) -> None:
    device = make_device()
    answer = calls.post(f"/api/v1/devices/{device.pk}/check-in", body)
    found = calls.problem(answer, status=400, code="invalid_input")
    assert found.fields[0].field == "body"


@pytest.mark.parametrize("body", [b"[]", b"7", b'"text"', b"null"])
def test_json_of_another_shape_is_refused(body: bytes) -> None:
    device = make_device()
    calls.problem(calls.post(f"/api/v1/devices/{device.pk}/check-in", body), status=400, code="invalid_input")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"sent_at": "2026-06-01T12:00:00Z", "telemetry": {"cpu_load_share": %s}}', "telemetry.cpu_load_share"),
        (
            '{"sent_at": "2026-06-01T12:00:00Z", "applications": [{"application": "a", "state": "idle",'
            ' "arrival_rate_rps": %s}]}',
            "applications.0.arrival_rate_rps",
        ),
    ],
)
def test_what_is_no_finite_number_is_refused_by_its_field(body: str, number: str, field: str) -> None:
    device = make_device()
    answer = calls.post(f"/api/v1/devices/{device.pk}/check-in", (body % number).encode())
    calls.problem(answer, status=400, code="invalid_input", field=field)
    assert Device.objects.get().telemetry == device.telemetry


@pytest.mark.parametrize("number", ["NaN", "-Infinity"])
def test_nan_is_refused_even_in_a_field_that_nobody_knows(number: str) -> None:
    device = make_device()
    body = f'{{"sent_at": "2026-06-01T12:00:00Z", "mood": [1, {{"level": {number}}}]}}'.encode()
    answer = calls.post(f"/api/v1/devices/{device.pk}/check-in", body)
    calls.problem(answer, status=400, code="invalid_input", field="mood.1.level")


def test_nan_in_feedback_is_refused_by_its_field() -> None:
    make_device()
    body = b'{"items": [{"id": "f1", "decision_id": "d1", "components": {"p95_ms": NaN}}]}'
    answer = calls.post("/api/v1/feedback/batch", body)
    calls.problem(answer, status=400, code="invalid_input", field="items.0.components.p95_ms")
    assert not Feedback.objects.exists()


def test_an_oversize_body_is_refused_and_says_when_to_come_again(settings: LazySettings) -> None:
    settings.DATA_UPLOAD_MAX_MEMORY_SIZE = settings.MAX_BODY_BYTES = 2048
    device = make_device()
    answer = calls.check_in(device, agent_version="x" * 3000)
    calls.problem(answer, status=413, code="too_large", field="body")
    assert int(answer["Retry-After"]) > 0


def test_unknown_routes_and_wrong_methods_answer_with_problems() -> None:
    make_device()
    calls.problem(calls.get("/api/v1/nowhere"), status=404, code="not_found")
    wrong = calls.get("/api/v1/devices/enrol")
    calls.problem(wrong, status=405, code="method_not_allowed")
    assert wrong["Allow"] == "POST"
    assert not calls.get("/nowhere")["Content-Type"].startswith("application/problem")


def test_a_refused_request_is_logged_once_with_its_trace(caplog: pytest.LogCaptureFixture) -> None:
    device = make_device()
    own = f"/api/v1/devices/{device.pk}"
    for status, path, body in (
        (400, f"{own}/check-in", b"{}"),
        (403, "/api/v1/devices/other/check-in", b'{"sent_at": "2026-06-01T12:00:00Z"}'),
        (404, "/api/v1/nowhere", b"{}"),
        (405, f"{own}/desired", b"{}"),
    ):
        caplog.clear()
        assert calls.post(path, body).status_code == status
        [line] = caplog.records
        assert f"status={status}" in line.getMessage()


def test_a_log_line_cannot_be_forged_by_a_path(caplog: pytest.LogCaptureFixture) -> None:
    calls.get("/api/v1/nowhere%0aCRITICAL%20all%20is%20lost")
    assert "\n" not in caplog.records[0].getMessage()


def test_a_trace_goes_from_the_request_to_the_answer_and_its_problem() -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    answer = calls.get("/api/v1/nowhere", traceparent=f"00-{trace_id}-b7ad6b7169203331-01")
    assert answer["X-Trace-Id"] == trace_id
    assert json.loads(answer.content)["trace_id"] == trace_id
    assert calls.get("/api/v1/nowhere", traceparent="nonsense")["X-Trace-Id"] != trace_id
