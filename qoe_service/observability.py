"""Trace ids from request to log line, and the Prometheus metrics that this process counts itself.

Metrics that follow from rows are in gauges.py: they are the same in every process.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from threading import Lock

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.http import HttpRequest, HttpResponseBase
from prometheus_client import CollectorRegistry, Gauge, Histogram

_TRACEPARENT = re.compile(r"^00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}$")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_current: ContextVar[str] = ContextVar("trace_id", default="-")

# -- metrics ---------------------------------------------------------------------------------------------------------

REGISTRY = CollectorRegistry()
REQUEST_SECONDS = Histogram(
    "qoe_http_request_seconds",
    "Time from request to the head of the answer, in this process",
    labelnames=("route", "method", "status"),
    registry=REGISTRY,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
)
WAKE_UP_CLIENTS = Gauge("qoe_wake_up_clients", "Devices that listen for wake-ups at this process", registry=REGISTRY)

RANKING_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, float("inf"))
_rankings: list[float] = []
_rankings_lock = Lock()


def observe_ranking(seconds: float) -> None:
    """Count one ranking. Workers rank and serve no metrics, so ``rollouts`` writes these to the database."""
    with _rankings_lock:
        _rankings.append(seconds)


def take_rankings() -> list[float]:
    """The rankings observed in this process since the last call."""
    with _rankings_lock:
        taken = list(_rankings)
        _rankings.clear()
    return taken


def _observe_request(request: HttpRequest, response: HttpResponseBase, started: float) -> None:
    match = request.resolver_match
    REQUEST_SECONDS.labels(
        route=match.route if match else "unmatched",
        method=request.method if request.method in _METHODS else "other",
        status=f"{response.status_code // 100}xx",
    ).observe(time.perf_counter() - started)


# -- traces ----------------------------------------------------------------------------------------------------------


def new_trace_id() -> str:
    """A random W3C trace id: 32 hex digits."""
    return secrets.token_hex(16)


def current_trace_id() -> str:
    """The trace id of the request or task at hand, ``-`` outside of one."""
    return _current.get()


def adopt_trace_id(trace_id: str) -> None:
    """Continue a trace that began elsewhere, for example in a task."""
    _current.set(trace_id)


class TraceFilter(logging.Filter):
    """Gives every log record the trace id."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.trace_id = _current.get()
        return True


class TraceMiddleware:
    """Reads or makes the trace id of a request, names it in the answer, and times the request."""

    sync_capable = async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase | Awaitable[HttpResponseBase]]) -> None:
        self.get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        match = _TRACEPARENT.match(request.headers.get("traceparent", ""))
        trace_id = match.group(1) if match else new_trace_id()
        if iscoroutinefunction(self.get_response):
            return self._answer_later(request, trace_id)
        started = time.perf_counter()
        adopt_trace_id(trace_id)
        response = self.get_response(request)
        assert isinstance(response, HttpResponseBase)
        return _finish(request, response, trace_id, started)

    async def _answer_later(self, request: HttpRequest, trace_id: str) -> HttpResponseBase:
        started = time.perf_counter()
        adopt_trace_id(trace_id)
        answer = self.get_response(request)
        assert not isinstance(answer, HttpResponseBase)
        return _finish(request, await answer, trace_id, started)


def _finish(request: HttpRequest, response: HttpResponseBase, trace_id: str, started: float) -> HttpResponseBase:
    response["X-Trace-Id"] = trace_id
    _observe_request(request, response, started)
    return response
