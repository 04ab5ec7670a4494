"""Where a control group may be made, told from what the kernel says, and what becomes of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qoe_service.catalogue import control_groups

MIB = 2**20
OLD = "40 31 0:30 / {mount} rw - cgroup cgroup rw,memory"
NEW = "41 31 0:31 / {mount} rw - cgroup2 cgroup2 rw"


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    """A tree of groups as a kernel shows it: the files that decide are there."""
    for folder in (tmp_path / "tree", tmp_path / "tree" / "service", tmp_path / "tree" / "service" / "worker"):
        folder.mkdir()
        (folder / "cgroup.procs").touch()
        (folder / "cgroup.subtree_control").write_text("")
    return tmp_path / "tree"


def processes(tmp_path: Path, groups: str, mounts: str) -> Path:
    folder = tmp_path / "self"
    folder.mkdir()
    (folder / "cgroup").write_text(groups)
    (folder / "mountinfo").write_text(f"23 1 0:1 / / rw - ext4 /dev/root rw\n{mounts}\n")
    return folder


def test_in_version_one_the_group_is_made_below_ones_own(tmp_path: Path, mount: Path) -> None:
    seen = processes(tmp_path, "9:name=systemd:/\n4:cpu,memory:/service\n0::/\n", OLD.format(mount=mount))
    assert control_groups.place(seen) == mount / "service"


@pytest.mark.parametrize(("handed_to", "expected"), [("service", "service"), ("service/worker", "service/worker")])
def test_in_version_two_it_is_where_the_controller_is_handed_down(
    tmp_path: Path, mount: Path, handed_to: str, expected: str
) -> None:
    (mount / handed_to / "cgroup.subtree_control").write_text("cpu memory")
    seen = processes(tmp_path, "0::/service/worker\n", NEW.format(mount=mount))
    assert control_groups.place(seen) == mount / expected


@pytest.mark.parametrize("groups", ["0::/service/worker\n", "0::/elsewhere\n", "4:cpu:/service\n", "nonsense", ""])
def test_without_the_controller_there_is_none(tmp_path: Path, mount: Path, groups: str) -> None:
    seen = processes(tmp_path, groups, NEW.format(mount=mount) + "\n" + OLD.format(mount=mount))
    assert control_groups.place(seen) is None


def test_a_container_sees_its_group_from_below_the_root(tmp_path: Path, mount: Path) -> None:
    (mount / "cgroup.subtree_control").write_text("memory")
    line = NEW.format(mount=mount).replace(" / /", " /pod/7 /", 1)
    assert control_groups.place(processes(tmp_path, "0::/pod/7\n", line)) == mount


def test_a_group_that_cannot_be_limited_is_taken_away_again(tmp_path: Path) -> None:
    with control_groups.limited(64 * MIB, parent=tmp_path) as group:
        assert group is None
    assert not list(tmp_path.iterdir())


def test_the_kernel_itself_ends_who_needs_more() -> None:
    with control_groups.limited(32 * MIB) as group:
        if group is None:
            pytest.skip("no control group can be made here; doctor says so")
        assert not group.ran_out_of_memory()
        program = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); held = bytearray(2**27)"
        done = subprocess.run([sys.executable, "-I", "-c", program, str(group.members)], check=False)
        assert done.returncode == -9
        assert group.ran_out_of_memory()
    assert not group.folder.exists()
