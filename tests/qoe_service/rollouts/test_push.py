from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import pytest
from django.conf import LazySettings
from prometheus_client.parser import text_string_to_metric_families

from qoe_service.rollouts import push
from tests.qoe_service.served import Enrolled, Served, Stream


@pytest.fixture(scope="module")
def device(served: Served) -> Enrolled:
    return served.enrol("pushed")[0]


@pytest.fixture
def stream(served: Served, device: Enrolled) -> Iterator[Stream]:
    with Stream(served, device) as opened:
        yield opened


def listeners(served: Served) -> float:
    families = text_string_to_metric_families(httpx.get(served.url + "/metrics").text)
    return next(each.samples[0].value for each in families if each.name == "qoe_wake_up_clients")


def wait_until(is_true: Callable[[], bool], seconds: float = 5) -> None:
    ends = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_a_change_wakes_its_device_within_a_second(served: Served, device: Enrolled, stream: Stream) -> None:
    waited_s = []
    for version in (101, 102, 103):
        served.change(device, version)
        waited_s.append(stream.wake(version))
    assert statistics.median(waited_s) < 1


def test_a_change_made_before_connecting_is_told_at_once(served: Served, device: Enrolled) -> None:
    served.change(device, 110)
    with Stream(served, device) as late:
        late.wake(110)


def test_a_change_of_another_device_wakes_nobody_else(served: Served, device: Enrolled, stream: Stream) -> None:
    [other] = served.enrol("other")
    with Stream(served, other) as theirs:
        served.change(other, 7)
        theirs.wake(7)
    served.change(device, 120)
    stream.wake(120)
    assert not stream.has_heard(b'"version": 7')


def test_a_stream_outlives_a_database_that_is_away_for_a_while(
    served: Served, device: Enrolled, stream: Stream
) -> None:
    served.change(device, 140)
    stream.wake(140)
    served.execute("ALTER TABLE rollouts_change RENAME TO rollouts_change_away")
    wait_until(lambda: "database is away" in served.log())
    served.execute("ALTER TABLE rollouts_change_away RENAME TO rollouts_change")
    served.change(device, 141)
    stream.wake(141)
    assert served.log().count("database is away") == 1, "an outage is one line, not four a second"


def test_fifty_streams_hold_no_connection_and_no_thread_each(served: Served) -> None:
    devices = served.enrol(*(f"many-{n}" for n in range(50)))
    with ExitStack() as stack:
        stack.enter_context(Stream(served, devices[0]))
        wait_until(lambda: served.open_database_files() > 0)
        connections, threads = served.open_database_files(), served.process.num_threads()
        last = [stack.enter_context(Stream(served, each)) for each in devices[1:]][-1]
        assert served.open_database_files() <= connections + 1
        assert served.process.num_threads() <= threads + 2
        assert listeners(served) >= 50
        served.change(devices[-1], 1)
        last.wake(1)
    wait_until(lambda: listeners(served) == 0)


@pytest.mark.django_db(transaction=True)
def test_a_stream_beats_its_heart_and_ends_at_its_age(database_file: None) -> None:
    async def heard() -> list[str]:
        return [event async for event in push.stream(device_id="d-1", age_s=0.5, heart_beat_s=0.1)]

    started = time.monotonic()
    first, *rest = asyncio.run(heard())
    assert time.monotonic() - started >= 0.5
    assert first.startswith("retry: ")
    assert set(rest) == {": heart-beat\n\n"}
    assert len(rest) <= 5


def test_the_ages_of_streams_are_jittered(settings: LazySettings) -> None:
    settings.WAKE_UP_MAX_AGE_S = 600
    rng = random.Random(1)
    drawn = [push.max_age_s(rng) for _ in range(500)]
    assert 300 <= min(drawn) < 320
    assert 580 < max(drawn) <= 600


def test_a_device_that_opens_ever_more_streams_keeps_the_newest(served: Served, device: Enrolled) -> None:
    with Stream(served, device) as first, Stream(served, device), Stream(served, device) as third:
        first.end()
        served.change(device, 150)
        third.wake(150)


def test_a_stream_needs_the_devices_own_credential(served: Served, device: Enrolled) -> None:
    [other] = served.enrol("stranger")
    url = f"{served.url}/api/v1/devices/{device.device_id}/wake-up"
    assert httpx.get(url).status_code == 401
    answer = httpx.get(url, headers={"Authorization": f"Bearer {other.credential}"})
    assert (answer.status_code, answer.json()["code"]) == (403, "not_permitted")
