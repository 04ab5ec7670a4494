"""A database file, for tests in which several threads write: SQLite in memory cannot make them wait for each other."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db import connection, connections
from django.db.backends.base.base import BaseDatabaseWrapper

RunTogether = Callable[..., list[Any]]


@pytest.fixture
def database_file(transactional_db: None, tmp_path: Path) -> Iterator[None]:
    """Moves the default connection to a copy of the test database on disk, where it has one."""
    if connection.vendor != "sqlite":
        yield
        return
    path = tmp_path / "service.sqlite3"
    before = connections["default"]
    configured = connections.settings["default"]
    before.ensure_connection()
    with sqlite3.connect(path) as copy:
        before.connection.backup(copy)
    copy.close()
    connections.settings["default"] = {**configured, "NAME": str(path)}
    connections["default"] = connections.create_connection("default")
    yield
    connections["default"].close()
    connections.settings["default"] = configured
    connections["default"] = before


@pytest.fixture
def run_together(database_file: None) -> RunTogether:
    """Calls functions at the same moment in threads of their own; returns their results in order."""

    def run(*functions: Callable[[], Any]) -> list[Any]:
        barrier = threading.Barrier(len(functions))
        results: list[Any] = [None] * len(functions)

        def work(index: int, function: Callable[[], Any]) -> None:
            mine: BaseDatabaseWrapper = connections["default"]
            try:
                barrier.wait(timeout=10)
                results[index] = function()
            except BaseException as error:  # noqa: BLE001  (whatever went wrong is raised again below)
                results[index] = error
            finally:
                mine.close()

        threads = [threading.Thread(target=work, args=pair) for pair in enumerate(functions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    return run
