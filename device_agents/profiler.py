"""Measures a variant on this device: a run of n rows takes a*n + b. The fit is for ``selector.latency`` to consume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from device_agents.errors import AttemptFailed, RunFailed
from device_agents.golden import agrees, golden_output, is_comparable
from device_agents.runtime import Array, EmulatedQuota, RunCost, Session, Tensor, runtime_version
from device_agents.telemetry import cpu_quota, hardware, throttled_periods
from device_agents.wire import GoldenOutput, Outcome, ProfileReport

BATCH_SIZES = (1, 2, 4, 8, 16)
OPEN_SIZE = 1
RUNS_PER_SIZE = 7
LONGEST_MS = 3_600_000.0
LONGEST_REST_S = 1.2
ENDS_AFTER_S = 1.8  # of the 2 s that docs/agent.md gives a warm-up, where one row takes less than half of it


@dataclass(frozen=True)
class LinearFit:
    """Service time in milliseconds: ``a_ms * rows + b_ms``; both at least zero."""

    a_ms: float
    b_ms: float
    r2: float

    def predict_ms(self, rows: int) -> float:
        """Expected time of one run."""
        return self.a_ms * rows + self.b_ms


def fit(points: Sequence[tuple[int, float]]) -> LinearFit:
    """Least squares over (rows, milliseconds), weighted so that relative errors count; neither part below zero.

    >>> fit([(1, 3.0), (4, 9.0), (8, 17.0)])
    LinearFit(a_ms=2.0, b_ms=1.0, r2=1.0)
    >>> fit([(1, 3.0)])
    LinearFit(a_ms=3.0, b_ms=0.0, r2=1.0)
    """
    if len({size for size, _ in points}) < 2:
        return LinearFit(a_ms=round(sum(took / size for size, took in points) / len(points), 6), b_ms=0.0, r2=1.0)
    # Least squares by hand: numpy's solver would bring megabytes of buffers with it, and stay.
    weights = [1.0 / max(took, 1e-6) ** 2 for _, took in points]
    whole = sum(weights)
    mean_size = sum(weight * size for weight, (size, _) in zip(weights, points, strict=True)) / whole
    mean_took = sum(weight * took for weight, (_, took) in zip(weights, points, strict=True)) / whole
    # Around the means: the plain sums would cancel where weights differ by many orders of magnitude.
    around = [
        (weight, size - mean_size, took - mean_took) for weight, (size, took) in zip(weights, points, strict=True)
    ]
    a_ms = sum(w * size * took for w, size, took in around) / sum(w * size * size for w, size, _ in around)
    b_ms = mean_took - a_ms * mean_size
    if b_ms < 0:
        through_zero = [(weight * size, size, took) for weight, (size, took) in zip(weights, points, strict=True)]
        a_ms = sum(w * took for w, _, took in through_zero) / sum(w * size for w, size, _ in through_zero)
        b_ms = 0.0
    if a_ms < 0:
        a_ms, b_ms = 0.0, mean_took
    mean_ms = sum(took for _, took in points) / len(points)
    spread = sum((took - mean_ms) ** 2 for _, took in points)
    missed = sum((took - a_ms * size - b_ms) ** 2 for size, took in points)
    return LinearFit(a_ms=round(a_ms, 6), b_ms=round(b_ms, 6), r2=round(1.0 - missed / spread, 6) if spread else 1.0)


@dataclass(frozen=True)
class Warmed:
    """A session that has run, and what was measured anew; ``profile`` is None where an earlier one stands as it is."""

    session: Session
    profile: ProfileReport | None


def warm_up(
    path: Path,
    *,
    digest: str,
    threads: int,
    max_batch: int,
    budget_s: float,
    known: ProfileReport | None = None,
    must_match: Session | None = None,
    quota: EmulatedQuota | None = None,
    open_session: Callable[..., Session] = Session,
) -> Warmed:
    """Loads a variant beside whatever runs, tries it, and measures it unless ``known`` says it was.

    Runs a batch of 1 and the largest batch (or the largest that fits the budget, on a slow device), checks that
    outputs are sane, of the promised shape and, for the golden input, what they were before on this device, and that
    callers of ``must_match`` can use it unchanged. Raises AttemptFailed(incompatible) otherwise.

    ``open_session`` is for tests: a model as slow as they like.
    """
    memory_before = psutil.Process().memory_info().rss
    session = open_session(path, threads=threads, quota=quota)
    meter, ends_s = _Meter(session), time.monotonic() + ENDS_AFTER_S
    if must_match is not None and not _can_replace(session, must_match):
        raise AttemptFailed("its inputs or outputs differ from the running model's", outcome=Outcome.INCOMPATIBLE)
    outputs, first = meter.run(1)
    golden = golden_output(outputs, computed_by=" ".join((runtime_version(), *hardware().isa)))
    largest = max_batch if session.is_batchable else 1
    affordable = max(1, min(largest, int(budget_s * 1000 / max(first.service_ms, 1e-3))))
    if affordable > 1:
        _answer(session, affordable)
    if known is not None:
        session.line = (known.a_ms, known.b_ms)
        return Warmed(session=session, profile=_compared(known, golden, session))
    again, second = meter.run(1)
    sizes = BATCH_SIZES if session.is_batchable else (1,)
    points = _measure(meter, sizes, [first, second], budget_s=budget_s, ends_s=ends_s)
    line = fit(points)
    session.line = (line.a_ms, line.b_ms)
    profile = ProfileReport(
        digest=digest,
        threads=threads,
        a_ms=min(line.a_ms, LONGEST_MS),
        b_ms=min(line.b_ms, LONGEST_MS),
        r2=line.r2,
        load_ms=min(session.load_ms, LONGEST_MS),
        memory_bytes=max(psutil.Process().memory_info().rss - memory_before, path.stat().st_size),
        cpu_ms_per_row=min(meter.cpu_ms_per_row(), LONGEST_MS),
        golden=_if_repeated(golden, again),
    )
    return Warmed(session=session, profile=profile)


def sample_inputs(session: Session, rows: int) -> dict[str, Array]:
    """Deterministic inputs of ``rows`` rows: small random numbers, zeros for integers, empty strings."""
    return {tensor.name: _sample(tensor, rows) for tensor in session.inputs}


def _can_replace(session: Session, running: Session) -> bool:
    """Same inputs and outputs by name, type and rank; an open size may replace a fixed one, not the reverse."""
    return all(
        new.name == old.name
        and new.datatype == old.datatype
        and len(new.shape) == len(old.shape)
        and all(n in (-1, o) for n, o in zip(new.shape, old.shape, strict=True))
        for news, olds in zip(session.signature, running.signature, strict=True)
        if len(news) == len(olds)
        for new, old in zip(news, olds, strict=True)
    ) and [len(side) for side in session.signature] == [len(side) for side in running.signature]


def _compared(known: ProfileReport, golden: GoldenOutput, session: Session) -> ProfileReport | None:
    """The golden-input check: the known profile with a golden output where it had none that can be compared, else None.

    Raises AttemptFailed where the variant answers something else than it did here before.
    """
    if known.golden is not None and is_comparable(known.golden, golden):
        if not agrees(known.golden, golden):
            reason = "its answer to the golden input is not the one that it gave here before"
            raise AttemptFailed(reason, outcome=Outcome.INCOMPATIBLE)
        return None
    outputs, _ = _answer(session, 1)
    found = _if_repeated(golden, outputs)
    return known.model_copy(update={"golden": found}) if found != known.golden else None


def _if_repeated(golden: GoldenOutput, outputs: dict[str, Array]) -> GoldenOutput | None:
    """The golden output if the variant gives it twice: what draws random numbers has none."""
    return golden if agrees(golden, golden_output(outputs, computed_by=golden.computed_by)) else None


def _answer(session: Session, rows: int) -> tuple[dict[str, Array], RunCost]:
    """One run on the sample inputs, checked: as many rows as went in, and finite. Raises AttemptFailed otherwise."""
    try:
        outputs, cost = session.run_timed(sample_inputs(session, rows))
    except RunFailed as error:
        raise AttemptFailed(f"fails on a batch of {rows}: {error.reason}", outcome=Outcome.INCOMPATIBLE) from error
    for name, array in outputs.items():
        if session.is_batchable and array.shape[0] != rows:
            reason = f"output {name} has {array.shape[0]} rows for a batch of {rows}"
            raise AttemptFailed(reason, outcome=Outcome.INCOMPATIBLE)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise AttemptFailed(f"output {name} is not finite", outcome=Outcome.INCOMPATIBLE)
    return outputs, cost


@dataclass(frozen=True)
class Run:
    """One run of a profile: whether a CPU quota stopped it, its wall time, and the part of it that it worked."""

    is_throttled: bool
    service_ms: float
    busy_ms: float


def at_rest_ms(runs: Sequence[Run]) -> float:
    """What a run takes that nothing holds up, from some of one size: the lower quartile.

    A neighbour that takes the core for a moment is not the model's cost, so slow runs count for little. Runs that a CPU
    quota stopped count only where there are no others, and then by what they worked: the quota is told beside the
    profile, and would count twice.
    """
    free = sorted(run.service_ms for run in runs if not run.is_throttled) or sorted(run.busy_ms for run in runs)
    return free[(len(free) - 1) // 4]


class _Meter:
    """Times runs of a session. Before each it lets a CPU quota recover from the last, so that runs show what a request
    at low load sees, not the quota. Runs that were stopped by the quota all the same are known by the kernel's count of
    throttled periods."""

    def __init__(self, session: Session) -> None:
        quota = cpu_quota()
        self._session = session
        self._quota_cores = quota.cores if quota else None
        self._left_s = LONGEST_REST_S
        self._owed_s = 0.0
        self._cpu_ms_per_row: list[float] = []

    def cpu_ms_per_row(self) -> float:
        """The median of the runs so far; the lesser of two, since the first run of a session does more."""
        return sorted(self._cpu_ms_per_row)[(len(self._cpu_ms_per_row) - 1) // 2]

    def run(self, rows: int) -> tuple[dict[str, Array], Run]:
        """One run on the sample inputs, checked; raises AttemptFailed."""
        self._rest()
        throttles = self._throttles()
        outputs, cost = _answer(self._session, rows)
        self._cpu_ms_per_row.append(cost.cpu_ms / rows)
        if self._quota_cores is not None:
            self._owed_s = max(0.0, cost.cpu_ms / self._quota_cores - cost.service_ms) / 1000
        busy_ms = min(cost.service_ms, cost.cpu_ms / self._session.threads)
        return outputs, Run(self._throttles() > throttles, cost.service_ms, busy_ms)

    def _rest(self) -> None:
        """Sleeps until the CPU time of the last run is granted again, as far as the budget for resting goes."""
        rest_s = min(self._left_s, self._owed_s)
        self._left_s, self._owed_s = self._left_s - rest_s, 0.0
        if rest_s > 0:
            time.sleep(rest_s)

    def _throttles(self) -> int:
        return throttled_periods() if self._quota_cores is not None else 0


def _measure(
    meter: _Meter, sizes: Sequence[int], singles: list[Run], *, budget_s: float, ends_s: float
) -> list[tuple[int, float]]:
    """Run times at rest per batch size, within the budget. Sizes that would not fit are left out, but the second, which
    the slope of a fit needs, only where it would also end after ``ends_s``. ``singles`` are the runs of the first size
    so far; neither they nor resting for a quota are part of the budget."""
    left_s = budget_s
    points: list[tuple[int, float]] = []
    for index, size in enumerate(sizes):
        share_s = max(0.0, left_s) / (len(sizes) - index)
        expected_s = points[-1][1] * size / points[-1][0] / 1000 if points else 0.0
        may_take_s = left_s if len(points) != 1 else max(left_s, ends_s - time.monotonic())
        if points and expected_s > may_take_s:
            break
        took = [] if points else singles
        while not took or (len(took) < RUNS_PER_SIZE and took[-1].service_ms / 1000 < share_s):
            _, run = meter.run(size)
            took.append(run)
            share_s, left_s = share_s - run.service_ms / 1000, left_s - run.service_ms / 1000
        points.append((size, at_rest_ms(took)))
    return points


def _sample(tensor: Tensor, rows: int) -> Array:
    sizes = [OPEN_SIZE if size < 0 else size for size in tensor.shape]
    if tensor.shape[:1] == (-1,):
        sizes[0] = rows
    if tensor.dtype.kind == "f":
        # Not numpy's generators, which cost five megabytes to load: any small numbers of both signs will do.
        numbers = np.sin(np.arange(math.prod(sizes), dtype=np.float64) * 12.9898) * 1.7
        return numbers.astype(tensor.dtype).reshape(sizes)
    if tensor.dtype.kind == "O":
        return np.full(sizes, "", dtype=object)
    return np.zeros(sizes, dtype=tensor.dtype)
