"""Measures contestants in turns, in one process, on one thread; and says who beats whom."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks.compression_cases import Case
from benchmarks.compression_peers import BASE, OURS, PEER, WORKERS, Contestant

ROUNDS, SAME, FASTER, POINT = 7, 1.03, 1.15, 0.01
WORST_POINTS = 0.05  # corner of the hypervolume: this much less accurate than the base, and as slow as it


@dataclass(frozen=True)
class Result:
    """``right`` [samples] says which held-out answers were right; times are of one picture, milliseconds."""

    contestant: Contestant
    right: NDArray[np.bool_]
    times_ms: tuple[float, ...]
    size_bytes: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.right.mean())

    @property
    def latency_ms(self) -> float:
        """Median over rounds of a round's lower quartile."""
        return statistics.median(self.times_ms)

    def gain_over(self, other: Result) -> tuple[float, float, float]:
        """Difference of accuracies and its 95 % interval, from the pictures on which the two differ (paired)."""
        only_mine, only_its = (self.right & ~other.right).sum(), (other.right & ~self.right).sum()
        count, difference = len(self.right), float(only_mine - only_its) / len(self.right)
        half = 1.96 * math.sqrt(max(float(only_mine + only_its) - count * difference**2, 0.0)) / count
        return difference, difference - half, difference + half

    def is_no_less_accurate(self, other: Result) -> bool:
        """Whether the interval of the difference does not lie below zero."""
        return self.gain_over(other)[2] >= 0


def measure(case: Case, contestants: Sequence[Contestant], seconds: float) -> list[Result]:
    """Accuracy on all held-out pictures, then times in rounds that visit every contestant, ``seconds`` each in all."""
    sessions = [_session(each) for each in contestants]
    with ThreadPoolExecutor(WORKERS) as pool:
        rights = list(pool.map(lambda session: _right(session, case), sessions))
    picture = {"image": case.data.heldout_inputs[:1]}
    times: list[list[float]] = [[] for _ in contestants]
    for _ in range(ROUNDS):
        for session, found in zip(sessions, times, strict=True):
            found.append(_round(session, picture, seconds / ROUNDS))
    sizes = [each.path.stat().st_size for each in contestants]
    return [Result(*parts) for parts in zip(contestants, rights, map(tuple, times), sizes, strict=True)]


def verdict(results: Sequence[Result]) -> dict[str, object]:
    """Which peers are matched (no slower within 3 %, no less accurate), and whether ours is ahead of all of them."""
    mine, peers = ([each for each in results if each.contestant.side == side] for side in (OURS, PEER))
    known = {each.contestant.digest for each in peers}
    own = [each for each in mine if each.contestant.digest not in known]
    matched = [
        peer.contestant.name
        for peer in peers
        if any(each.latency_ms <= SAME * peer.latency_ms and each.is_no_less_accurate(peer) for each in mine)
    ]
    return {
        "peers": [each.contestant.name for each in peers],
        "ours_dominates": matched,
        "ours_is_ahead": _ahead(own, peers),
        "hypervolume_ours": hypervolume(results, OURS),
        "hypervolume_peers": hypervolume(results, PEER),
    }


def _ahead(own: Sequence[Result], peers: Sequence[Result]) -> str:
    """Name of ours that is 15 % faster at equal accuracy, or a point better at equal latency, than the best peer.

    The best peer is the fastest of those that are no less accurate than the most accurate one.
    """
    if not peers:
        return ""
    top = max(peers, key=lambda each: each.accuracy)
    best = min((each for each in peers if each.is_no_less_accurate(top)), key=lambda each: each.latency_ms)
    for each in sorted(own, key=lambda each: each.latency_ms):
        faster = each.latency_ms * FASTER <= best.latency_ms and each.is_no_less_accurate(best)
        better = each.latency_ms <= SAME * best.latency_ms and each.accuracy >= best.accuracy + POINT
        if faster or better:
            return each.contestant.name
    return ""


def hypervolume(results: Sequence[Result], side: str) -> float:
    """Area that a side's points (and the base) cover, in shares of the base's latency × points of accuracy."""
    base = next(each for each in results if each.contestant.side == BASE)
    floor = base.accuracy - WORST_POINTS
    chosen = [each for each in results if each.contestant.side in {side, BASE}]
    points = sorted((min(each.latency_ms / base.latency_ms, 1.0), each.accuracy - floor) for each in chosen)
    area, best = 0.0, 0.0
    edges = [latency for latency, _ in points[1:]] + [1.0]
    for (latency, gain), until in zip(points, edges, strict=True):
        best = max(best, gain)
        area += best * (until - latency)
    return round(area * 100, 3)


def _session(contestant: Contestant) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(contestant.path), options, providers=["CPUExecutionProvider"])


def _right(session: onnxruntime.InferenceSession, case: Case) -> NDArray[np.bool_]:
    inputs, labels = case.data.heldout_inputs, case.data.heldout_labels
    batches = [session.run(None, {"image": inputs[start : start + 64]})[0] for start in range(0, len(inputs), 64)]
    return np.asarray(np.concatenate(batches).argmax(axis=1) == labels)


def _round(session: onnxruntime.InferenceSession, picture: Mapping[str, object], seconds: float) -> float:
    found, ends = list[float](), time.perf_counter() + seconds
    session.run(None, picture)
    while len(found) < 5 or time.perf_counter() < ends:
        start = time.perf_counter()
        session.run(None, picture)
        found.append((time.perf_counter() - start) * 1e3)
    return statistics.quantiles(found, n=4)[0]
