"""The service times known for one device: measured, borrowed or guessed. Knows neither load nor calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selector.actions import ActionTable
from selector.interactions import Profile, Variant
from selector.kept import Kept
from selector.queueing import Waiting
from selector.validation import check_profiles

Floats = NDArray[np.float64]

# Amdahl's law for one inference on several threads; ONNX Runtime on CPU, small and middling models.
PARALLEL_SHARE = 0.85
# A model nobody measured: milliseconds for one request per megabyte, and a fixed part.
MS_PER_MB, FIXED_MS = 4.0, 1.0
# Instruction sets that multiply and add int8 in one step, by the catalogue's names; without one it takes three, part of
# which memory hides.
INT8_STEP = frozenset({"vnni", "amx", "neon-dot", "i8mm"})
INT8_WITHOUT_STEP = 2.0
# No fixed part is shorter: all of a service may not take no time.
LEAST_MS = 1e-6
_MOST_KEPT = 16


@dataclass(frozen=True, slots=True)
class ServiceTime:
    """Service time ``a_ms * n + b_ms`` of one variant with so many threads, and its source."""

    a_ms: float
    b_ms: float
    source: str


@dataclass(frozen=True, slots=True)
class ServiceColumns:
    """Service times and memory of all actions, shape (actions,), and the queues that such times make."""

    a_ms: Floats
    b_ms: Floats
    waiting: Waiting
    memory_bytes: Floats
    source: tuple[str, ...]


class ProfileBook:
    """All profiles that bear on one device: its own, its class's, the server's."""

    def __init__(self, profiles: Sequence[Profile]) -> None:
        check_profiles(profiles)
        self._known: dict[str, dict[str, dict[int, Profile]]] = {"device": {}, "class": {}, "server": {}}
        for profile in profiles:
            self._known[profile.source].setdefault(profile.digest, {})[profile.threads] = profile
        self._ratio = {source: self._speed_ratio(source) for source in ("class", "server")}
        self._columns: dict[tuple[int, int, str], tuple[ActionTable, ServiceColumns]] = {}

    def columns(self, table: ActionTable, cores: int, isa: str = "") -> ServiceColumns:
        """Service times of all actions; worked out once per table."""
        found = self._columns.get((id(table), cores, isa))
        if found is not None and found[0] is table:
            return found[1]
        times = self.service_times(table.variants, table.pairs, cores, isa)
        memory = np.array([self._memory_of(variant) for variant in table.variants], dtype=np.float64)
        a_ms = np.array([time.a_ms for time in times], dtype=np.float64)[table.pair]
        b_ms = np.maximum(np.array([time.b_ms for time in times], dtype=np.float64)[table.pair], LEAST_MS)
        made = ServiceColumns(
            a_ms=a_ms,
            b_ms=b_ms,
            waiting=Waiting(table.queues, a_ms, b_ms),
            memory_bytes=memory[table.variant],
            source=tuple(times[index].source for index in table.pair.tolist()),
        )
        if len(self._columns) >= _MOST_KEPT:
            self._columns.clear()
        self._columns[id(table), cores, isa] = table, made
        return made

    def service_times(
        self, variants: Sequence[Variant], pairs: Sequence[tuple[int, int]], cores: int, isa: str = ""
    ) -> list[ServiceTime]:
        """Best known service time of each pair (index into variants, threads).

        In this order: measured on the device; on it with other threads; measured on its class, then on the server,
        times the device's speed against those where both were measured; else guessed from the size, the precision and
        the device's instruction sets (``vnni+avx2``; empty if unknown).
        """
        guess = self._size_ratio(variants, cores, isa)
        return [self._service_time(variants[index], threads, cores, isa, guess) for index, threads in pairs]

    def _service_time(self, variant: Variant, threads: int, cores: int, isa: str, guess: float) -> ServiceTime:
        own = self._known["device"].get(variant.digest)
        if own:
            source = "device" if threads in own else "device_scaled"
            return ServiceTime(*_scaled(own, threads, cores), source)
        for source in ("class", "server"):
            known = self._known[source].get(variant.digest)
            if known:
                factor = self._ratio[source]
                a_ms, b_ms = _scaled(known, threads, cores)
                return ServiceTime(a_ms * factor, b_ms * factor, source)
        one_ms = _guessed_ms(variant, threads, cores, isa) * guess
        return ServiceTime(0.8 * one_ms, 0.2 * one_ms, "size")

    def _speed_ratio(self, source: str) -> float:
        """Device time over ``source`` time, geometric mean over what both measured; 1 if nothing."""
        logs = [
            math.log(_one_ms(own) / _one_ms(other))
            for digest, by_threads in self._known["device"].items()
            for threads, own in by_threads.items()
            if (other := self._known[source].get(digest, {}).get(threads)) is not None
        ]
        return math.exp(sum(logs) / len(logs)) if logs else 1.0

    def _size_ratio(self, variants: Sequence[Variant], cores: int, isa: str) -> float:
        """Measured time over the guess, over the variants that anybody measured; 1 if none."""
        logs = []
        for variant in variants:
            for source in ("device", "class", "server"):
                known = self._known[source].get(variant.digest)
                if known:
                    scale = self._ratio[source] if source != "device" else 1.0
                    logs += [
                        math.log(scale * _one_ms(profile) / _guessed_ms(variant, threads, cores, isa))
                        for threads, profile in known.items()
                    ]
                    break
        return math.exp(sum(logs) / len(logs)) if logs else 1.0

    def _memory_of(self, variant: Variant) -> float:
        """Measured where known, else declared, else what the file alone needs."""
        for source in ("device", "class", "server"):
            known = [each.memory_bytes for each in self._known[source].get(variant.digest, {}).values()]
            if known and max(known) > 0:
                return float(max(known))
        return float(variant.memory_bytes or variant.size_bytes)


profile_book = Kept[Profile, ProfileBook](ProfileBook)


def speedup(threads: int, cores: int) -> float:
    """How much faster one inference runs on several threads (Amdahl's law).

    >>> speedup(1, 4), round(speedup(4, 4), 2), speedup(8, 4) == speedup(4, 4)
    (1.0, 2.76, True)
    """
    return 1.0 / (1.0 - PARALLEL_SHARE + PARALLEL_SHARE / min(threads, max(cores, 1)))


def _one_ms(profile: Profile) -> float:
    return profile.a_ms + profile.b_ms


def _guessed_ms(variant: Variant, threads: int, cores: int, isa: str) -> float:
    is_slow = variant.precision == "int8" and isa and INT8_STEP.isdisjoint(isa.split("+"))
    ms_per_mb = MS_PER_MB * (INT8_WITHOUT_STEP if is_slow else 1.0)
    return (ms_per_mb * variant.size_bytes / 1e6 + FIXED_MS) / speedup(threads, cores)


def _scaled(known: dict[int, Profile], threads: int, cores: int) -> tuple[float, float]:
    """(a, b) in ms of the profile with the same, else the nearest, number of threads."""
    nearest = min(known, key=lambda each: (abs(math.log(each / threads)), each))
    scale = speedup(nearest, cores) / speedup(threads, cores)
    return known[nearest].a_ms * scale, known[nearest].b_ms * scale
