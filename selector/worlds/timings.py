"""What simulated actions cost on each class of device: a family of variants by formula, or a measured table.

Nothing here varies by device or by step; `simulated.py` adds that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from selector.errors import InvalidInput
from selector.interactions import Action, Configuration, Variant
from selector.worlds.fleets import DeviceClass
from selector.worlds.sojourns import FormulaTimes, ReplayedTimes, SojournCurves, play_requests

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Member:
    """One variant of a family: time of one request alone on the reference class, and when it can be had (shares of
    the run)."""

    name: str
    one_ms: float
    accuracy: float
    precision: str
    size_bytes: int
    memory_bytes: int
    available_from: float = 0.0
    available_until: float = 1.0


@dataclass(frozen=True, slots=True)
class TableRow:
    """Raw samples of one measured cell: wall milliseconds of single executions of ``batch`` items."""

    variant: str
    quota: float
    threads: int
    callers: int
    batch: int
    samples_ms: tuple[float, ...]
    cpu_ms: float


@dataclass(frozen=True, slots=True)
class Timing:
    """Actions with the times of one request alone, shape (classes, pairs) for pairs (variant, threads); ``kind`` says
    which curves hold, ``cpu_share`` how many CPU milliseconds one millisecond of execution takes."""

    members: tuple[Member, ...]
    actions: tuple[Action, ...]
    variant: Indices
    pair: Indices
    configuration: Indices
    kind: Indices
    one_ms: Floats
    fixed: Floats
    cpu_share: Floats
    pair_variant: Indices
    pair_threads: Indices
    curves: SojournCurves


def digest_of(name: str) -> str:
    """A made-up artifact digest for a simulated variant."""
    return hashlib.sha256(f"simulated {name}".encode()).hexdigest()


def actions_of(members: Sequence[Member], configurations: Iterable[Configuration]) -> tuple[Action, ...]:
    """Every member in every configuration, members outermost."""
    bounds = tuple(configurations)
    return tuple(
        Action(
            Variant(digest_of(each.name), each.name, each.size_bytes, each.accuracy, each.precision, each.memory_bytes),
            configuration,
        )
        for each in members
        for configuration in bounds
    )


def formula_timing(
    *,
    classes: Sequence[DeviceClass],
    members: tuple[Member, ...],
    configurations: Sequence[Configuration],
    fixed_shares: Sequence[float],
    cliff: float,
    seed: int,
) -> Timing:
    """Times by formula. Kinds are the given shares of a fixed cost per batch, each with and without a cache cliff;
    which class and variant has which is drawn."""
    rng = np.random.default_rng([seed, 40_503])
    shape = len(classes), len(members)
    speed = np.array([[_precision_factor(kind, each) for each in members] for kind in classes])
    one_ms = np.array([each.one_ms for each in members]) * speed
    slot = rng.integers(0, len(fixed_shares), shape)
    has_cliff = rng.random(shape) < 0.4
    variant, configuration = (each.ravel() for each in np.indices((len(members), len(configurations))))
    return Timing(
        members=members,
        actions=actions_of(members, configurations),
        variant=variant,
        pair=variant,
        configuration=configuration,
        kind=2 * slot + has_cliff,
        one_ms=one_ms,
        fixed=np.asarray(fixed_shares, dtype=np.float64)[slot],
        cpu_share=np.ones(shape),
        pair_variant=np.arange(len(members)),
        pair_threads=np.ones(len(members), dtype=np.intp),
        curves=_formula_curves(
            tuple(fixed_shares), cliff, tuple((each.max_batch, each.max_concurrency) for each in configurations)
        ),
    )


def _precision_factor(kind: DeviceClass, member: Member) -> float:
    return kind.slowness * {"int8": kind.int8, "fp16": kind.fp16}.get(member.precision, 1.0)


@lru_cache(maxsize=8)
def _formula_curves(
    fixed_shares: tuple[float, ...], cliff: float, configurations: tuple[tuple[int, int], ...]
) -> SojournCurves:
    count = 2 * len(fixed_shares)
    source = FormulaTimes(
        fixed=np.repeat(np.asarray(fixed_shares), 2),
        cliff=np.where(np.arange(count) % 2 == 1, cliff, 1.0),
        cliff_from=np.full(count, 12.0),
    )
    return play_requests(source, configurations, seed=7)


def table_timing(
    classes: Sequence[DeviceClass],
    quotas: Sequence[float],
    members: tuple[Member, ...],
    rows: tuple[TableRow, ...],
) -> Timing:
    """Times replayed from a measured table; class i has the CPU quota ``quotas[i]`` and is ``slowness`` times slower.

    Members name rows. Raises InvalidInput naming what the table lacks.
    """
    table = _Table(rows, tuple(each.name for each in members))
    threads, batches = table.threads, table.batches
    configurations = [
        Configuration(batch, callers, count) for count in threads for callers in (1, 2) for batch in batches
    ]
    variant, place = (each.ravel() for each in np.indices((len(members), len(configurations))))
    thread = np.array([threads.index(each.threads) for each in configurations])[place]
    pair_variant, pair_thread = (each.ravel() for each in np.indices((len(members), len(threads))))
    quota_index = np.array([table.quota_index(quota) for quota in quotas])
    kind = table.kind(pair_variant[None], pair_thread[None], quota_index[:, None])
    slowness = np.array([each.slowness for each in classes])[:, None]
    bounds = tuple((batch, callers) for callers in (1, 2) for batch in batches)
    return Timing(
        members=members,
        actions=actions_of(members, configurations),
        variant=variant,
        pair=variant * len(threads) + thread,
        configuration=place % len(bounds),
        kind=kind,
        one_ms=table.one_ms[kind] * slowness,
        fixed=table.fixed[kind],
        cpu_share=table.cpu_share[kind],
        pair_variant=pair_variant,
        pair_threads=np.array(threads)[pair_thread],
        curves=_table_curves(rows, tuple(each.name for each in members), bounds),
    )


@lru_cache(maxsize=4)
def _table_curves(
    rows: tuple[TableRow, ...], names: tuple[str, ...], configurations: tuple[tuple[int, int], ...]
) -> SojournCurves:
    return play_requests(_Table(rows, names).times(), configurations, seed=7)


class _Table:
    """A measured table by kind: (variant, threads, quota)."""

    def __init__(self, rows: Sequence[TableRow], names: Sequence[str]) -> None:
        self._cells = {(row.variant, row.threads, row.quota, row.callers, row.batch): row for row in rows}
        self.threads = sorted({row.threads for row in rows})
        self.quotas = sorted({row.quota for row in rows})
        self.batches = sorted({row.batch for row in rows})
        self._names = names
        keys = [(name, count, quota) for name in names for count in self.threads for quota in self.quotas]
        alone = [[self._cell(*key, 1, batch) for batch in self.batches] for key in keys]
        self.one_ms = np.array([np.median(cells[0].samples_ms) for cells in alone])
        last = np.array([np.median(cells[-1].samples_ms) for cells in alone])
        slope = (last - self.one_ms) / (self.batches[-1] - self.batches[0])
        self.fixed = np.clip(1.0 - slope / self.one_ms, 0.0, 0.95)
        self.cpu_share = np.array([cells[0].cpu_ms / np.mean(cells[0].samples_ms) for cells in alone])
        self._keys = keys

    def kind(self, variant: Indices, thread: Indices, quota: Indices) -> Indices:
        """Position of this combination."""
        return np.asarray((variant * len(self.threads) + thread) * len(self.quotas) + quota)

    def quota_index(self, quota: float) -> int:
        """Position of this quota."""
        if quota not in self.quotas:
            raise InvalidInput("quotas", f"must be among those measured, {self.quotas}, is {quota:g}")
        return self.quotas.index(quota)

    def times(self) -> ReplayedTimes:
        """The samples in units of the median of one request alone."""
        most = max(len(cell.samples_ms) for cell in self._cells.values())
        shape = len(self._keys), 2, len(self.batches)
        samples, counts = np.zeros((*shape, most)), np.zeros(shape, dtype=np.intp)
        for index, key in enumerate(self._keys):
            for callers in (1, 2):
                for position, batch in enumerate(self.batches):
                    found = self._cell(*key, callers, batch).samples_ms
                    samples[index, callers - 1, position, : len(found)] = np.array(found) / self.one_ms[index]
                    counts[index, callers - 1, position] = len(found)
        return ReplayedTimes(samples, counts, np.array(self.batches))

    def _cell(self, name: str, threads: int, quota: float, callers: int, batch: int) -> TableRow:
        row = self._cells.get((name, threads, quota, callers, batch))
        if row is None or not row.samples_ms:
            raise InvalidInput(
                "rows", f"lack {name} with {threads} threads, {callers} callers, batch {batch} at quota {quota:g}"
            )
        return row
