"""Feedback on its way to the service: a bounded SQLite queue on disk that loses telemetry before rewards.

Opening reads no records, whatever the backlog. Sending belongs to the agent's loop; here is only what is kept.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from device_agents.wire import FEEDBACK_BATCH_LIMIT, Feedback, FeedbackResult, FeedbackStatus

logger = logging.getLogger("qoe_agent.spool")

SCHEMA = """
CREATE TABLE IF NOT EXISTS feedback (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    is_reward INTEGER NOT NULL,
    created_at REAL NOT NULL,
    size_bytes INTEGER NOT NULL,
    payload TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS least_valuable_first ON feedback (is_reward, sequence);
CREATE INDEX IF NOT EXISTS oldest_first ON feedback (created_at);
CREATE TABLE IF NOT EXISTS dropped (reason TEXT PRIMARY KEY, count INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS total (only INTEGER PRIMARY KEY CHECK (only = 1), records INTEGER, size_bytes INTEGER);
INSERT OR IGNORE INTO total VALUES (1, 0, 0);
CREATE TRIGGER IF NOT EXISTS count_in AFTER INSERT ON feedback BEGIN
    UPDATE total SET records = records + 1, size_bytes = size_bytes + new.size_bytes;
END;
CREATE TRIGGER IF NOT EXISTS count_out AFTER DELETE ON feedback BEGIN
    UPDATE total SET records = records - 1, size_bytes = size_bytes - old.size_bytes;
END;
"""
UNKNOWN = 0.0  # kept before the service's time was known
LEAST_VALUABLE = "SELECT sequence, is_reward FROM feedback ORDER BY is_reward, sequence LIMIT 1"


class Kept(StrEnum):
    """What became of feedback that was handed to the spool."""

    KEPT = "accepted"
    DUPLICATE = "duplicate"
    LOST = "lost"


def is_reward(feedback: Feedback) -> bool:
    """Whether the learner needs it: the end of a lease, or a user's rating. The rest is telemetry."""
    return feedback.lease_closed or feedback.rating is not None


def _open(path: Path | str) -> sqlite3.Connection:
    database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    # FULL: a reward that was acknowledged to an app must survive a power cut.
    database.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;" + SCHEMA)
    return database


class Spool:
    """A bounded, durable, idempotent queue. Safe to use from several threads.

    ``now`` is the service's time, or None before it is known: ages are counted by no clock that the device could have
    set wrong, and what was kept before is as old as the first known time.
    """

    def __init__(self, path: Path, *, budget_bytes: int, max_age_s: float) -> None:
        self._budget = budget_bytes
        self._max_age_s = max_age_s
        self._lock = threading.Lock()
        self._lost = 0
        try:
            self._database = _open(path)
        except sqlite3.OperationalError:
            # A full disk must not keep the device from serving either. What waits in the file is sent by a later start.
            logger.exception("cannot open spool=%s: feedback is kept in memory until the next start", path)
            self._database = _open(":memory:")
        except sqlite3.DatabaseError:
            # A damaged queue must not keep the device from serving: put it aside for its owner, begin anew.
            logger.exception("unreadable spool=%s kept as .damaged", path)
            path.replace(path.with_suffix(".damaged"))
            self._database = _open(path)

    def put(self, feedback: Feedback, *, now: datetime | None) -> Kept:
        """Keeps one feedback, unless its id is already waiting; what is lost is counted."""
        try:
            return self._insert(feedback, now)
        except sqlite3.Error:
            logger.exception("lost feedback=%s", feedback.id)
            self._lost += 1
            return Kept.LOST

    def _insert(self, feedback: Feedback, now: datetime | None) -> Kept:
        payload = feedback.model_dump_json(exclude_defaults=True)
        row = (feedback.id, is_reward(feedback), now.timestamp() if now else UNKNOWN, len(payload.encode()), payload)
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            added = self._database.execute(
                "INSERT OR IGNORE INTO feedback (id, is_reward, created_at, size_bytes, payload) VALUES (?,?,?,?,?)",
                row,
            ).rowcount
            self._shrink(now)
            is_here = bool(self._one("SELECT count(*) FROM feedback WHERE id = ?", feedback.id))
        if not is_here:
            return Kept.LOST
        return Kept.KEPT if added else Kept.DUPLICATE

    def batch(self, *, now: datetime | None, limit: int = FEEDBACK_BATCH_LIMIT) -> tuple[Feedback, ...]:
        """The newest waiting feedback, at most ``limit``; it stays until ``settle``."""
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._shrink(now)
            rows = self._database.execute(
                "SELECT payload FROM feedback ORDER BY is_reward DESC, sequence DESC LIMIT ?", (limit,)
            ).fetchall()
        return tuple(Feedback.model_validate_json(payload) for (payload,) in rows)

    def settle(self, results: Iterable[FeedbackResult]) -> None:
        """Removes what the service has answered for; what it rejected is lost and counted."""
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            for result in results:
                removed = self._database.execute("DELETE FROM feedback WHERE id = ?", (result.id,)).rowcount
                if removed and result.status is FeedbackStatus.REJECTED:
                    self._count_drop("rejected")

    def refuse(self, feedback_id: str) -> None:
        """Gives up one feedback that the service will never take."""
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            if self._database.execute("DELETE FROM feedback WHERE id = ?", (feedback_id,)).rowcount:
                self._count_drop("refused")

    def dropped(self) -> dict[str, int]:
        """Feedback lost so far, by reason; only grows."""
        try:
            with self._lock:
                dropped = dict(self._database.execute("SELECT reason, count FROM dropped").fetchall())
        except sqlite3.Error:
            logger.exception("the spool cannot be read")
            dropped = {}
        return dropped | ({"spool_error": self._lost} if self._lost else {})

    def __len__(self) -> int:
        try:
            with self._lock:
                return self._one("SELECT records FROM total")
        except sqlite3.Error:
            logger.exception("the spool cannot be read")
            return 0

    @property
    def size_bytes(self) -> int:
        """Bytes of waiting feedback."""
        with self._lock:
            return self._one("SELECT size_bytes FROM total")

    def close(self) -> None:
        """Ends the use of the file."""
        with self._lock:
            self._database.close()

    def _shrink(self, now: datetime | None) -> None:
        if now is not None:
            self._database.execute(
                "UPDATE feedback SET created_at = ? WHERE created_at = ?", (now.timestamp(), UNKNOWN)
            )
            oldest = now.timestamp() - self._max_age_s
            expired = self._database.execute("DELETE FROM feedback WHERE created_at < ?", (oldest,)).rowcount
            self._count_drop("expired", expired)
        while self._one("SELECT size_bytes FROM total") > self._budget:
            sequence, reward = self._database.execute(LEAST_VALUABLE).fetchone()
            self._database.execute("DELETE FROM feedback WHERE sequence = ?", (sequence,))
            self._count_drop("spool_full_reward" if reward else "spool_full_telemetry")

    def _count_drop(self, reason: str, count: int = 1) -> None:
        if count:
            self._database.execute(
                "INSERT INTO dropped VALUES (?, ?) ON CONFLICT (reason) DO UPDATE SET count = count + excluded.count",
                (reason, count),
            )

    def _one(self, query: str, *values: Any) -> int:
        return int(self._database.execute(query, values).fetchone()[0])
