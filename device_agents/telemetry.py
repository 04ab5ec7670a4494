"""What the device is and how it feels, as far as its operating system tells; None where it does not."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from device_agents.runtime import runtime_version
from device_agents.wire import Hardware, Telemetry

# /proc/cpuinfo's words, and what the catalogue calls these instruction sets.
ISA_FLAGS: Mapping[str, str] = {
    "sse4_2": "sse42",
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_vnni": "vnni",
    "avx_vnni": "vnni",
    "avx512_bf16": "bf16",
    "amx_int8": "amx",
    "asimd": "neon",
    "asimddp": "neon-dot",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
}

MOBILE_INTERFACES = ("wwan", "ppp", "rmnet", "usb")

Network = Literal["ethernet", "wifi", "metered", "offline", "unknown"]


def hardware(root: Path = Path("/")) -> Hardware:
    """What this device is made of. ``root`` is where /proc and /sys are."""
    cpuinfo = _text(root / "proc/cpuinfo")
    quota = cpu_quota(root)
    return Hardware(
        architecture=platform.machine(),
        cpu_model=_cpu_model(cpuinfo),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=memory(root).total_bytes,
        isa=isa(cpuinfo),
        runtime_version=runtime_version(),
        cpu_quota_cores=quota.cores if quota else None,
        cpu_quota_period_ms=quota.period_ms if quota else None,
    )


def isa(cpuinfo: str) -> tuple[str, ...]:
    """The instruction sets that matter to variants, from the text of /proc/cpuinfo.

    >>> isa("flags : fpu avx2 avx512f avx512_vnni")
    ('avx2', 'avx512', 'vnni')
    >>> isa("Features : fp asimd asimddp i8mm")
    ('i8mm', 'neon', 'neon-dot')
    """
    for line in cpuinfo.splitlines():
        key, _, flags = line.partition(":")
        if key.strip().lower() in {"flags", "features"}:
            return tuple(sorted({ISA_FLAGS[flag] for flag in flags.split() if flag in ISA_FLAGS}))
    return ()


@dataclass(frozen=True, order=True)
class CpuQuota:
    """CPU time per second in cores, granted anew each period."""

    cores: float
    period_ms: float


def cpu_quota(root: Path = Path("/")) -> CpuQuota | None:
    """The CPU quota of this process's cgroup; None without one. Knows cgroup version 2 and 1."""
    quotas = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        relative = path.lstrip("/")
        if not controllers:
            quotas.append(_quota(_text(root / "sys/fs/cgroup" / relative / "cpu.max").split()))
        elif "cpu" in controllers.split(","):
            folder = root / "sys/fs/cgroup/cpu" / relative
            quotas.append(_quota([_text(folder / f"cpu.cfs_{part}_us").strip() for part in ("quota", "period")]))
    known = [quota for quota in quotas if quota is not None]
    return min(known) if known else None


@dataclass(frozen=True)
class Memory:
    """What this process may use in all, and what of it is free or can be reclaimed."""

    total_bytes: int
    free_bytes: int


def memory(root: Path = Path("/")) -> Memory:
    """That of the machine, or of this process's control group where it is less. Knows version 2 and 1."""
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        folder = root / "sys/fs/cgroup" / ("memory" if controllers else "") / path.lstrip("/")
        names = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        limit, used = (_text(folder / f"memory.{name}").strip() for name in names)
        if limit.isdigit() and used.isdigit():
            total = min(total, int(limit))
            free = min(free, max(0, int(limit) - int(used) + _inactive_file_bytes(_text(folder / "memory.stat"))))
    return Memory(total, free)


def _inactive_file_bytes(statistics: str) -> int:
    """Page cache that the kernel gives up before it ends a process."""
    values = dict(words for line in statistics.splitlines() if len(words := line.split()) == 2)
    return int(values.get("total_inactive_file", values.get("inactive_file", "0")))


def throttled_periods(root: Path = Path("/")) -> int:
    """How often a CPU quota has stopped this process's control group so far; 0 without control groups."""
    count = 0
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        relative = path.lstrip("/")
        if not controllers or "cpu" in controllers.split(","):
            folder = root / "sys/fs/cgroup" / ("cpu" if controllers else "") / relative
            words = [words for words in map(str.split, _text(folder / "cpu.stat").splitlines()) if len(words) == 2]
            count += sum(int(value) for key, value in words if key == "nr_throttled" and value.isdigit())
    return count


def package_energy_j(root: Path = Path("/")) -> float | None:
    """Joules that the processor packages used since some moment in the past (RAPL); None where that is not readable."""
    zones = (root / "sys/class/powercap").glob("*rapl:?")
    readings = [_text(zone / "energy_uj").strip() for zone in zones]
    known = [int(reading) for reading in readings if reading.isdigit()]
    return sum(known) / 1e6 if known else None


class TelemetryReader:
    """Reads telemetry; loads are those since the last reading, so each reader belongs to one loop.

    ``downlink_mbps`` tells what the network gave lately, where somebody knows.
    """

    def __init__(self, root: Path = Path("/"), *, downlink_mbps: Callable[[], float | None] = lambda: None) -> None:
        self._root = root
        self._downlink_mbps = downlink_mbps
        self._process = psutil.Process()
        self._last = self._cpu_seconds()
        self._throttles = self._throttle_count()

    def read(self) -> Telemetry:
        """The device now."""
        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
        throttles, self._throttles = self._throttles, self._throttle_count()
        return Telemetry(
            cpu_load_share=self._load_of_others(),
            memory_free_bytes=memory(self._root).free_bytes,
            temperature_c=_temperature(),
            throttled=self._throttles > throttles or self._is_cooled(),
            battery_share=min(1.0, max(0.0, battery.percent / 100)) if battery else None,
            charging=battery.power_plugged if battery else None,
            network=network(self._root),
            downlink_mbps=self._downlink_mbps(),
        )

    def _load_of_others(self) -> float:
        last, self._last = self._last, self._cpu_seconds()
        total, busy, own = (now - before for now, before in zip(self._last, last, strict=True))
        return round(min(1.0, max(0.0, (busy - own) / total)), 4) if total > 0 else 0.0

    def _cpu_seconds(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        total = float(sum(times[:8]))  # guest time, behind these eight, is counted in user time already
        own = self._process.cpu_times()
        return total, total - times.idle - getattr(times, "iowait", 0.0), own.user + own.system

    def _is_cooled(self) -> bool:
        """Whether the kernel holds the processor's frequency down because of heat, as it does on most ARM boards."""
        devices = self._root.glob("sys/class/thermal/cooling_device*")
        states = [_text(device / "cur_state").strip() for device in devices if "cpufreq" in _text(device / "type")]
        return any(state.isdigit() and int(state) > 0 for state in states)

    def _throttle_count(self) -> int:
        counts = self._root.glob("sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count")
        return sum(int(_text(path).strip() or 0) for path in counts)


def network(root: Path = Path("/")) -> Network:
    """How the device is connected, by its interface with the default route; mobile networks count as metered."""
    routes = [line.split() for line in _text(root / "proc/net/route").splitlines()[1:]]
    defaults = [words[0] for words in routes if len(words) > 1 and words[1] == "00000000"]
    routes6 = [line.split() for line in _text(root / "proc/net/ipv6_route").splitlines()]
    defaults += [words[-1] for words in routes6 if words[:2] == ["0" * 32, "00"] and words[-1] != "lo"]
    if not defaults:
        return "offline" if (root / "proc/net/route").exists() else "unknown"
    if defaults[0].startswith(MOBILE_INTERFACES):
        return "metered"
    interface = root / "sys/class/net" / defaults[0]
    # Newer kernels are often built without the first.
    return "wifi" if any((interface / name).exists() for name in ("wireless", "phy80211")) else "ethernet"


def _temperature() -> float | None:
    sensors = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    readings = [sensor.current for group in sensors.values() for sensor in group if -100 <= sensor.current <= 300]
    return max(readings, default=None)


def _cpu_model(cpuinfo: str) -> str:
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in {"model name", "hardware", "model"} and not value.strip().isdigit():
            return value.strip()[:256]
    return platform.processor()[:256]


def _quota(words: list[str]) -> CpuQuota | None:
    if len(words) != 2 or not all(word.isdigit() and int(word) for word in words):
        return None
    granted_us, period_us = map(int, words)
    return CpuQuota(cores=granted_us / period_us, period_ms=period_us / 1000)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
