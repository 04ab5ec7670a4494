"""Folds all feedback of one lease into one measurement. Pure: rows in, a selector value out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from device_agents.wire import Components
from qoe_service.decisions.models import Feedback
from selector.interactions import Measurement

DEVICE, APP = "device", "app"
_WEIGHTED = ("p50_ms", "p95_ms", "slo_hit_share", "cpu_ms_per_request", "service_ms", "batch_mean")


def fold(rows: Sequence[Feedback], *, download_bytes: int = 0, failed: bool = False) -> Measurement:
    """One measurement from the reports that came in time.

    What the device measured stands in the report that closes its lease, weighted by requests if there are several. All
    else that comes with the device's credential was said by apps on it. Ratings are averaged, whoever passed them on.
    Accuracy is evidence that apps may have too. What nobody measured stays None: a rating of 0 is a rating, no rating
    is none.
    """
    counted = [row for row in rows if not row.is_late]
    reports = [row for row in counted if row.components is not None]
    parts = [_components(row) for row in reports if row.source == DEVICE and row.lease_closed]
    ratings = [row.rating for row in counted if row.rating is not None]
    means = {name: _mean((_value(part, name), part.requests) for part in parts) for name in _WEIGHTED}
    return Measurement(
        requests=sum(part.requests for part in parts),
        errors=sum(part.errors for part in parts),
        accuracy=_mean(_accuracy(row) for row in reports),
        rating=_mean((rating, 1) for rating in ratings),
        ratings=len(ratings),
        download_bytes=download_bytes,
        failed=failed,
        **means,
    )


def is_empty(measurement: Measurement) -> bool:
    """Whether a lease left nothing to learn from: no request and no rating, and it did not fail either."""
    return measurement.requests == 0 and measurement.ratings == 0 and not measurement.failed


def _components(row: Feedback) -> Components:
    return Components.model_validate(row.components)


def _accuracy(row: Feedback) -> tuple[float | None, int]:
    part = _components(row)
    is_hearsay = row.source == DEVICE and not row.lease_closed
    return part.accuracy, 1 if is_hearsay else max(part.requests, 1)


def _value(part: Components, name: str) -> float | None:
    value: float | None = getattr(part, name)
    return value


def _mean(pairs: Iterable[tuple[float | None, int]]) -> float | None:
    """The weighted mean of what is there; None where nothing is, or nothing weighs."""
    known = [(value, weight) for value, weight in pairs if value is not None and weight > 0]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None
