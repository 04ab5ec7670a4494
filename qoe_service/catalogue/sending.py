"""Sends files to a service elsewhere as an operator: in parts, on from where a break was, followed to the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from qoe_service.catalogue import artifacts
from qoe_service.errors import InvalidInput, NotAuthenticated, Unavailable

ATTEMPTS, FIRST_PAUSE_S, LONGEST_PAUSE_S, POLL_S = 8, 0.5, 30.0, 1.0
UNDER_WAY = ("queued", "running")
Report = Callable[[Mapping[str, Any]], None]


class Sender:
    """One operator's session with one service. ``pause`` waits for so many seconds."""

    def __init__(self, http: httpx.Client, *, pause: Callable[[float], None] = time.sleep) -> None:
        self._http = http
        self._pause = pause

    def log_in(self, name: str, password: str) -> None:
        """Begin the session. Raises NotAuthenticated."""
        self._http.get("/login/").raise_for_status()
        form = {"username": name, "password": password, "csrfmiddlewaretoken": self._http.cookies["csrftoken"]}
        answer = self._http.post("/login/", data=form, headers={"Referer": f"{self._http.base_url}login/"})
        if not answer.is_redirect:
            raise NotAuthenticated("name and password do not match", field="user")
        self._http.headers["X-CSRFToken"] = self._http.cookies["csrftoken"]
        self._http.headers["Referer"] = str(self._http.base_url)

    def send(self, *, application: str, path: Path, options: Mapping[str, Any], report: Report) -> dict[str, Any]:
        """Send a file, from where an earlier attempt stopped, and follow it to its end. Raises ServiceError."""
        uploads = f"/api/v1/applications/{application}/uploads"
        digest, size_bytes = artifacts.digest_of(path), path.stat().st_size
        same = {"state": "receiving", "sha256": digest, "size_bytes": size_bytes, "file_name": path.name}
        found = [each for each in self._ask("GET", uploads) if same.items() <= each.items()]
        announced = {"file_name": path.name, "size_bytes": size_bytes, "sha256": digest, "options": dict(options)}
        upload: dict[str, Any] = found[0] if found else self._ask("POST", uploads, json=announced)
        while upload["state"] == "receiving":
            report(upload)
            upload = self._send_part(path, upload)
        while upload["state"] in UNDER_WAY:
            report(upload)
            self._pause(POLL_S)
            upload = self._ask("GET", f"/api/v1/uploads/{upload['id']}")
        report(upload)
        return upload

    def _send_part(self, path: Path, upload: dict[str, Any]) -> dict[str, Any]:
        url, first = f"/api/v1/uploads/{upload['id']}", upload["received_bytes"]
        with path.open("rb") as file:
            file.seek(first)
            part = file.read(upload["part_bytes"])
        headers = {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{upload['size_bytes']}"}
        answer = self._ask("PUT", url, content=part, headers=headers)
        found: dict[str, Any] = self._ask("GET", url) if answer is None else answer
        return found

    def _ask(self, method: str, url: str, **content: Any) -> Any:
        """The answer, asked for again while the service is away; None where another offset is wanted."""
        wait_s = FIRST_PAUSE_S
        for attempt in range(ATTEMPTS):
            try:
                answer = self._http.request(method, url, **content)
            except httpx.TransportError:
                answer = None
            if answer is not None and answer.status_code < 500:
                return _read(answer, method)
            if attempt < ATTEMPTS - 1:
                self._pause(wait_s)
                wait_s = min(wait_s * 2, LONGEST_PAUSE_S)
        raise Unavailable(f"{self._http.base_url} does not answer")


def _read(answer: httpx.Response, method: str) -> Any:
    if answer.is_success:
        return answer.json()
    if answer.status_code == 409 and method == "PUT":
        return None
    problem = answer.json() if "json" in answer.headers.get("Content-Type", "") else {}
    fields = problem.get("fields") or [{}]
    raise InvalidInput(problem.get("detail") or f"answered {answer.status_code}", field=fields[0].get("field"))
