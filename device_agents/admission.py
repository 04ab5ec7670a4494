"""Whether a request fits the model that is to answer it, and the time that is left. Nothing is queued or run here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from device_agents.batching import rows_of
from device_agents.errors import BadRequest, Overloaded
from device_agents.runtime import Array, Session
from device_agents.scheduling import Scheduler

LARGEST_REQUEST_ROWS = 1024
REMEMBERED_FORMS = 64


class Admission:
    """What the inputs of one session must be. Forms that were found to fit are remembered."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._rows_of: dict[tuple[tuple[str, object, tuple[int, ...]], ...], int] = {}

    def rows(self, inputs: Mapping[str, Array]) -> int:
        """Rows of a request that fits the model; raises BadRequest saying what does not fit."""
        form = tuple([(name, array.dtype, array.shape) for name, array in inputs.items()])
        rows = self._rows_of.get(form)
        if rows is None:
            rows = check_inputs(inputs, self.session)
            if len(self._rows_of) < REMEMBERED_FORMS:
                self._rows_of[form] = rows
        return rows


def check_inputs(inputs: Mapping[str, Array], session: Session) -> int:
    """Rows of a request that fits the model; raises BadRequest saying what does not fit."""
    for tensor in session.inputs:
        if tensor.name not in inputs:
            raise BadRequest(f"input {tensor.name} is missing")
        array = inputs[tensor.name]
        fits = array.ndim == len(tensor.shape) and all(
            size in (-1, actual) for size, actual in zip(tensor.shape, array.shape, strict=True)
        )
        if array.dtype != tensor.dtype:
            raise BadRequest(f"input {tensor.name} must be {tensor.datatype}")
        if not fits or not array.size:
            raise BadRequest(f"input {tensor.name} has shape {list(array.shape)}, the model takes {list(tensor.shape)}")
    if unknown := set(inputs) - {tensor.name for tensor in session.inputs}:
        raise BadRequest(f"the model has no input {sorted(unknown)[0]}")
    if not session.is_batchable:
        return 1
    if len({array.shape[0] for array in inputs.values()}) > 1:
        raise BadRequest("inputs differ in their first size")
    if (rows := rows_of(inputs)) > LARGEST_REQUEST_ROWS:
        raise BadRequest(f"{rows} rows in one request, at most {LARGEST_REQUEST_ROWS} are served")
    return rows


def refusal(
    scheduler: Scheduler,
    *,
    waits: int,
    most: int,
    rows_ahead: int,
    rows: int,
    left_ms: float,
    running_ms: Callable[[], float],
) -> Overloaded | None:
    """Why a request of ``rows`` had better not wait behind ``waits`` others, with ``left_ms`` until its deadline."""
    if left_ms == math.inf and waits < most:
        return None
    expected_ms = scheduler.expected_ms(rows_ahead=rows_ahead, rows=rows, running_ms=running_ms())
    if waits >= most:
        return Overloaded(f"{waits} requests are waiting", retry_after_s=max(1.0, expected_ms / 1000))
    if expected_ms > left_ms:
        late = f"{waits} requests are waiting: an answer would take about {expected_ms:.0f} ms"
        return Overloaded(f"{late}, {left_ms:.0f} ms are left", retry_after_s=1.0)
    return None
