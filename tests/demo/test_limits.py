"""CPU limits: real where control groups can be written, and gone afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from demo.devices import DEVICES, CpuLimit, Errand, Site, agent_settings, app_program, toml
from demo.limits import CpuGroup, open_cpu_group, parents

BUSY = "import time; end = time.perf_counter() + 1\nwhile time.perf_counter() < end: pass\nprint(time.process_time())"


def version_2(root: Path, own: str) -> Path:
    (root / "hierarchy" / own).mkdir(parents=True)
    (root / "hierarchy" / "cgroup.controllers").write_text("cpu memory")
    membership = root / "own"
    membership.write_text(f"0::/{own}\n")
    return membership


def test_a_limited_process_gets_its_share_of_cpu_time_and_its_group_goes() -> None:
    group = open_cpu_group(f"edge-qoe-test-{os.getpid()}", cores=0.2)
    if group is None:
        # Without control groups the promise is the label, which the next test checks.
        assert CpuLimit(DEVICES[0], "edge-qoe-test").label == "emulated"
        return
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True) as process:
        group.add(process.pid)
        printed, _ = process.communicate(timeout=30)
    group.remove()
    assert float(printed) < 0.5
    assert not group.folder.exists()


def test_version_2_groups_are_looked_for_below_our_own_and_then_at_the_top(tmp_path: Path) -> None:
    membership = version_2(tmp_path, "user.slice/session")
    hierarchy = tmp_path / "hierarchy"
    assert list(parents(hierarchy, membership)) == [hierarchy / "user.slice" / "session", hierarchy]


@pytest.mark.parametrize(("cores", "written"), [(0.25, "1000 4000"), (0.04, "1000 25000"), (1.5, "1500 1000")])
def test_a_version_2_limit_is_written_as_quota_and_period(tmp_path: Path, cores: float, written: str) -> None:
    (tmp_path / "cpu.max").write_text("max 100000")
    CpuGroup(tmp_path).limit(cores)
    assert (tmp_path / "cpu.max").read_text() == written


def test_a_machine_without_control_groups_offers_no_place(tmp_path: Path) -> None:
    assert list(parents(tmp_path, tmp_path / "missing")) == []


@pytest.mark.parametrize(("has_group", "label", "quota"), [(True, "real", 0.0), (False, "emulated", 0.4)])
def test_labels_say_whether_the_limit_is_real(tmp_path: Path, has_group: bool, label: str, quota: float) -> None:
    limit = CpuLimit.__new__(CpuLimit)
    limit.group = CpuGroup(tmp_path) if has_group else None
    tablet = next(device for device in DEVICES if device.name == "tablet")
    settings = agent_settings(tablet, Site(tmp_path, "http://127.0.0.1:1", 2), limit)
    assert settings["labels"]["cpu-limit"] == label
    assert settings["labels"]["users"] == "simulated"
    assert settings["cpu_quota_emulated"] == quota


def test_settings_are_written_so_that_toml_reads_the_same(tmp_path: Path) -> None:
    settings = {"name": 'a "b"', "port": 80, "quota": 0.25, "labels": {"applications": "digits,parity"}}
    assert tomllib.loads(toml(settings)) == settings


def test_an_app_without_a_key_rates_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path, "http://127.0.0.1:1", 2)
    arguments = app_program(DEVICES[0], site, Errand("digits", tmp_path / "d.npz", None)).arguments
    assert "--service-url" not in arguments


def test_the_devices_spread_tenfold_and_all_serve_digits() -> None:
    quotas = [device.cpu_quota for device in DEVICES]
    assert len(DEVICES) == 6
    assert max(quotas) >= 8 * min(quotas)
    assert all("digits" in device.applications for device in DEVICES)
    assert sum("parity" in device.applications for device in DEVICES) in {2, 3}
