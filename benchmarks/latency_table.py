"""Measured execution times in a file: raw samples by variant, CPU quota, threads, callers and batch, and what they were
measured on. Written by `measure_latency.py`, replayed by `selection.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selector.worlds.timings import TableRow

DEFAULT_TABLE = Path(__file__).parent / "data" / "latency.npz"


def save(path: Path, rows: Sequence[TableRow], about: dict[str, Any]) -> None:
    """Write a compressed table; times are rounded to single precision."""
    names = sorted({row.variant for row in rows})
    np.savez_compressed(
        path,
        about=np.array(json.dumps(about, sort_keys=True)),
        variants=np.array(names),
        variant=np.array([names.index(row.variant) for row in rows], dtype=np.int16),
        quota=np.array([row.quota for row in rows], dtype=np.float32),
        threads=np.array([row.threads for row in rows], dtype=np.int16),
        callers=np.array([row.callers for row in rows], dtype=np.int16),
        batch=np.array([row.batch for row in rows], dtype=np.int16),
        cpu_ms=np.array([row.cpu_ms for row in rows], dtype=np.float32),
        count=np.array([len(row.samples_ms) for row in rows], dtype=np.int32),
        samples_ms=np.array([each for row in rows for each in row.samples_ms], dtype=np.float32),
    )


def load(path: Path = DEFAULT_TABLE) -> tuple[tuple[TableRow, ...], dict[str, Any]]:
    """The rows, and the description of the machine that ``save`` wrote."""
    with np.load(path) as table:
        parts = np.split(table["samples_ms"].astype(np.float64), np.cumsum(table["count"])[:-1])
        names = [str(name) for name in table["variants"]]
        columns = zip(
            *(table[each].tolist() for each in ("variant", "quota", "threads", "callers", "batch", "cpu_ms")),
            parts,
            strict=True,
        )
        rows = tuple(
            TableRow(names[variant], quota, threads, callers, batch, tuple(times.tolist()), cpu_ms)
            for variant, quota, threads, callers, batch, cpu_ms, times in columns
        )
        return rows, json.loads(str(table["about"]))
