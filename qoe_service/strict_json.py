"""JSON as RFC 8259 has it: no NaN or Infinity, which Python reads; and no NUL characters, which PostgreSQL refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from django.http import HttpRequest
from ninja.parser import Parser

from qoe_service.errors import InvalidInput


class _NotANumber:
    """Stands where the text had NaN, Infinity or -Infinity."""


class StrictParser(Parser):
    """Reads request bodies, and names the field that held something JSON has not."""

    def parse_body(self, request: HttpRequest) -> dict[str, Any]:
        body: dict[str, Any] = loads(request.body)  # ninja checks the shape next
        return body


def loads(body: bytes) -> Any:
    """The value of a JSON text. Raises InvalidInput."""
    strange: list[str] = []

    def constant(text: str) -> _NotANumber:
        strange.append(text)
        return _NotANumber()

    try:
        value = json.loads(body, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"the body is not JSON: {error}", field="body") from error
    if strange:
        raise InvalidInput(f"{strange[0]} is not a number in JSON", field=_path_of(value, _is_not_a_number))
    if b"\\u0000" in body or b"\0" in body:
        field = _path_of(value, _has_nul)
        if field:
            raise InvalidInput("must not contain the character U+0000", field=field)
    return value


def _is_not_a_number(value: object) -> bool:
    return isinstance(value, _NotANumber)


def _has_nul(value: object) -> bool:
    return isinstance(value, str) and "\0" in value


def _path_of(value: object, is_wanted: Callable[[object], bool]) -> str:
    return next((path or "body" for path, leaf in _leaves(value, "") if is_wanted(leaf)), "")


def _leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, item in value.items():
            name = f"{path}.{key}" if path else str(key)
            yield name, key
            yield from _leaves(item, name)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}.{index}" if path else str(index))
    else:
        yield path, value
