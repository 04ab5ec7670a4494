"""Where errors become Problem bodies (RFC 9457), whoever raised them: our code, ninja, pydantic or Django."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.conf import settings
from django.core.exceptions import RequestDataTooBig
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase
from django.utils.encoding import escape_uri_path
from ninja import NinjaAPI
from ninja.errors import HttpError, ValidationError

from device_agents.wire import FieldProblem, Problem
from qoe_service.errors import InvalidInput, NotAuthenticated, NotFound, NotPermitted, ServiceError, TooLarge
from qoe_service.observability import current_trace_id

logger = logging.getLogger(__name__)

CONTENT_TYPE = "application/problem+json"
TOO_LARGE_RETRY_AFTER_S = 3600
FIELDS_NAMED = 20
# Answers that Django or ninja give without an error of ours: status -> (code, title).
GENERIC = {
    400: ("bad_request", "Bad request"),
    401: (NotAuthenticated.code, NotAuthenticated.title),
    403: ("not_permitted", "Not permitted"),
    404: (NotFound.code, NotFound.title),
    405: ("method_not_allowed", "Method not allowed"),
    413: (TooLarge.code, TooLarge.title),
    500: (ServiceError.code, ServiceError.title),
}
_PROBLEM_PATHS = ("/api/", "/artifacts/")


def problem_of(error: ServiceError) -> Problem:
    """The body that says what this error says."""
    fields = (FieldProblem(field=error.field, detail=error.detail),) if error.field else ()
    return _problem(error.status, error.code, error.title, error.detail, fields)


def too_large(limit_bytes: int) -> TooLarge:
    """The error of a body above the limit."""
    return TooLarge(f"a body may have {limit_bytes} bytes", field="body", retry_after_s=TOO_LARGE_RETRY_AFTER_S)


def headers_of(error: ServiceError) -> dict[str, str]:
    """What the answer to this error says beside its body."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, NotAuthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def respond(request: HttpRequest, problem: Problem, headers: Mapping[str, str] | None = None) -> HttpResponse:
    """The answer, logged: the one place that logs refused requests."""
    level = logging.ERROR if problem.status >= 500 else logging.WARNING
    fields = ",".join(each.field for each in problem.fields)
    logger.log(
        level,
        "refused status=%d code=%s method=%s path=%s fields=%r detail=%r",
        problem.status,
        problem.code,
        request.method,
        escape_uri_path(request.path),
        fields,
        problem.detail,
    )
    return _response(problem, headers)


def register(api: NinjaAPI) -> None:
    """Make ``api`` answer every error with a Problem."""

    @api.exception_handler(ServiceError)
    def on_service_error(request: HttpRequest, error: ServiceError) -> HttpResponse:
        return respond(request, problem_of(error), headers_of(error))

    @api.exception_handler(ValidationError)
    def on_validation_error(request: HttpRequest, error: ValidationError) -> HttpResponse:
        return respond(request, _problem_of_validation(error.errors))

    @api.exception_handler(RequestDataTooBig)
    def on_too_big(request: HttpRequest, _: RequestDataTooBig) -> HttpResponse:
        return on_service_error(request, too_large(settings.MAX_BODY_BYTES))

    @api.exception_handler(Http404)
    def on_404(request: HttpRequest, _: Http404) -> HttpResponse:
        return on_service_error(request, NotFound("no such thing"))

    @api.exception_handler(HttpError)
    def on_http_error(request: HttpRequest, error: HttpError) -> HttpResponse:
        return on_service_error(request, _service_error_of(error))


def _service_error_of(error: HttpError) -> ServiceError:
    # ninja wraps whatever a parser raises.
    if isinstance(error.__cause__, ServiceError):
        return error.__cause__
    if error.status_code == NotAuthenticated.status:
        return NotAuthenticated("send the header Authorization: Bearer with a credential")
    if error.status_code == NotPermitted.status:
        return NotPermitted(str(error))
    return InvalidInput(str(error))


def _problem_of_validation(errors: Iterable[Mapping[str, Any]]) -> Problem:
    fields = tuple(FieldProblem(field=_field(each["loc"]), detail=str(each["msg"])) for each in errors)[:FIELDS_NAMED]
    detail = f"{fields[0].field}: {fields[0].detail}" if fields else ""
    return _problem(InvalidInput.status, InvalidInput.code, InvalidInput.title, detail, fields)


def _field(location: tuple[int | str, ...]) -> str:
    """The field as its sender knows it: without the source and the name of our function's argument."""
    skipped = 2 if location[0] == "body" else 1
    return ".".join(str(part) for part in location[skipped:]) or str(location[0])


def _problem(status: int, code: str, title: str, detail: str, fields: tuple[FieldProblem, ...] = ()) -> Problem:
    return Problem(
        title=title,
        status=status,
        code=code,
        detail=detail,
        fields=fields,
        trace_id=current_trace_id().strip("-") or None,
    )


def _response(problem: Problem, headers: Mapping[str, str] | None) -> HttpResponse:
    response = HttpResponse(problem.model_dump_json(), status=problem.status, content_type=CONTENT_TYPE)
    for name, value in (headers or {}).items():
        response[name] = value
    response._has_been_logged = True  # type: ignore[attr-defined]  # Django's own mark: no second line for it
    return response


class ProblemMiddleware:
    """Gives API paths a Problem body where Django answered by itself: unknown routes, wrong methods, crashes."""

    sync_capable = async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase | Awaitable[HttpResponseBase]]) -> None:
        self.get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        answer = self.get_response(request)
        return _as_problem(request, answer) if isinstance(answer, HttpResponseBase) else self._later(request, answer)

    async def _later(self, request: HttpRequest, answer: Awaitable[HttpResponseBase]) -> HttpResponseBase:
        return _as_problem(request, await answer)


def _as_problem(request: HttpRequest, response: HttpResponseBase) -> HttpResponseBase:
    is_ours = request.path.startswith(_PROBLEM_PATHS)
    if not is_ours or response.status_code < 400 or response.get("Content-Type", "").startswith(CONTENT_TYPE):
        return response
    code, title = GENERIC.get(response.status_code, GENERIC[400 if response.status_code < 500 else 500])
    problem = _problem(response.status_code, code, title, title)
    kept = {name: response[name] for name in ("Allow", "Retry-After", "Content-Range") if name in response}
    # Django logs a crash with its traceback where it catches it; one line is enough.
    is_logged = getattr(response, "_has_been_logged", False)
    return _response(problem, kept) if is_logged else respond(request, problem, kept)
