"""The effects that calibration learns: which an action has, and how large they may be before anything is known.

A log multiplier on a predicted time is a sum of effects, one of each kind, for the device, its class and the fleet.
Effects learnt against a borrowed profile say nothing about the device's own one, so their names hold the profile's
family. No learning happens here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from selector.actions import ActionTable
from selector.interactions import Action

Indices = NDArray[np.intp]

SERVICE, TAIL, CPU = QUANTITIES = ("service", "tail", "cpu")
SCOPES = ("fleet", "class", "device")
OVERALL, PRECISION, VARIANT, BATCH, CALLERS, THREADS = KINDS = (
    "overall",
    "precision",
    "variant",
    "batch",
    "callers",
    "threads",
)
# Standard deviations before anything is known, by quantity and kind: of the fleet's, the class's and the device's
# effect, against a profile measured on the device's class.
PRIOR_SD: dict[str, dict[str, tuple[float, float, float]]] = {
    SERVICE: {
        OVERALL: (0.15, 0.30, 0.40),
        PRECISION: (0.08, 0.12, 0.08),
        VARIANT: (0.08, 0.20, 0.16),
        BATCH: (0.06, 0.05, 0.05),
        CALLERS: (0.06, 0.05, 0.05),
        THREADS: (0.06, 0.05, 0.05),
    },
    TAIL: {
        OVERALL: (0.15, 0.15, 0.30),
        PRECISION: (0.03, 0.03, 0.03),
        VARIANT: (0.05, 0.05, 0.10),
        BATCH: (0.06, 0.04, 0.07),
        CALLERS: (0.06, 0.04, 0.07),
        THREADS: (0.04, 0.03, 0.04),
    },
    CPU: {
        OVERALL: (0.20, 0.25, 0.30),
        PRECISION: (0.08, 0.12, 0.08),
        VARIANT: (0.10, 0.20, 0.16),
        BATCH: (0.06, 0.05, 0.05),
        CALLERS: (0.06, 0.05, 0.05),
        THREADS: (0.06, 0.05, 0.05),
    },
}
# How much more or less a profile of another family may be wrong; it matters to what depends on the profile.
FAMILY_SCALE = {"own": 0.6, "scaled": 1.0, "class": 1.0, "server": 1.4, "size": 2.5}
_FAMILIAR = (OVERALL, PRECISION, VARIANT)
# How far an effect may wander from one of its leases to the next.
DRIFT_SD: dict[str, tuple[float, float, float]] = {
    OVERALL: (0.005, 0.01, 0.03),
    PRECISION: (0.002, 0.005, 0.015),
    VARIANT: (0.002, 0.005, 0.015),
    BATCH: (0.002, 0.005, 0.01),
    CALLERS: (0.002, 0.005, 0.01),
    THREADS: (0.002, 0.005, 0.01),
}
DRIFT_VARIANCE = {kind: tuple(sd**2 for sd in sds) for kind, sds in DRIFT_SD.items()}


@lru_cache(maxsize=65536)
def prior_variance(quantity: str, kind: str, name: str) -> tuple[float, float, float]:
    """Variance of the effect of this name before anything is known: of the fleet's, the class's, the device's."""
    is_familiar = kind in _FAMILIAR and quantity != TAIL
    scale = FAMILY_SCALE.get(name.split(":", 2)[1], 1.0) if is_familiar else 1.0
    fleet, group, device = PRIOR_SD[quantity][kind]
    return (fleet * scale) ** 2, (group * scale) ** 2, (device * scale) ** 2


def names_of(source: str, action: Action) -> tuple[str, ...]:
    """Names of the action's effects against a profile of this source, in the order of ``KINDS``.

    >>> from selector.interactions import Configuration, Variant
    >>> names_of("device", Action(Variant("ab" * 32, "v", 1, 0.9, "int8"), Configuration(4, 2, 1)))
    ('overall:own', 'precision:own:int8', 'variant:own:abababababab', 'batch:4', 'callers:2', 'threads:1')
    """
    family = {"device": "own", "device_scaled": "scaled"}.get(source, source)
    bounds = action.configuration
    return (
        f"{OVERALL}:{family}",
        f"{PRECISION}:{family}:{action.variant.precision}",
        f"{VARIANT}:{family}:{action.variant.digest[:12]}",
        f"{BATCH}:{bounds.max_batch}",
        f"{CALLERS}:{bounds.max_concurrency}",
        f"{THREADS}:{bounds.threads}",
    )


@dataclass(frozen=True, slots=True)
class EffectTable:
    """The effects of all actions of a table.

    ``names`` once each; ``index`` (kinds, actions) says which each action has; ``defaults`` holds, for each scope and
    quantity, ``(0, prior variance)`` per name.
    """

    names: tuple[str, ...]
    index: Indices
    defaults: tuple[tuple[tuple[tuple[float, float], ...], ...], ...]


@lru_cache(maxsize=256)
def _effect_table(keys: tuple[tuple[str, ...], ...]) -> EffectTable:
    names = tuple(dict.fromkeys(name for kind in zip(*keys, strict=True) for name in kind))
    position = {name: index for index, name in enumerate(names)}
    index = np.array([[position[name] for name in kind] for kind in zip(*keys, strict=True)], dtype=np.intp)
    kinds = [name.split(":", 1)[0] for name in names]
    defaults = tuple(
        tuple(
            tuple((0.0, prior_variance(quantity, kind, name)[level]) for kind, name in zip(kinds, names, strict=True))
            for quantity in QUANTITIES
        )
        for level in range(len(SCOPES))
    )
    return EffectTable(names, index, defaults)


_MOST_KEPT = 64
_kept: dict[tuple[int, tuple[str, ...]], tuple[ActionTable, EffectTable]] = {}


def effect_table(table: ActionTable, source: tuple[str, ...]) -> EffectTable:
    """The effects of these actions against profiles of these sources, shape (actions,); worked out once."""
    found = _kept.get((id(table), source))
    if found is not None and found[0] is table:
        return found[1]
    made = _effect_table(tuple(names_of(each, action) for each, action in zip(source, table.actions, strict=True)))
    if len(_kept) >= _MOST_KEPT:
        _kept.clear()
    _kept[id(table), source] = table, made
    return made
