"""Every error that the service shows to a caller, as one tree; rendered once, as an RFC 9457 problem.

ServiceError
├── InvalidInput          400 invalid_input         a field is wrong; says which and what is allowed
├── NotAuthenticated      401 not_authenticated     no credential, or one that nobody issued
├── NotPermitted          403 not_permitted         a good credential for somebody else's things
├── NotFound              404 not_found
├── Conflict              409 conflict              the thing exists already, or changed meanwhile
├── TooLarge              413 too_large
├── RangeNotSatisfiable   416 range_not_satisfiable
├── TooManyRequests       429 too_many_requests     says when to come again
└── Unavailable           503 unavailable           a part the service needs is away for now
"""

from __future__ import annotations

from typing import ClassVar


class ServiceError(Exception):
    """Base of the tree. ``permanent``: the same request will fail again, so the caller should not retry."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"
    permanent: ClassVar[bool] = True

    def __init__(self, detail: str, *, field: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.field = field
        self.retry_after_s = retry_after_s


class InvalidInput(ServiceError):
    """A field is wrong."""

    status, code, title = 400, "invalid_input", "Invalid input"


class NotAuthenticated(ServiceError):
    """No credential, or one that nobody issued."""

    status, code, title = 401, "not_authenticated", "Not authenticated"


class NotPermitted(ServiceError):
    """A good credential for somebody else's things."""

    status, code, title = 403, "not_permitted", "Not permitted"


class NotFound(ServiceError):
    """No such thing."""

    status, code, title = 404, "not_found", "Not found"


class Conflict(ServiceError):
    """The thing exists already, or changed meanwhile."""

    status, code, title = 409, "conflict", "Conflict"


class TooLarge(ServiceError):
    """The body exceeds what this endpoint takes."""

    status, code, title = 413, "too_large", "Too large"


class RangeNotSatisfiable(ServiceError):
    """The Range asked for lies outside the artifact."""

    status, code, title = 416, "range_not_satisfiable", "Range not satisfiable"


class TooManyRequests(ServiceError):
    """A rate or a quota is used up; come again after ``retry_after_s``."""

    status, code, title = 429, "too_many_requests", "Too many requests"
    permanent = False


class Unavailable(ServiceError):
    """A part the service needs is away for now."""

    status, code, title = 503, "unavailable", "Unavailable"
    permanent = False
