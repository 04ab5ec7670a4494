"""Speaks to the API as devices and apps do, in process."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from django.test import Client

from device_agents.wire import Problem
from qoe_service.fleet.models import Device
from tests.builders import CREDENTIAL, NOW

if TYPE_CHECKING:
    from django.test.client import _MonkeyPatchedWSGIResponse

    Answer = _MonkeyPatchedWSGIResponse


def post(path: str, body: Any, *, credential: str | None = CREDENTIAL, **headers: str) -> Answer:
    """POST a value as JSON, or bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Client(raise_request_exception=False).post(
        path, data, content_type="application/json", headers=_headers(credential, headers)
    )


def get(path: str, *, credential: str | None = CREDENTIAL, **headers: str) -> Answer:
    """GET with a credential."""
    return Client(raise_request_exception=False).get(path, headers=_headers(credential, headers))


def check_in(device: Device, *, credential: str = CREDENTIAL, **fields: object) -> Answer:
    """A check-in with the given fields."""
    body = {"sent_at": NOW.isoformat(), **fields}
    return post(f"/api/v1/devices/{device.pk}/check-in", body, credential=credential)


def problem(response: Answer, *, status: int, code: str, field: str | None = None) -> Problem:
    """The Problem of a refused request, which must be of this kind and name this field."""
    assert response.status_code == status, response.content
    assert response["Content-Type"] == "application/problem+json"
    found = Problem.model_validate_json(response.content)
    assert (found.status, found.code) == (status, code)
    if field is not None:
        assert field in [each.field for each in found.fields], found
    return found


def _headers(credential: str | None, headers: dict[str, str]) -> dict[str, str]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return named if credential is None else {"Authorization": f"Bearer {credential}", **named}
