"""Which actions may not be taken at all, and which probably should not; always with reasons that people can
read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from selector.actions import ActionTable
from selector.interactions import Context

MEMORY = "memory"
ACCURACY = "accuracy_below_minimum"
THREADS = "threads_above_cores"
OPERATORS = "operators"
NOT_MEASURED = "not_measured"
BANNED = "banned"
PUSH_DEFERRED = "push_deferred"
LOW_BATTERY_SHARE = 0.15
EXPLORATION_BUDGET = "exploration_budget"
SLO_VIOLATION_LIKELY = "slo_violation_likely"


def hard_masks(
    context: Context,
    table: ActionTable,
    memory_bytes: NDArray[np.float64],
    bans: Mapping[str, str],
) -> dict[int, tuple[str, ...]]:
    """Reasons why an action must not be taken, by index; an action that may be taken is not in it.

    ``memory_bytes`` (actions,) is what each needs. ``bans`` maps an action key, a whole digest or its first
    12 characters to a reason. The running variant is already in memory and needs no more; unknown free memory
    (0) forbids nothing.
    """
    masks: dict[int, tuple[str, ...]] = {}

    def forbid(indices: Iterable[int], reason: str) -> None:
        for index in indices:
            masks[index] = (*masks.get(index, ()), reason)

    forbid(_where(table.accuracy < context.minimum_accuracy), ACCURACY)
    if context.supported_operators:
        lacking = [not variant.operators <= context.supported_operators for variant in table.variants]
        forbid(_where(np.array(lacking)[table.variant]), OPERATORS)
    if context.unmeasured_digests:
        unmeasured = [variant.digest in context.unmeasured_digests for variant in table.variants]
        forbid(_where(np.array(unmeasured)[table.variant]), NOT_MEASURED)
    if bans:
        for place, variant in enumerate(table.variants):
            reason = bans.get(variant.digest, bans.get(variant.digest[:12]))
            if reason is not None:
                forbid(_where(table.variant == place), f"{BANNED}:{reason}")
    if context.memory_free_bytes > 0:
        running = (context.incumbent or "").split("/")[0]
        short = _where(memory_bytes > context.memory_free_bytes)
        forbid((index for index in short if not running or table.keys[index].split("/")[0] != running), MEMORY)
    forbid(_where(table.threads > context.cores), THREADS)
    if is_push_deferred(context):
        present = on_device(context, table)[table.variant]
        if present.any():
            forbid(_where(~present), PUSH_DEFERRED)
    for key, reason in bans.items():
        if key in table.position:
            forbid((table.position[key],), f"{BANNED}:{reason}")
    return masks


def is_push_deferred(context: Context) -> bool:
    """Whether nothing should be downloaded now: on a metered network, or on a battery that is low and not charging.

    >>> is_push_deferred(Context("d", "phone", "digits", 1.0, 50.0, features={"network": "metered"}))
    True
    """
    features = context.features
    battery = features.get("battery", 1.0)
    is_low = isinstance(battery, (int, float)) and battery < LOW_BATTERY_SHARE and features.get("charging", 0.0) != 1.0
    return features.get("network") == "metered" or is_low


def on_device(context: Context, table: ActionTable) -> NDArray[np.bool_]:
    """Which variants run or are stored on the device, shape (variants,): they need no download."""
    running = (context.incumbent or "").split("/")[0]
    cached = context.cached_digests
    return np.array([each.digest in cached or each.digest[:12] == running for each in table.variants], dtype=np.bool_)


def _where(mask: NDArray[np.bool_]) -> list[int]:
    found: list[int] = mask.nonzero()[0].tolist()
    return found


def slo_violation_is_likely(probability: NDArray[np.float64], limit: float) -> NDArray[np.bool_]:
    """Soft mask: the probability that p95 misses the SLO is above the application's limit."""
    return probability > limit
