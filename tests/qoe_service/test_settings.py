"""What the settings promise to processes that start together, and when Redis hangs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from qoe_service import settings as service

TOGETHER = 8


def started_together(start: Callable[[], str]) -> set[str]:
    barrier = Barrier(TOGETHER)

    def run() -> str:
        barrier.wait()
        return start()

    with ThreadPoolExecutor(TOGETHER) as pool:
        return {each.result() for each in [pool.submit(run) for _ in range(TOGETHER)]}


def test_processes_that_start_together_share_one_whole_secret_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SECRET_KEY", raising=False)
    for n in range(20):
        folder = tmp_path / str(n)
        folder.mkdir()
        monkeypatch.setattr(service, "DATA_DIR", folder)
        [key] = started_together(service._secret_key)
        assert len(key) >= 50
        assert [path.name for path in folder.iterdir()] == ["secret_key"]
        assert (folder / "secret_key").stat().st_mode & 0o777 == 0o600


def test_a_redis_that_hangs_holds_nobody_up_for_long(tmp_path: Path) -> None:
    program = (
        "from qoe_service import settings as s\n"
        "for options in (s.REDIS_TIMEOUTS_S, s.CELERY_BROKER_TRANSPORT_OPTIONS):\n"
        "    print(options['socket_timeout'], options['socket_connect_timeout'])"
    )
    environment = {**os.environ, "REDIS_URL": "redis://127.0.0.1:1/0", "DATA_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=service.BASE_DIR,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["5.0"] * 4
