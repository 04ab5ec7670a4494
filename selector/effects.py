"""The effects that calibration learns: which an action has, and how large they may be before anything is known.

A log multiplier on a predicted time is a sum of effects, one of each kind, for the device, its class and the fleet.
What is learnt against a borrowed profile says nothing about the device's own one, so the names of effects that depend
on the profile hold its family. Effects of conditions (how hot the device is, what other processes take) belong to all
actions alike, and count as much as the condition is there. No learning happens here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from selector.actions import ActionTable
from selector.interactions import Action, Context

Singles = NDArray[np.float32]
Indices = NDArray[np.intp]

SERVICE, TAIL, CPU = QUANTITIES = ("service", "tail", "cpu")
SCOPES = ("fleet", "class", "device")
OVERALL, PRECISION, VARIANT, BATCH, CALLERS, THREADS, PAIR = KINDS = (
    "overall",
    "precision",
    "variant",
    "batch",
    "callers",
    "threads",
    "pair",
)
HEAT, LOAD = CONDITIONS = ("heat", "load")
# Heat is none at the temperature that a busy device has, in 100 °C, and one where devices throttle.
WARM, THROTTLING = 0.56, 0.80
MOST_HEAT = 2.0
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
        PAIR: (0.05, 0.20, 0.08),
        HEAT: (0.05, 0.10, 0.05),
        LOAD: (0.10, 0.20, 0.10),
    },
    TAIL: {
        OVERALL: (0.15, 0.15, 0.30),
        PRECISION: (0.03, 0.03, 0.03),
        VARIANT: (0.05, 0.05, 0.10),
        BATCH: (0.06, 0.04, 0.07),
        CALLERS: (0.06, 0.04, 0.07),
        THREADS: (0.04, 0.03, 0.04),
        PAIR: (0.05, 0.15, 0.05),
        HEAT: (0.025, 0.05, 0.025),
        LOAD: (0.05, 0.10, 0.05),
    },
    CPU: {
        OVERALL: (0.20, 0.25, 0.30),
        PRECISION: (0.08, 0.12, 0.08),
        VARIANT: (0.10, 0.20, 0.16),
        BATCH: (0.06, 0.05, 0.05),
        CALLERS: (0.06, 0.05, 0.05),
        THREADS: (0.06, 0.05, 0.05),
        PAIR: (0.05, 0.20, 0.08),
        HEAT: (0.025, 0.05, 0.025),
        LOAD: (0.05, 0.10, 0.05),
    },
}
# How much more or less a profile of another family may be wrong; it matters to what depends on the profile.
FAMILY_SCALE = {"own": 0.6, "scaled": 1.0, "class": 1.0, "server": 1.4, "size": 2.5}
_FAMILIAR = (OVERALL, PRECISION, VARIANT, PAIR)
# How far an effect may wander from one of its leases to the next.
DRIFT_SD: dict[str, tuple[float, float, float]] = {
    OVERALL: (0.005, 0.01, 0.03),
    PRECISION: (0.002, 0.005, 0.015),
    VARIANT: (0.002, 0.005, 0.015),
    BATCH: (0.002, 0.005, 0.01),
    CALLERS: (0.002, 0.005, 0.01),
    THREADS: (0.002, 0.005, 0.01),
    PAIR: (0.002, 0.005, 0.015),
    HEAT: (0.001, 0.002, 0.003),
    LOAD: (0.001, 0.002, 0.003),
}
DRIFT_VARIANCE = {kind: tuple(sd**2 for sd in sds) for kind, sds in DRIFT_SD.items()}


def kind_of(name: str) -> str:
    """The kind of the effect of this name, or the condition whose effect it is.

    >>> kind_of("batch:4"), kind_of("heat")
    ('batch', 'heat')
    """
    return name.partition(":")[0]


@lru_cache(maxsize=65536)
def prior_variance(quantity: str, name: str) -> tuple[float, float, float]:
    """Variance of the effect of this name before anything is known: of the fleet's, the class's, the device's."""
    kind = kind_of(name)
    is_familiar = kind in _FAMILIAR and quantity != TAIL
    scale = FAMILY_SCALE.get(name.split(":", 2)[1], 1.0) if is_familiar else 1.0
    fleet, group, device = PRIOR_SD[quantity][kind]
    return (fleet * scale) ** 2, (group * scale) ** 2, (device * scale) ** 2


@lru_cache(maxsize=65536)
def names_of(source: str, action: Action) -> tuple[str, ...]:
    """Names of the action's effects against a profile of this source, in the order of ``KINDS``.

    >>> from selector.interactions import Configuration, Variant
    >>> names_of("device", Action(Variant("ab" * 32, "v", 1, 0.9, "int8"), Configuration(4, 2, 1)))[2:]
    ('variant:own:abababababab', 'batch:4', 'callers:2', 'threads:1', 'pair:own:abababababab/1')
    """
    family = {"device": "own", "device_scaled": "scaled"}.get(source, source)
    digest, bounds = action.variant.digest[:12], action.configuration
    return (
        f"{OVERALL}:{family}",
        f"{PRECISION}:{family}:{action.variant.precision}",
        f"{VARIANT}:{family}:{digest}",
        f"{BATCH}:{bounds.max_batch}",
        f"{CALLERS}:{bounds.max_concurrency}",
        f"{THREADS}:{bounds.threads}",
        f"{PAIR}:{family}:{digest}/{bounds.threads}",
    )


def conditions_of(context: Context) -> tuple[float, ...]:
    """How much of each of ``CONDITIONS`` is there; a temperature that nobody reports is a usual one.

    >>> conditions_of(Context("pi-7", "pi4", "digits", 1.0, 50.0, cpu_load_share=0.3, features={"temperature": 0.8}))
    (1.0, 0.3)
    """
    temperature = context.features.get("temperature")
    heat = (temperature - WARM) / (THROTTLING - WARM) if isinstance(temperature, (int, float)) else 0.0
    return round(min(max(heat, -MOST_HEAT), MOST_HEAT), 9), context.cpu_load_share


@dataclass(frozen=True, slots=True)
class EffectTable:
    """The effects of all actions of a table, and those of conditions.

    ``place`` holds the names, ``conditions`` where those of conditions are. ``design`` (effects + 1, actions) is 1
    where an action has an effect, ``prior`` (scopes, quantities, effects + 1) their variances before anything is known;
    the last of both stands for any other effect and is 0.
    """

    place: dict[str, int]
    conditions: Indices
    design: Singles
    prior: Singles


@lru_cache(maxsize=256)
def _effect_table(keys: tuple[tuple[str, ...], ...]) -> EffectTable:
    names = (*dict.fromkeys(name for kind in zip(*keys, strict=True) for name in kind), *CONDITIONS)
    place = {name: index for index, name in enumerate(names)}
    design = np.zeros((len(names) + 1, len(keys)), np.float32)
    for action, key in enumerate(keys):
        design[[place[name] for name in key], action] = 1.0
    prior = np.zeros((len(SCOPES), len(QUANTITIES), len(names) + 1), np.float32)
    for at, quantity in enumerate(QUANTITIES):
        prior[:, at, :-1] = np.transpose([prior_variance(quantity, name) for name in names])
    conditions = np.array([place[name] for name in CONDITIONS], dtype=np.intp)
    return EffectTable(place, conditions, design, prior)


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
