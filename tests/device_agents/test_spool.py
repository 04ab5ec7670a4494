"""The spool: bounded, durable, idempotent; telemetry goes before rewards."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from device_agents.spool import Kept, Spool
from device_agents.wire import Components, Feedback, FeedbackResult, FeedbackStatus
from tests.device_agents.fake_service import NOW


def spool_at(folder: Path, *, budget_bytes: int = 1_000_000, max_age_s: float = 86_400) -> Spool:
    return Spool(folder / "spool.sqlite3", budget_bytes=budget_bytes, max_age_s=max_age_s)


def reward(index: int) -> Feedback:
    return Feedback(id=f"r{index}", decision_id="d", rating=0.5)


def telemetry(index: int) -> Feedback:
    return Feedback(id=f"t{index}", decision_id="d", components=Components(requests=1))


def ids(spool: Spool, limit: int = 500) -> list[str]:
    return [feedback.id for feedback in spool.batch(now=NOW, limit=limit)]


def test_what_was_kept_is_there_after_a_restart(tmp_path: Path) -> None:
    spool = spool_at(tmp_path)
    spool.put(reward(1), now=NOW)
    spool.close()
    assert spool_at(tmp_path).batch(now=NOW) == (reward(1),)


def test_the_same_feedback_waits_once(tmp_path: Path) -> None:
    spool = spool_at(tmp_path)
    assert spool.put(reward(1), now=NOW) is Kept.KEPT
    assert spool.put(reward(1), now=NOW) is Kept.DUPLICATE
    assert len(spool) == 1


def test_rewards_go_first_and_the_newest_of_them_before_the_others(tmp_path: Path) -> None:
    spool = spool_at(tmp_path)
    for feedback in (reward(1), telemetry(1), reward(2), telemetry(2)):
        spool.put(feedback, now=NOW)
    assert ids(spool) == ["r2", "r1", "t2", "t1"]
    assert ids(spool, limit=1) == ["r2"]


def test_feedback_stays_until_it_is_settled_one_by_one(tmp_path: Path) -> None:
    spool = spool_at(tmp_path)
    for index in range(5):
        spool.put(reward(index), now=NOW)
    statuses = [FeedbackStatus.ACCEPTED, FeedbackStatus.DUPLICATE, FeedbackStatus.LATE, FeedbackStatus.REJECTED]
    spool.settle(FeedbackResult(id=f"r{index}", status=status) for index, status in enumerate(statuses))
    assert ids(spool) == ["r4"]
    assert spool.dropped() == {"rejected": 1}


def test_settling_twice_does_nothing_twice(tmp_path: Path) -> None:
    spool = spool_at(tmp_path)
    spool.put(reward(1), now=NOW)
    for _ in range(2):
        spool.settle([FeedbackResult(id="r1", status=FeedbackStatus.REJECTED)])
    assert spool.dropped() == {"rejected": 1}


def test_a_full_spool_drops_telemetry_before_rewards_and_counts_it(tmp_path: Path) -> None:
    one = len(telemetry(10).model_dump_json(exclude_defaults=True))
    spool = spool_at(tmp_path, budget_bytes=10 * one)
    for index in range(10, 18):
        spool.put(telemetry(index), now=NOW)
    for index in range(10, 40):
        spool.put(reward(index), now=NOW)
    left = ids(spool)
    assert all(name.startswith("r") for name in left)
    assert left[0] == "r39"
    assert spool.size_bytes <= 10 * one
    dropped = spool.dropped()
    assert dropped["spool_full_telemetry"] == 8
    assert dropped["spool_full_reward"] == 30 - len(left)


def test_old_feedback_expires_and_is_counted(tmp_path: Path) -> None:
    spool = spool_at(tmp_path, max_age_s=60)
    spool.put(reward(1), now=NOW - timedelta(seconds=61))
    spool.put(reward(2), now=NOW)
    assert ids(spool) == ["r2"]
    assert spool.dropped() == {"expired": 1}


def test_no_age_is_counted_before_the_time_is_known(tmp_path: Path) -> None:
    spool = spool_at(tmp_path, max_age_s=60)
    spool.put(reward(1), now=None)
    assert len(spool.batch(now=None)) == 1
    assert ids(spool) == ["r1"]
    assert spool.batch(now=NOW + timedelta(seconds=61)) == ()
    assert spool.dropped() == {"expired": 1}


def test_feedback_that_is_larger_than_the_spool_is_lost_and_says_so(tmp_path: Path) -> None:
    spool = spool_at(tmp_path, budget_bytes=10)
    assert spool.put(reward(1), now=NOW) is Kept.LOST
    assert spool.dropped() == {"spool_full_reward": 1}


def test_a_refused_feedback_is_counted(tmp_path: Path) -> None:
    spool = spool_at(tmp_path)
    spool.put(reward(1), now=NOW)
    spool.refuse("r1")
    assert (len(spool), spool.dropped()) == (0, {"refused": 1})


def test_a_damaged_file_is_put_aside_and_the_device_goes_on(tmp_path: Path) -> None:
    (tmp_path / "spool.sqlite3").write_bytes(b"no database" * 1000)
    spool = spool_at(tmp_path)
    assert spool.put(reward(1), now=NOW) is Kept.KEPT
    assert (tmp_path / "spool.damaged").exists()


def test_a_disk_that_takes_nothing_is_counted_and_raises_nothing(tmp_path: Path) -> None:
    spool = spool_at(tmp_path)
    with closing(sqlite3.connect(tmp_path / "spool.sqlite3", isolation_level=None)) as other:
        other.execute("DROP TABLE dropped")
        other.execute("DROP TABLE feedback")
        assert spool.put(reward(1), now=NOW) is Kept.LOST
        other.execute("CREATE TABLE dropped (reason TEXT PRIMARY KEY, count INTEGER NOT NULL)")
    assert spool.dropped() == {"spool_error": 1}


@pytest.mark.parametrize("count", [20_000])
def test_a_long_backlog_does_not_delay_opening(tmp_path: Path, count: int) -> None:
    spool_at(tmp_path, budget_bytes=10**9).close()
    payload = reward(1).model_dump_json(exclude_defaults=True)
    rows = ((f"x{index}", 1, NOW.timestamp(), len(payload), payload) for index in range(count))
    with closing(sqlite3.connect(tmp_path / "spool.sqlite3")) as database, database:
        database.executemany(
            "INSERT INTO feedback (id, is_reward, created_at, size_bytes, payload) VALUES (?,?,?,?,?)", rows
        )
    started_s = time.monotonic()
    spool = spool_at(tmp_path, budget_bytes=10**9)
    assert len(spool) == count
    assert time.monotonic() - started_s < 0.5


def test_a_disk_that_is_full_at_the_start_loses_nothing_that_waits_and_stops_nobody(tmp_path: Path) -> None:
    with closing(spool_at(tmp_path)) as before:
        before.put(reward(1), now=NOW)
    blocked = tmp_path / "spool.sqlite3-wal"
    blocked.unlink(missing_ok=True)
    blocked.mkdir()
    with closing(spool_at(tmp_path)) as meanwhile:
        assert meanwhile.put(reward(2), now=NOW) is Kept.KEPT
        assert ids(meanwhile) == ["r2"]
    blocked.rmdir()
    with closing(spool_at(tmp_path)) as after:
        assert ids(after) == ["r1"]
