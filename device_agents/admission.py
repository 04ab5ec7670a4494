"""Whether a request fits the model that is to answer it. Nothing is queued or run here."""

from __future__ import annotations

from collections.abc import Mapping

from device_agents.batching import rows_of
from device_agents.errors import BadRequest
from device_agents.runtime import Array, Session

LARGEST_REQUEST_ROWS = 1024


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
