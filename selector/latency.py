"""From profiles, load and calibration to the predicted latency and CPU time of every action. Knows no QoE, no
policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selector.actions import ActionTable
from selector.calibration import Calibration, scopes_of
from selector.effects import effect_table
from selector.interactions import Context, Profile
from selector.profiles import ProfileBook, ServiceTime, profile_book
from selector.queueing import SMALLEST_SPREAD, Z_95, normal_cdf

__all__ = ["Calibration", "LatencyModel", "Predicted", "ProfileBook", "ServiceTime", "scopes_of"]

Floats = NDArray[np.float64]

# Sessions x threads above the cores lose 30-45 % of the throughput.
OVERSUBSCRIPTION_LOSS = 0.4
LARGEST_SENSITIVITY = 5.0
NOISE_SD = 0.08
# The kernel's own, where the device does not tell it.
QUOTA_PERIOD_S = 0.1
# Three-point Gauss-Hermite quadrature: how far the outer points lie from the mean, and what each weighs.
OUTER_SD, OUTER_WEIGHT = math.sqrt(3.0), 1.0 / 6.0


@dataclass(frozen=True, slots=True)
class Predicted:
    """Predictions as columns of shape (actions,), and ``source`` per action. All finite.

    The hopeful ones hold if the service time lies OUTER_SD standard deviations below what is expected, the cautious one
    if it lies as far above: the slower service goes through the queue, since what is near overload falls off a cliff
    that no spread around the expectation shows.
    """

    p50_ms: Floats
    p95_ms: Floats
    log_sd: Floats
    cpu_ms_per_request: Floats
    slo_violation_probability: Floats
    slo_hit_share: Floats
    cautious_hit_share: Floats
    hopeful_hit_share: Floats
    hopeful_cpu_ms: Floats
    service_ms: Floats
    batch: Floats
    raw_a_ms: Floats
    raw_b_ms: Floats
    raw_cpu_ms: Floats
    held_back: Floats
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
        isa = context.features.get("isa")
        times = self._book.columns(table, context.cores, isa if isinstance(isa, str) else "")
        known = self._calibration.correction(context, effect_table(table, times.source))
        service, tail, cpu = np.exp(known.mean)
        one_ms, threads = times.a_ms + times.b_ms, np.minimum(table.threads, context.cores)
        crowd = _contention(context, table, one_ms, threads)
        stalled, held_back = _quota_stalls(context, one_ms, threads, crowd)
        raw_a, raw_b = times.a_ms * stalled, times.b_ms * stalled
        unsure = known.variance[0]
        hope = OUTER_SD * np.sqrt(unsure)
        speeds = np.array((service, np.exp(known.mean[0] + hope)))
        queue = times.waiting.at(stalled * speeds, context.arrival_rate_rps, held_back)
        raw_cpu = (times.a_ms + times.b_ms / queue.batch[0]) * threads
        p95_ms: Floats = np.maximum(queue.p95_ms * tail, queue.p50_ms * 1.02)
        steepness = 1.0 / np.maximum(1.0 - queue.utilisation[0], 1.0 / LARGEST_SENSITIVITY)
        log_sd: Floats = np.sqrt(steepness**2 * (unsure + NOISE_SD**2) + known.variance[1])
        late, within, hopeful, cautious = _shares(
            context.slo_p95_ms, queue.p50_ms, p95_ms, log_sd, variance=steepness**2 * unsure, hope=steepness * hope
        )
        cpu_ms = raw_cpu * cpu
        return Predicted(
            p50_ms=queue.p50_ms[0],
            p95_ms=p95_ms[0],
            log_sd=log_sd,
            cpu_ms_per_request=cpu_ms,
            slo_violation_probability=late,
            slo_hit_share=within,
            cautious_hit_share=cautious,
            hopeful_hit_share=hopeful,
            hopeful_cpu_ms=cpu_ms * np.exp(-hope),
            service_ms=queue.service_ms[0],
            batch=queue.batch[0],
            raw_a_ms=raw_a,
            raw_b_ms=raw_b,
            raw_cpu_ms=raw_cpu,
            held_back=held_back,
            memory_bytes=times.memory_bytes,
            source=times.source,
        )


def _shares(
    limit_ms: float, p50_ms: Floats, p95_ms: Floats, log_sd: Floats, *, variance: Floats, hope: Floats
) -> Floats:
    """Shape (4, actions): probability that p95 misses the limit; expected share of requests within it if latency is
    lognormal with these percentiles, its level known up to ``variance``; the share if the level is lower by ``hope``;
    and the share at the slower speed.

    Percentiles of shape (2, actions): at the expected speed and at the slower one.
    """
    limit, logs = math.log(limit_ms), np.log((p50_ms, p95_ms))
    spread = np.maximum((logs[1] - logs[0]) / Z_95, SMALLEST_SPREAD)
    slack = limit - logs[0]
    shares = normal_cdf(
        (
            (logs[1, 0] - limit) / log_sd,
            slack[0] / np.sqrt(spread[0] ** 2 + variance),
            (slack[0] + hope) / spread[0],
            slack[1] / spread[1],
        )
    )
    shares[3] = np.minimum(shares[3], shares[1])
    return shares


def _contention(context: Context, table: ActionTable, one_ms: Floats, threads: Floats) -> Floats:
    """Slow-down when runs and other processes want more cores than there are; busy runs from the offered load."""
    busy = np.minimum(np.maximum(context.arrival_rate_rps * one_ms / 1000.0, 1.0), table.max_concurrency)
    wanted = busy * threads / context.cores
    shared = np.maximum(1.0, wanted + context.cpu_load_share)
    crowd: Floats = shared * (1.0 + OVERSUBSCRIPTION_LOSS * np.minimum(np.maximum(wanted - 1.0, 0.0), 1.0))
    return crowd


def _quota_stalls(context: Context, one_ms: Floats, threads: Floats, crowd: Floats) -> tuple[Floats, Floats]:
    """What a CPU quota does: how many times longer a run takes, crowding included, and how many times longer than that
    it keeps the next one waiting.

    A quota of q cores grants q x P ms of CPU time per period of P ms. A run within one grant is not slowed down, a
    longer one stalls until the next; whatever it used has to be granted again before the device can sustain another
    (Linux CFS bandwidth control).
    """
    quota = context.features.get("cpu_quota")
    if not isinstance(quota, (int, float)) or not 0 < quota < context.cores:
        return crowd, np.ones_like(crowd)
    told = context.features.get("cpu_quota_period")
    period_ms = 1000.0 * (told if isinstance(told, (int, float)) and told > 0 else QUOTA_PERIOD_S)
    granted_ms = one_ms * threads / quota
    run_ms = np.maximum(one_ms * crowd, granted_ms - period_ms * np.maximum(1.0 - quota / threads, 0.0))
    return run_ms / one_ms, np.maximum(granted_ms / run_ms, 1.0)
