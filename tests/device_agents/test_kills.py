"""Real agent processes under faults: a sample of what ``python -m benchmarks.delivery`` does many times over."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import delivery_faults as faults
from device_agents.wire import UpdateState


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> faults.Kills:
    """One kill -9 in every state, two at any moment, some of them with bytes that were exchanged on the way."""
    return faults.kills(tmp_path_factory.mktemp("kills"), per_state=1, arbitrary=2, devices=1)


def test_a_killed_agent_boots_to_what_the_store_says_was_committed(killed: faults.Kills) -> None:
    assert killed.boots_to_committed == killed.kills >= len(UpdateState) + 2
    if shutil.which("cc") is not None:  # without a slow disk, some states are over before they can be hit
        assert set(killed.reached) == {state.value for state in UpdateState}


def test_no_answer_comes_from_a_model_that_was_not_verified(killed: faults.Kills) -> None:
    assert killed.answers > 0
    assert killed.unverified_served == 0


def test_a_download_over_a_line_that_breaks_costs_no_byte_twice(tmp_path: Path) -> None:
    found = faults.cuts(tmp_path, downloads=1, cuts_each=3)
    assert (found.cuts, found.committed, found.unverified_served) == (3, 1, 0)
    assert found.overfetch_chunks_per_break <= 1


def test_a_disk_that_is_full_stops_neither_serving_nor_booting(tmp_path: Path) -> None:
    assert all(faults.full_disk_by_limit(tmp_path).values())
    found = faults.full_disk_by_tmpfs(tmp_path)
    assert found is None or all(found.values()), found


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path) -> None:
    found = faults.clock_jumps(tmp_path, years=(-20,))
    assert found is None or all(found.values()), found
