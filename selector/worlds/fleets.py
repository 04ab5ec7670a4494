"""Simulated fleets: which devices there are and what happens to them step by step. Knows no policy, no latency.

What a device reports is a noisy view of these conditions; what stays hidden is in the world's truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selector.reward import QoeFormula

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Mask = NDArray[np.bool_]

DAYPARTS = ("night", "morning", "afternoon", "evening")
GROUPS = ("office", "field", "home")


@dataclass(frozen=True, slots=True)
class DeviceClass:
    """One kind of device. ``slowness`` multiplies times of the reference class, ``int8`` and ``fp16`` times of
    variants of that precision on top; ``heating`` is the largest slow-down by heat, ``sharing`` how much other
    processes and further callers cost, ``traffic`` how many times the usual rate such devices get."""

    name: str
    slowness: float
    int8: float = 0.5
    fp16: float = 1.0
    cores: int = 4
    memory_bytes: float = 1e9
    heating: float = 0.2
    sharing: float = 0.6
    traffic: float = 1.0


@dataclass(frozen=True, slots=True)
class Application:
    """What one application wants: the operator's formula, and the usual traffic of the reference class."""

    name: str
    formula: QoeFormula
    rate_rps: float
    minimum_accuracy: float = 0.0


@dataclass(frozen=True, slots=True)
class Turbulence:
    """How restless a fleet is: spread of traffic between devices, bursts, background load, drift."""

    rate_sd: float = 0.4
    daily: float = 0.3
    burst_share: float = 0.06
    burst_factor: float = 2.2
    load_share: float = 0.15
    load_most: float = 0.5
    drift_at: float = 0.6
    drift_share: float = 0.3


@dataclass(frozen=True, slots=True)
class Fleet:
    """Devices and their free memory in bytes, shape (devices,), and their conditions, shape (steps, devices)."""

    device_class: Indices
    application: Indices
    group: Indices
    updated: Mask
    drift_step: int
    rate_rps: Floats
    reported_rate_rps: Floats
    load: Floats
    reported_load: Floats
    heat: Floats
    temperature_c: Floats
    battery: Floats
    is_metered: Mask
    daypart: Indices
    free_memory: Floats


def make_fleet(
    *,
    classes: tuple[DeviceClass, ...],
    applications: tuple[Application, ...],
    turbulence: Turbulence,
    devices: int,
    steps: int,
    rng: np.random.Generator,
) -> Fleet:
    """Draw a fleet; every class is there as often as any other."""
    device_class = np.arange(devices) % len(classes)
    application = rng.integers(0, len(applications), devices)
    traffic = np.array([each.traffic for each in classes])[device_class]
    usual = np.array([each.rate_rps for each in applications])[application]
    usual = usual * traffic * np.exp(turbulence.rate_sd * np.clip(rng.standard_normal(devices), -1.8, 1.8))
    hour = (np.arange(steps)[:, None] + rng.integers(0, 24, devices)) % 24
    burst = _spells(turbulence.burst_share, 4.0, (steps, devices), rng)
    rate = usual * (1.0 + turbulence.daily * np.sin(2 * np.pi * hour / 24))
    rate = rate * np.where(burst, turbulence.burst_factor, 1.0)
    loaded = _spells(turbulence.load_share, 6.0, (steps, devices), rng)
    load = np.where(loaded, rng.uniform(0.1, turbulence.load_most, (steps, devices)), 0.03)
    heat = np.clip(0.35 + 0.25 * _walk(0.95, (steps, devices), rng) + 0.3 * loaded, 0.0, 1.0)
    memory = np.array([each.memory_bytes for each in classes])[device_class]
    return Fleet(
        device_class=device_class,
        application=application,
        group=rng.integers(0, len(GROUPS), devices),
        updated=rng.permutation(devices) < round(turbulence.drift_share * devices),
        drift_step=round(turbulence.drift_at * steps),
        rate_rps=rate,
        reported_rate_rps=rate * np.exp(0.05 * rng.standard_normal((steps, devices))),
        load=load,
        reported_load=np.clip(load + 0.03 * rng.standard_normal((steps, devices)), 0.0, 1.0),
        heat=heat,
        temperature_c=40.0 + 40.0 * heat + rng.standard_normal((steps, devices)),
        battery=np.clip(0.6 + 0.2 * _walk(0.97, (steps, devices), rng), 0.05, 1.0),
        is_metered=_spells(0.04, 4.0, (steps, devices), rng),
        daypart=hour // 6,
        free_memory=memory * rng.uniform(0.5, 1.0, devices),
    )


def _spells(share: float, length: float, shape: tuple[int, int], rng: np.random.Generator) -> Mask:
    """On for this share of the time, in spells of this mean length."""
    states = np.zeros(shape, dtype=np.bool_)
    now = rng.random(shape[1]) < share
    begin = share / (length * (1.0 - share))
    for step in range(shape[0]):
        draw = rng.random(shape[1])
        now = np.where(now, draw >= 1.0 / length, draw < begin)
        states[step] = now
    return states


def _walk(memory: float, shape: tuple[int, int], rng: np.random.Generator) -> Floats:
    """Stationary first-order autoregression with unit variance."""
    values = rng.standard_normal(shape)
    for step in range(1, shape[0]):
        values[step] = memory * values[step - 1] + np.sqrt(1.0 - memory**2) * values[step]
    return values
