"""From profiles, load and calibration to the predicted latency and CPU time of every action. Knows no QoE, no
policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from selector.actions import ActionTable
from selector.calibration import (
    CONFIGURATION,
    CPU,
    OVERALL,
    SERVICE,
    TAIL,
    VARIANT,
    Calibration,
    Correction,
    names_of,
    scopes_of,
)
from selector.interactions import Context, Profile
from selector.profiles import ProfileBook, ServiceColumns, ServiceTime, profile_book
from selector.queueing import normal_cdf, share_within, sojourn

__all__ = ["Calibration", "LatencyModel", "Predicted", "ProfileBook", "ServiceTime", "scopes_of"]

Floats = NDArray[np.float64]

# Sessions x threads above the cores lose 30-45 % of the throughput.
OVERSUBSCRIPTION_LOSS = 0.4
LARGEST_SENSITIVITY = 5.0
NOISE_SD = 0.08


@dataclass(frozen=True, slots=True)
class Predicted:
    """Predictions as columns of shape (actions,), and ``source`` per action. All finite."""

    p50_ms: Floats
    p95_ms: Floats
    log_sd: Floats
    cpu_ms_per_request: Floats
    slo_violation_probability: Floats
    slo_hit_share: Floats
    service_ms: Floats
    batch: Floats
    raw_a_ms: Floats
    raw_b_ms: Floats
    raw_cpu_ms: Floats
    memory_bytes: Floats
    source: tuple[str, ...]


class LatencyModel:
    """Predicts from the profiles known for one device and what was learnt about it.

    Pass profiles as one kept tuple to have them read only once. Raises InvalidInput for one that is no measurement.
    """

    def __init__(self, profiles: Sequence[Profile], calibration: Calibration | None = None) -> None:
        self._book = profile_book(profiles)
        self._calibration = calibration or Calibration()

    def predict(self, context: Context, table: ActionTable) -> Predicted:
        """Predictions of all actions, whatever the load."""
        times = self._book.columns(table, context.cores)
        service, tail, cpu = (self._correction(quantity, context, table, times) for quantity in (SERVICE, TAIL, CPU))
        crowd = _contention(context, table, times.a_ms + times.b_ms)
        raw_a, raw_b = times.a_ms * crowd, np.maximum(times.b_ms * crowd, 1e-6)
        factor = np.exp(service.mean)
        queue = sojourn(
            raw_a * factor, raw_b * factor, table.max_batch, table.max_concurrency, context.arrival_rate_rps
        )
        raw_cpu = (times.a_ms + times.b_ms / queue.batch) * np.minimum(table.threads, context.cores)
        p95_ms: Floats = np.maximum(queue.p95_ms * np.exp(tail.mean), queue.p50_ms * 1.02)
        steepness = 1.0 / np.maximum(1.0 - queue.utilisation, 1.0 / LARGEST_SENSITIVITY)
        known = service.variance + times.log_sd**2 * service.unknown
        log_sd: Floats = np.sqrt(steepness**2 * (known + NOISE_SD**2) + tail.variance)
        late = 1.0 - normal_cdf((math.log(context.slo_p95_ms) - np.log(p95_ms)) / log_sd)
        return Predicted(
            p50_ms=queue.p50_ms,
            p95_ms=p95_ms,
            log_sd=log_sd,
            cpu_ms_per_request=raw_cpu * np.exp(cpu.mean),
            slo_violation_probability=late,
            slo_hit_share=share_within(context.slo_p95_ms, queue.p50_ms, p95_ms, steepness * np.sqrt(known)),
            service_ms=queue.service_ms,
            batch=queue.batch,
            raw_a_ms=raw_a,
            raw_b_ms=raw_b,
            raw_cpu_ms=raw_cpu,
            memory_bytes=times.memory_bytes,
            source=times.source,
        )

    def _correction(self, quantity: str, context: Context, table: ActionTable, times: ServiceColumns) -> Correction:
        """Log multipliers per action; effects are looked up once per pair and per configuration."""
        overalls, variants = _pair_names(quantity, times.pair_source, table.pair_digests)
        bounds = _configuration_names(quantity, table.configuration_keys)
        overall = self._calibration.effects(quantity, OVERALL, context, overalls)
        variant = self._calibration.effects(quantity, VARIANT, context, variants)
        configuration = self._calibration.effects(quantity, CONFIGURATION, context, bounds)
        total = (overall + variant)[table.pair] + configuration[table.configuration]
        return Correction(total[:, 0], total[:, 1], variant[table.pair, 2])


@lru_cache(maxsize=256)
def _pair_names(
    quantity: str, sources: tuple[str, ...], digests: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    names = [names_of(quantity, source, digest, "") for source, digest in zip(sources, digests, strict=True)]
    return tuple(each.overall for each in names), tuple(each.variant for each in names)


@lru_cache(maxsize=256)
def _configuration_names(quantity: str, keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(names_of(quantity, "", "", key).configuration for key in keys)


def _contention(context: Context, table: ActionTable, one_ms: Floats) -> Floats:
    """Slow-down when runs and other processes want more cores than there are; busy runs from the offered load."""
    busy = np.minimum(np.maximum(context.arrival_rate_rps * one_ms / 1000.0, 1.0), table.max_concurrency)
    wanted = busy * np.minimum(table.threads, context.cores) / context.cores
    shared = np.maximum(1.0, wanted + context.cpu_load_share)
    crowd: Floats = shared * (1.0 + OVERSUBSCRIPTION_LOSS * np.minimum(np.maximum(wanted - 1.0, 0.0), 1.0))
    return crowd
