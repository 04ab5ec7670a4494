"""The serverless broker delivers every message once, whole and in order, to whichever worker is faster."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from queue import Empty

import pytest
from django.conf import LazySettings
from kombu import Connection
from kombu.simple import SimpleQueue

from qoe_service import broker
from qoe_service.rollouts import tasks


@pytest.fixture
def connection(tmp_path: Path) -> Connection:
    broker.register()
    options = {"data_folder_in": str(tmp_path), "data_folder_out": str(tmp_path), "polling_interval": 0.01}
    return Connection("folder://localhost", transport_options=options)


def drain(queue: SimpleQueue) -> list[int]:
    received: list[int] = []
    while True:
        try:
            message = queue.get(timeout=0.3)
        except Empty:
            return received
        message.ack()
        received.append(message.payload["number"])


def test_messages_of_one_sender_arrive_in_order(connection: Connection) -> None:
    queue = connection.SimpleQueue("service")
    for number in range(20):
        queue.put({"number": number})
    assert drain(queue) == list(range(20))


def test_two_workers_and_three_senders_lose_and_double_nothing(connection: Connection) -> None:
    received: list[int] = []

    def send(start: int) -> None:
        with connection.clone() as own:
            queue = own.SimpleQueue("service")
            for number in range(start, start + 50):
                queue.put({"number": number})

    def work() -> None:
        with connection.clone() as own:
            received.extend(drain(own.SimpleQueue("service")))

    threads = [threading.Thread(target=send, args=(start,)) for start in (0, 100, 200)]
    threads += [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(received) == [*range(50), *range(100, 150), *range(200, 250)]


def test_a_message_reaches_its_own_queue_only(connection: Connection) -> None:
    connection.SimpleQueue("learning").put({"number": 1})
    assert drain(connection.SimpleQueue("service")) == []
    assert drain(connection.SimpleQueue("learning")) == [1]


def test_a_spoilt_message_is_dropped_and_the_next_one_delivered(connection: Connection, tmp_path: Path) -> None:
    (tmp_path / "00000000000000000000_x.service.msg").write_text('{"half')
    queue = connection.SimpleQueue("service")
    queue.put({"number": 7})
    assert drain(queue) == [7]


@pytest.mark.django_db
def test_what_crashes_left_of_messages_is_swept_after_an_hour(tmp_path: Path, settings: LazySettings) -> None:
    settings.BROKER_DIR = tmp_path
    stamp = "00000000000000000007_0123456789abcdef0123456789abcdef"
    hours_ago = time.time() - 7200
    unfinished, claimed, waiting, foreign = stamp, f"{stamp}.service", f"{stamp}.service.msg", "notes"
    for name in (unfinished, claimed, waiting, foreign):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (hours_ago, hours_ago))
    fresh = stamp.replace("7_", "8_")
    (tmp_path / fresh).touch()
    tasks.prune()
    assert {path.name for path in tmp_path.iterdir()} == {waiting, foreign, fresh}
