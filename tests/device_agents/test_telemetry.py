"""Hardware and telemetry, read from a copy of /proc and /sys as well as from this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_agents.telemetry import (
    CpuQuota,
    TelemetryReader,
    cpu_quota,
    hardware,
    isa,
    network,
    package_energy_j,
    throttled_periods,
)


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (
            "processor: 0\nflags\t\t: fpu sse4_2 avx2 avx512f avx512_vnni amx_int8\n",
            ("amx", "avx2", "avx512", "sse42", "vnni"),
        ),
        ("Features\t: fp asimd asimddp i8mm bf16\n", ("bf16", "i8mm", "neon", "neon-dot")),
        ("nothing of use", ()),
    ],
)
def test_instruction_sets_are_named_as_the_catalogue_names_them(cpuinfo: str, expected: tuple[str, ...]) -> None:
    assert isa(cpuinfo) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/box\n", "sys/fs/cgroup/box/cpu.max": "25000 100000\n"}, CpuQuota(0.25, 100.0)),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/box\n1:memory:/\n",
                "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "5000\n",
                "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "10000\n",
            },
            CpuQuota(0.5, 10.0),
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({}, None),
    ],
    ids=["v2", "v2 unlimited", "v1", "v1 unlimited", "no cgroups"],
)
def test_the_quota_of_the_control_group_is_told(
    tmp_path: Path, files: dict[str, str], expected: CpuQuota | None
) -> None:
    for path, text in files.items():
        write(tmp_path, path, text)
    assert cpu_quota(tmp_path) == expected


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/box\n", {"box/memory.max": "1000000", "box/memory.current": "300000"}, (1_000_000, 750_000)),
        (
            "2:memory:/box\n0::/\n",
            {"memory/box/memory.limit_in_bytes": "1000000", "memory/box/memory.usage_in_bytes": "300000"},
            (1_000_000, 750_000),
        ),
        ("0::/box\n", {"box/memory.max": "max", "box/memory.current": "300000"}, None),
        ("2:cpu:/box\n", {"memory/box/memory.limit_in_bytes": "1000000"}, None),
    ],
    ids=["v2", "v1", "v2 unlimited", "of no memory"],
)
def test_memory_is_that_of_the_control_group(
    tmp_path: Path, groups: str, files: dict[str, str], expected: tuple[int, int] | None
) -> None:
    write(tmp_path, "proc/self/cgroup", groups)
    for path, text in files.items():
        write(tmp_path, f"sys/fs/cgroup/{path}", f"{text}\n")
        write(tmp_path, f"sys/fs/cgroup/{Path(path).parent}/memory.stat", "anon 100\ninactive_file 50000\n")
    found = hardware(tmp_path).memory_bytes, TelemetryReader(tmp_path).read().memory_free_bytes
    if expected is None:
        assert min(found) > 1_000_000
    else:
        assert found == expected


def test_the_network_is_that_of_the_default_route(tmp_path: Path) -> None:
    assert network(tmp_path) == "unknown"
    write(tmp_path, "proc/net/route", "Iface Destination Gateway\nlo 0000007F 00\n")
    assert network(tmp_path) == "offline"
    write(tmp_path, "proc/net/ipv6_route", f"{'0' * 32} 00 {'0' * 32} 00 {'f' * 32} 1 1 0 1 wwan0\n")
    assert network(tmp_path) == "metered"
    write(tmp_path, "proc/net/route", "Iface Destination Gateway\nwlan0 00000000 01\nlo 0000007F 00\n")
    assert network(tmp_path) == "ethernet"
    for name in ("phy80211", "wireless"):
        (tmp_path / "sys/class/net/wlan0" / name).mkdir(parents=True)
        assert network(tmp_path) == "wifi"
        (tmp_path / "sys/class/net/wlan0" / name).rmdir()


def test_thermal_throttling_is_told_when_the_count_grows(tmp_path: Path) -> None:
    count = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    write(tmp_path, count, "3\n")
    reader = TelemetryReader(tmp_path)
    assert not reader.read().throttled
    write(tmp_path, count, "4\n")
    assert reader.read().throttled
    assert not reader.read().throttled


def test_a_frequency_that_is_held_down_by_heat_is_throttling(tmp_path: Path) -> None:
    write(tmp_path, "sys/class/thermal/cooling_device0/type", "cpufreq-cpu0\n")
    write(tmp_path, "sys/class/thermal/cooling_device0/cur_state", "0\n")
    write(tmp_path, "sys/class/thermal/cooling_device1/type", "pwm-fan\n")
    write(tmp_path, "sys/class/thermal/cooling_device1/cur_state", "2\n")
    assert not TelemetryReader(tmp_path).read().throttled
    write(tmp_path, "sys/class/thermal/cooling_device0/cur_state", "3\n")
    assert TelemetryReader(tmp_path).read().throttled


def test_stops_by_the_quota_are_counted(tmp_path: Path) -> None:
    assert throttled_periods(tmp_path) == 0
    write(tmp_path, "proc/self/cgroup", "0::/box\n")
    write(tmp_path, "sys/fs/cgroup/box/cpu.stat", "usage_usec 12\nnr_periods 9\nnr_throttled 4\n")
    assert throttled_periods(tmp_path) == 4


def test_energy_is_told_where_the_processor_counts_it(tmp_path: Path) -> None:
    assert package_energy_j(tmp_path) is None
    write(tmp_path, "sys/class/powercap/intel-rapl:0/energy_uj", "2500000\n")
    write(tmp_path, "sys/class/powercap/intel-rapl:0:0/energy_uj", "9000000\n")
    assert package_energy_j(tmp_path) == 2.5


def test_this_machine_can_be_described() -> None:
    described = hardware()
    assert described.cores >= 1
    assert described.memory_bytes > 0
    assert described.runtime_version.startswith("onnxruntime ")


def test_own_work_is_no_load_of_others() -> None:
    reader = TelemetryReader()
    total = sum(index * index for index in range(2_000_000))
    reading = reader.read()
    assert total > 0
    assert 0 <= reading.cpu_load_share <= 1
    assert reading.memory_free_bytes > 0
