"""What runs take on this device: learnt from every run, told apart by cause. Pure arithmetic on frozen values.

A run of n rows takes ``(a*n + b) * pace * slowdown(c)``. The line is what the model costs, learnt over many runs;
the pace is what the machine is like just now (neighbours, heat, quotas), followed within a few runs; the slowdown is
what ``c`` runs at once cost each other. The last two are told apart by a Kalman filter over their logarithms: a slow
moment of the machine shows in every run, runs that hinder each other only beside each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY = 0.98  # of the line, per run: about the last fifty runs count
PRIOR_RUNS = 0.5  # what the warm-up's fit weighs at either end of the line, in runs
LARGEST_SURPRISE = 1.6  # of a run, by its prediction: stalls move what is learnt towards the typical run, not the mean
LARGEST_TAIL = 2.5
TAIL_SHARE, TAIL_STEP, TAIL_DEVIATIONS = 0.9, 0.02, 1.2816
ALONE_BELOW = 1.25  # runs at once on the mean: what is learnt of the line comes from runs that were not hindered

# Of logarithms, per run. A pace that lasts becomes the line's; a slowdown that is not seen any more is forgotten.
RUN_VARIANCE = 0.2**2
PACE_KEPT, PACE_DRIFT = 0.9, 0.15**2
CROWDING_KEPT, CROWDING_VARIANCE = 0.9998, 0.7**2
CROWDING_DRIFT = CROWDING_VARIANCE * (1 - CROWDING_KEPT**2)
MOST_CROWDING = 2.0


# What a run costs by its rows: a_ms, b_ms, how far the runs of late are from the prior, and the sums behind the fit.
Line = tuple[float, float, float, tuple[float, float, float, float, float]]


@dataclass(frozen=True, slots=True)
class Conditions:
    """Logarithms of the pace and of the ``crowding`` e, by which c runs at once slow each other c**e times.

    ``variances`` are of the pace, of both together, and of the crowding.
    """

    pace: float = 0.0
    crowding: float = 0.0
    variances: tuple[float, float, float] = (0.04, 0.0, CROWDING_VARIANCE)

    def observed(self, surprise: float, *, concurrency: float) -> Conditions:
        """With one run known that took ``exp(surprise)`` times what was predicted."""
        pace_pace, pace_crowd, crowd_crowd = self.variances
        pace_pace = PACE_KEPT**2 * pace_pace + PACE_DRIFT
        pace_crowd = PACE_KEPT * CROWDING_KEPT * pace_crowd
        crowd_crowd = CROWDING_KEPT**2 * crowd_crowd + CROWDING_DRIFT
        pace, crowding = PACE_KEPT * self.pace, CROWDING_KEPT * self.crowding
        crowd = math.log(concurrency)
        surprise += self.pace - pace + crowd * (self.crowding - crowding)
        by_pace, by_crowd = pace_pace + crowd * pace_crowd, pace_crowd + crowd * crowd_crowd
        whole = by_pace + crowd * by_crowd + RUN_VARIANCE
        return Conditions(
            pace=pace + by_pace / whole * surprise,
            crowding=min(max(crowding + by_crowd / whole * surprise, -1.0), MOST_CROWDING),
            variances=(
                pace_pace - by_pace * by_pace / whole,
                pace_crowd - by_pace * by_crowd / whole,
                crowd_crowd - by_crowd * by_crowd / whole,
            ),
        )


@dataclass(frozen=True, slots=True)
class ServiceTimes:
    """Predicts runs. ``tail`` is the factor on a prediction that nine of ten runs stay below.

    ``prior`` is the line that the warm-up measured: its shape is kept as long as runs do not vary in size.
    """

    prior: tuple[float, float]
    a_ms: float
    b_ms: float
    level: float = 1.0
    sums: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)
    tail: float = 1.1
    cores_slowdown: tuple[float, ...] = (1.0,)
    conditions: Conditions = Conditions()
    pace: float = 1.0

    def typical_ms(self, rows: int) -> float:
        """One run alone, at the pace of most of the time."""
        return self.a_ms * rows + self.b_ms

    @property
    def spread(self) -> float:
        """Standard deviation of the logarithm of a run's time around its prediction, by the tail."""
        return math.log(self.tail) / TAIL_DEVIATIONS

    def slowdown(self, concurrency: float) -> float:
        """Of a run while ``concurrency`` runs are under way, this one included, on the mean.

        >>> [start(1.0, 0.0, max_concurrency=3, cores=2).slowdown(runs) for runs in (1, 2, 3)]
        [1.0, 1.0, 1.5]
        """
        cores = self.cores_slowdown[min(math.ceil(concurrency), len(self.cores_slowdown)) - 1]
        return float(cores * concurrency**self.conditions.crowding)

    def predict_ms(self, rows: int, concurrency: float = 1) -> float:
        """Expected time of one run just now.

        >>> start(0.5, 2.0, max_concurrency=2, cores=2).predict_ms(4)
        4.0
        """
        return (self.a_ms * rows + self.b_ms) * self.pace * self.slowdown(concurrency)

    def observed(self, *, rows: int, service_ms: float, concurrency: float = 1) -> ServiceTimes:
        """With one more run known."""
        expected_ms = max(self.predict_ms(rows, concurrency), 1e-6)
        surprise = min(max(service_ms / expected_ms, 1 / LARGEST_SURPRISE), LARGEST_SURPRISE)
        # A step up weighs nine times one down, so that the factor settles where one run in ten is above it.
        step = TAIL_STEP * (TAIL_SHARE if service_ms > self.tail * expected_ms else TAIL_SHARE - 1)
        conditions = self.conditions.observed(math.log(surprise), concurrency=concurrency)
        line = self._refitted(rows, self.typical_ms(rows) * surprise) if concurrency < ALONE_BELOW else self._line
        tail = min(max(self.tail + step, 1.02), LARGEST_TAIL)
        return ServiceTimes(self.prior, *line, tail, self.cores_slowdown, conditions, math.exp(conditions.pace))

    @property
    def _line(self) -> Line:
        return self.a_ms, self.b_ms, self.level, self.sums

    def _refitted(self, rows: int, typical_ms: float) -> Line:
        """Weighted least squares by relative error, with the prior at both ends of the line."""
        prior_a, prior_b = self.prior
        level = self.level + 0.1 * (typical_ms / max(prior_a * rows + prior_b, 1e-6) - self.level)
        weight = 1.0 / max(self.typical_ms(rows), 1e-6) ** 2  # not by what was seen: quick runs would weigh more
        added = (weight, weight * rows, weight * rows * rows, weight * typical_ms, weight * rows * typical_ms)
        w, n, nn, t, nt = (MEMORY * old + new for old, new in zip(self.sums, added, strict=True))
        sums = (w, n, nn, t, nt)
        for size in (1, 16):
            expected_ms = max(level * (prior_a * size + prior_b), 1e-6)
            share = PRIOR_RUNS / expected_ms**2
            w, n, nn = w + share, n + share * size, nn + share * size * size
            t, nt = t + share * expected_ms, nt + share * size * expected_ms
        determinant = max(w * nn - n * n, 1e-9 * w * nn)  # never nothing, whatever rounding makes of it
        a_ms = max(0.0, (w * nt - n * t) / determinant)
        b_ms = (t - a_ms * n) / w
        if b_ms < 0:
            a_ms, b_ms = nt / nn, 0.0
        return a_ms, b_ms, level, sums


def start(a_ms: float, b_ms: float, *, max_concurrency: int, cores: int, threads: int = 1) -> ServiceTimes:
    """What is believed before the first run: runs beside each other slow down only beyond the cores."""
    slowdown = tuple(max(1.0, running * threads / max(1, cores)) for running in range(1, max_concurrency + 1))
    return ServiceTimes(prior=(a_ms, b_ms), a_ms=a_ms, b_ms=b_ms, cores_slowdown=slowdown)
