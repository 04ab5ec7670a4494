"""Which actions may not be taken at all, and which probably should not; always with reasons that people can
read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from selector.actions import ActionTable
from selector.interactions import Context

MEMORY = "memory"
ACCURACY = "accuracy_below_minimum"
THREADS = "threads_above_cores"
OPERATORS = "operators"
BANNED = "banned"
SLO_VIOLATION_LIKELY = "slo_violation_likely"


def hard_masks(
    context: Context,
    table: ActionTable,
    memory_bytes: NDArray[np.float64],
    bans: Mapping[str, str],
) -> list[tuple[str, ...]]:
    """Reasons per action why it must not be taken; empty where it may.

    ``memory_bytes`` (actions,) is what each needs. ``bans`` maps an action key, a whole digest or its first
    12 characters to a reason. The running variant is already in memory and needs no more; unknown free memory
    (0) forbids nothing.
    """
    variant_masks = [_variant_masks(context, table, index, bans) for index in range(len(table.variants))]
    masks = [variant_masks[index] for index in table.variant]
    running = (context.incumbent or "").split("/")[0]
    if context.memory_free_bytes > 0:
        for index in np.flatnonzero(memory_bytes > context.memory_free_bytes):
            if not running or table.keys[index].split("/")[0] != running:
                masks[index] = (*masks[index], MEMORY)
    for index in np.flatnonzero(table.threads > context.cores):
        masks[index] = (*masks[index], THREADS)
    for key, reason in bans.items():
        if key in table.position:
            masks[table.position[key]] = (*masks[table.position[key]], f"{BANNED}:{reason}")
    return masks


def _variant_masks(context: Context, table: ActionTable, index: int, bans: Mapping[str, str]) -> tuple[str, ...]:
    variant = table.variants[index]
    masks: list[str] = []
    if variant.accuracy < context.minimum_accuracy:
        masks.append(ACCURACY)
    if context.supported_operators and not variant.operators <= context.supported_operators:
        masks.append(OPERATORS)
    reason = bans.get(variant.digest, bans.get(variant.digest[:12]))
    if reason is not None:
        masks.append(f"{BANNED}:{reason}")
    return tuple(masks)


def slo_violation_is_likely(probability: NDArray[np.float64], limit: float) -> NDArray[np.bool_]:
    """Soft mask: the probability that p95 misses the SLO is above the application's limit."""
    return probability > limit
