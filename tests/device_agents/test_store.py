"""The state folder: private, atomic, bounded."""

from __future__ import annotations

import fcntl
import os
import stat
import threading
from pathlib import Path

import pytest

from device_agents.errors import AttemptFailed, BadConfiguration
from device_agents.store import Identity, Record, Store
from device_agents.wire import Outcome, ProfileReport
from tests.device_agents.models import Model

IDENTITY = Identity(service_url="https://x", device_id="d", credential="secret")


def keep(store: Store, content: bytes, *, used_at: float) -> str:
    model = Model(content)
    store.part(model.digest).write_bytes(content)
    path = store.accept_part(model.digest)
    os.utime(path, (used_at, used_at))
    return model.digest


def test_a_credential_is_private_even_under_a_lax_umask(store: Store) -> None:
    before = os.umask(0)
    try:
        store.save_identity(IDENTITY)
    finally:
        os.umask(before)
    assert stat.S_IMODE((store.folder / "identity.json").stat().st_mode) == 0o600
    assert store.identity() == IDENTITY


def test_a_half_written_file_beside_a_record_changes_nothing(store: Store) -> None:
    store.save_record(Record(application="digits", model_name="digits"))
    (store.folder / "applications" / "digits.new").write_text('{"application": "dig')
    assert [record.application for record in store.records()] == ["digits"]


def test_a_damaged_record_is_put_aside_for_its_owner(store: Store) -> None:
    path = store.folder / "applications" / "digits.json"
    path.write_text("{")
    assert store.records() == ()
    assert path.with_suffix(".damaged").exists()


def test_two_agents_cannot_share_a_folder(store: Store, tmp_path: Path) -> None:
    store.lock()
    other = Store(tmp_path / "state", disk_budget_bytes=1)
    with pytest.raises(BadConfiguration, match="another agent"):
        other.lock()
    store.unlock()
    other.lock()
    other.unlock()


def test_asking_whether_a_folder_is_in_use_keeps_no_agent_from_it(store: Store) -> None:
    store.lock()
    store.unlock()
    handle = os.open(store.folder / "agent.lock", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)  # as `qoe-agent status` does for a moment
    asked = threading.Timer(0.03, os.close, (handle,))
    asked.start()
    store.lock()
    asked.join()
    assert store.is_in_use()
    store.unlock()
    assert not store.is_in_use()


def test_room_is_made_by_evicting_what_was_used_longest_ago(tmp_path: Path) -> None:
    store = Store(tmp_path, disk_budget_bytes=300)
    oldest, middle, newest = (keep(store, bytes([i]) * 100, used_at=i) for i in range(3))
    store.make_room(digest="f" * 64, size_bytes=150, keep={oldest})
    assert set(store.cached_digests()) == {oldest}
    assert middle != newest


def test_what_runs_is_never_evicted(tmp_path: Path) -> None:
    store = Store(tmp_path, disk_budget_bytes=150)
    running = keep(store, b"r" * 100, used_at=1)
    with pytest.raises(AttemptFailed) as failed:
        store.make_room(digest="f" * 64, size_bytes=100, keep={running})
    assert failed.value.outcome is Outcome.NO_SPACE
    assert store.has_artifact(running)


def test_what_is_fetched_already_needs_no_room_again(tmp_path: Path) -> None:
    store = Store(tmp_path, disk_budget_bytes=100)
    store.part("f" * 64).write_bytes(b"x" * 90)
    store.make_room(digest="f" * 64, size_bytes=100, keep=set())
    assert store.part("f" * 64).stat().st_size == 90


def test_the_reserve_of_the_disk_is_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path, disk_budget_bytes=10**9, disk_reserve_bytes=10**18)
    with pytest.raises(AttemptFailed):
        store.make_room(digest="f" * 64, size_bytes=1, keep=set())


def test_the_newest_profile_of_a_pair_stands(store: Store) -> None:
    for a_ms in (1.0, 2.0):
        store.save_profile(ProfileReport(digest="a" * 64, threads=1, a_ms=a_ms, b_ms=0))
    store.save_profile(ProfileReport(digest="a" * 64, threads=2, a_ms=9, b_ms=0))
    assert sorted((profile.threads, profile.a_ms) for profile in store.profiles()) == [(1, 2.0), (2, 9.0)]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadConfiguration, match="state_dir"):
        Store(tmp_path / "file" / "state", disk_budget_bytes=1)


def test_what_failed_here_and_beginnings_of_other_downloads_go_before_what_did_well(tmp_path: Path) -> None:
    store = Store(tmp_path, disk_budget_bytes=300)
    oldest, failed = keep(store, b"o" * 100, used_at=1), keep(store, b"f" * 100, used_at=2)
    store.part("e" * 64).write_bytes(b"x" * 100)
    store.demote(failed)
    store.make_room(digest="f" * 64, size_bytes=100, keep=set())
    assert not store.part("e" * 64).exists()
    assert set(store.cached_digests()) == {oldest, failed}
    store.make_room(digest="f" * 64, size_bytes=200, keep=set())
    assert set(store.cached_digests()) == {oldest}


def test_a_download_of_another_application_is_no_room(tmp_path: Path) -> None:
    store = Store(tmp_path, disk_budget_bytes=150)
    with store.bringing("e" * 64, is_cancelled=lambda: False):
        store.part("e" * 64).write_bytes(b"x" * 100)
        with pytest.raises(AttemptFailed):
            store.make_room(digest="f" * 64, size_bytes=100, keep=set())


def test_a_credential_that_others_can_read_is_taken_away_from_them(store: Store) -> None:
    store.save_identity(IDENTITY)
    (store.folder / "identity.json").chmod(0o644)
    store.secure_identity()
    assert stat.S_IMODE((store.folder / "identity.json").stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root writes into the folder of somebody else")
def test_what_root_writes_belongs_to_whom_the_folder_belongs(store: Store) -> None:
    os.chown(store.folder, 65534, 65533)
    store.save_identity(IDENTITY)
    found = (store.folder / "identity.json").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (65534, 65533, 0o600)


def test_a_file_that_cannot_be_read_is_named(store: Store) -> None:
    (store.folder / "identity.json").mkdir()
    with pytest.raises(BadConfiguration, match=r"identity\.json: Is a directory"):
        store.identity()
