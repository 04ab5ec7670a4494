"""Reads answers of the console as a person does."""

from __future__ import annotations

import html
import re
from typing import Protocol

from django.http.response import ResponseHeaders
from django.test import Client


class Answer(Protocol):
    """What a test client gives back."""

    content: bytes
    status_code: int
    headers: ResponseHeaders


def text_of(answer: Answer) -> str:
    """The words of a page in reading order, with single spaces; the answer must be a success."""
    assert answer.status_code == 200, answer.status_code
    body = re.sub(r"<(head|script|svg)\b.*?</\1>", " ", answer.content.decode(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body))).replace(" ,", ",").replace(" .", ".")


def fragment(client: Client, path: str, etag: str | None = None) -> Answer:
    """What htmx gets when it asks for the live part of a page."""
    headers = {"HX-Request": "true"} | ({"If-None-Match": etag} if etag else {})
    return client.get(path, headers=headers)
