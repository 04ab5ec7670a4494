"""Joins waiting requests into one run and parts its outputs again. Pure arithmetic: no threads, no clocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from device_agents.runtime import Array

Shape = tuple[tuple[str, str, tuple[int, ...]], ...]


def rows_of(inputs: Mapping[str, Array]) -> int:
    """Size along axis 0, which all inputs of a batchable model share; 1 for anything else."""
    sizes = {array.shape[0] for array in inputs.values() if array.ndim}
    return sizes.pop() if len(sizes) == 1 else 1


def join_key(inputs: Mapping[str, Array]) -> Shape:
    """Requests with equal keys can be joined: same names, types and sizes but for axis 0."""
    return tuple(sorted((name, array.dtype.str, array.shape[1:]) for name, array in inputs.items()))


def share_of_queue(*, waiting_rows: int, free_callers: int, max_batch: int) -> int:
    """Rows that one caller takes: an even share among the free callers, never more than the largest batch.

    Joining only what no free caller could start at once never delays a request in order to fill a batch.

    >>> share_of_queue(waiting_rows=5, free_callers=2, max_batch=8)
    3
    >>> share_of_queue(waiting_rows=1, free_callers=2, max_batch=8)
    1
    """
    return max(1, min(max_batch, math.ceil(waiting_rows / max(1, free_callers))))


def count_to_join(sizes: Sequence[int], *, limit_rows: int) -> int:
    """How many requests of so many rows, from the first on, make one run; a large first one is taken nevertheless.

    >>> count_to_join([1, 2, 2], limit_rows=4), count_to_join([9], limit_rows=4), count_to_join([], limit_rows=4)
    (2, 1, 0)
    """
    count = 0
    for size in sizes:
        if count and size > limit_rows:
            break
        count, limit_rows = count + 1, limit_rows - size
    return count


def join(requests: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Inputs of several requests along axis 0."""
    if len(requests) == 1:
        return dict(requests[0])
    return {name: np.concatenate([inputs[name] for inputs in requests]) for name in requests[0]}


def part(outputs: Mapping[str, Array], sizes: Sequence[int]) -> list[dict[str, Array]]:
    """Outputs of a joined run, one part per request, in order."""
    if len(sizes) == 1:
        return [dict(outputs)]
    cuts = np.cumsum(sizes)[:-1]
    parted = {name: np.split(array, cuts) for name, array in outputs.items()}
    return [{name: parts[index] for name, parts in parted.items()} for index in range(len(sizes))]


def chunks(inputs: Mapping[str, Array], *, rows: int, max_batch: int) -> list[dict[str, Array]]:
    """One request that is larger than the largest batch, as runs that are not."""
    if rows <= max_batch:
        return [dict(inputs)]
    return [
        {name: array[start : start + max_batch] for name, array in inputs.items()}
        for start in range(0, rows, max_batch)
    ]
