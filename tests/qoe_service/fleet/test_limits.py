from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path

import pytest
from django.conf import LazySettings
from redis import Redis

from qoe_service.errors import TooManyRequests
from qoe_service.fleet import limits
from tests.builders import NOW
from tests.qoe_service import calls
from tests.system.backends import free_port, private_redis


def test_a_new_minute_brings_new_requests() -> None:
    limits.take(caller="device:a", limit=1, now=NOW)
    with pytest.raises(TooManyRequests) as refused:
        limits.take(caller="device:a", limit=1, now=NOW + timedelta(seconds=20))
    assert refused.value.retry_after_s == 40
    limits.take(caller="device:a", limit=1, now=NOW + timedelta(seconds=60))


def test_many_callers_are_all_remembered() -> None:
    for n in range(1000):
        limits.take(caller=f"device:{n}", limit=1, now=NOW)
    for n in range(1000):
        with pytest.raises(TooManyRequests):
            limits.take(caller=f"device:{n}", limit=1, now=NOW)


@pytest.mark.django_db
@pytest.mark.parametrize(("is_trusted", "statuses"), [(True, [401, 401, 429]), (False, [401, 429, 429])])
def test_enrolments_are_counted_by_the_address_that_the_proxy_saw(
    settings: LazySettings, is_trusted: bool, statuses: list[int]
) -> None:
    settings.ENROLMENTS_PER_MINUTE, settings.TRUST_PROXY = 1, is_trusted
    body = {"token": "w" * 43, "name": "a"}
    chains = ["10.0.0.1", "10.0.0.2", "claimed, 10.0.0.2"]
    answers = [
        calls.post("/api/v1/devices/enrol", body, credential=None, X_Forwarded_For=chain).status_code
        for chain in chains
    ]
    assert answers == statuses


def test_web_processes_that_share_redis_share_the_count(settings: LazySettings, tmp_path: Path) -> None:
    port = free_port()
    with private_redis(tmp_path, port) as is_there:
        if not is_there:
            (pytest.fail if os.environ.get("CI") else pytest.skip)("redis-server is not here")
        settings.REDIS_URL = f"redis://127.0.0.1:{port}/0"
        limits.take(caller="device:a", limit=2, now=NOW)
        with Redis(port=port) as redis:  # as another process counts
            (key,) = redis.keys("limit:*")
            assert 60 < redis.ttl(key) <= 120
            redis.incr(key)
        with pytest.raises(TooManyRequests):
            limits.take(caller="device:a", limit=2, now=NOW)
        limits.take(caller="device:b", limit=2, now=NOW)


def test_a_redis_that_never_answers_keeps_nobody_for_long(settings: LazySettings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings.REDIS_URL = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        settings.REDIS_TIMEOUTS_S = {"socket_timeout": 0.05, "socket_connect_timeout": 0.05}
        for _ in range(3):
            limits.take(caller="device:a", limit=1, now=NOW)


def test_without_redis_nobody_is_kept_out(settings: LazySettings, caplog: pytest.LogCaptureFixture) -> None:
    settings.REDIS_URL = "redis://127.0.0.1:1"
    for _ in range(3):
        limits.take(caller="device:a", limit=1, now=NOW)
    assert caplog.text.count("Redis is away") == 1
