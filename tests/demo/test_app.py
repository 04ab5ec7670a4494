"""The app beside a device: open-loop traffic, honest latency, checked answers, ratings that count once."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest

from demo.app import App, Traffic
from demo.inference import Failed, InferenceConnection, Refused
from demo.ratings import RatingDesk, Report
from demo.users import PERSONAS, Experience
from tests.demo.fake_device import FakeDevice

IMAGES = np.zeros((10, 1, 4, 4), dtype=np.uint8)
IMAGES[:, 0, 0, 0] = np.arange(10)
LABELS = np.arange(10, dtype=np.int64)


class Mailbox:
    """Takes ratings like the feedback API; can be closed for a while."""

    def __init__(self) -> None:
        self.reports: dict[str, Report] = {}
        self.is_open = True
        self.deliveries = 0

    def __call__(self, reports: Sequence[Report]) -> Mapping[str, str]:
        if not self.is_open:
            raise httpx.ConnectError("closed")
        self.deliveries += 1
        self.reports |= {report["id"]: report for report in reports}
        return {report["id"]: "accepted" for report in reports}


def traffic(device: FakeDevice, rate_rps: float = 100, labels: np.typing.NDArray[np.int64] = LABELS) -> Traffic:
    return Traffic(device.url, "digits", rate_rps, IMAGES, labels, seed=7)


def run_for(app: App, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> None:
    stop = threading.Event()
    runner = threading.Thread(target=app.run, args=(stop,))
    runner.start()
    time.sleep(seconds / 2)
    meanwhile()
    time.sleep(seconds / 2)
    stop.set()
    runner.join()


def new_desk(send: Mailbox | None = None) -> RatingDesk:
    return RatingDesk(PERSONAS["careful"], send)


@pytest.mark.parametrize("speaks_binary", [True, False])
def test_an_answer_is_understood_in_binary_and_in_json(speaks_binary: bool) -> None:
    with FakeDevice(speaks_binary=speaks_binary) as device:
        connection = InferenceConnection(device.url, "digits")
        assert connection.is_ready()
        answer = connection.classify(IMAGES[4:5])
        connection.close()
    assert (answer.classes.tolist(), answer.decision_id) == ([4], "decision-1")


@pytest.mark.parametrize(("status", "error"), [(503, Refused), (429, Refused), (500, Failed), (404, Failed)])
def test_shed_load_is_told_from_failure(status: int, error: type[Exception]) -> None:
    with FakeDevice(status=status) as device:
        connection = InferenceConnection(device.url, "digits")
        with pytest.raises(error):
            connection.classify(IMAGES[:1])
        connection.close()


def test_an_idle_connection_that_the_server_closed_is_no_failure() -> None:
    with FakeDevice() as device:
        connection = InferenceConnection(device.url, "digits")
        connection.classify(IMAGES[:1])
        assert connection._connection.sock is not None
        connection._connection.sock.shutdown(socket.SHUT_RDWR)
        assert connection.classify(IMAGES[2:3]).classes.tolist() == [2]
        connection.close()


def test_answers_are_checked_against_labels() -> None:
    half_wrong = np.where(LABELS % 2 == 0, LABELS, 0)
    with FakeDevice() as device:
        app = App(traffic(device, labels=half_wrong), new_desk())
        run_for(app, 1.0)
    summary = app.tally.summary()
    assert summary["failed"] == summary["refused"] == 0
    assert summary["requests"] > 50
    assert 0.2 < summary["accuracy"] < 0.8


def test_traffic_is_open_loop_and_latency_counts_from_the_scheduled_time() -> None:
    with FakeDevice(delay_s=0.3) as device:
        app = App(traffic(device, rate_rps=60), new_desk())
        run_for(app, 2.0)
        summary = app.tally.summary()
        # One caller that waits for each answer would have asked seven times.
        assert device.seen > 80
    assert summary["recent_p50_ms"] >= 300
    # Beyond what 24 callers get answered, 40 a second, requests wait; and their waiting shows.
    with FakeDevice(delay_s=0.6) as device:
        app = App(traffic(device, rate_rps=100), new_desk())
        run_for(app, 2.0)
    assert app.tally.summary()["recent_p95_ms"] > 1000


def test_failures_are_counted_with_their_reasons() -> None:
    with FakeDevice() as device:
        app = App(traffic(device), new_desk())
        run_for(app, 1.0, meanwhile=lambda: setattr(device, "status", 500))
    summary = app.tally.summary()
    assert 0 < summary["failed"] < summary["requests"]
    assert any("500" in reason for reason in summary["reasons"])


def lived(count: int, is_correct: bool = True) -> list[Experience]:
    return [Experience(5.0, is_correct)] * count


def test_each_decision_is_rated_by_its_own_requests() -> None:
    mailbox = Mailbox()
    desk = new_desk(mailbox)
    for experience in lived(12):
        desk.note("first", experience)
    for experience in lived(12, is_correct=False):
        desk.note("second", experience)
    desk.flush()
    by_decision = {report["decision_id"]: report for report in mailbox.reports.values()}
    assert by_decision["first"]["rating"] > 0.9
    assert by_decision["second"]["rating"] == 0


def test_a_rating_waits_for_enough_requests_while_its_decision_holds() -> None:
    mailbox = Mailbox()
    desk = new_desk(mailbox)
    for experience in lived(4):
        desk.note("first", experience)
    desk.flush()
    assert not mailbox.reports
    desk.note("second", Experience(5.0, True))
    desk.flush()
    assert [report["decision_id"] for report in mailbox.reports.values()] == ["first"]


def test_stragglers_of_a_rated_decision_make_no_rating_of_their_own() -> None:
    mailbox = Mailbox()
    desk = new_desk(mailbox)
    for experience in lived(12):
        desk.note("first", experience)
    desk.flush()
    desk.note("first", Experience(5.0, False))
    desk.note("second", Experience(5.0, True))
    desk.flush()
    assert [report["decision_id"] for report in mailbox.reports.values()] == ["first"]


def test_ratings_survive_an_absent_service_and_keep_their_ids() -> None:
    mailbox = Mailbox()
    mailbox.is_open = False
    desk = new_desk(mailbox)
    for experience in lived(12):
        desk.note("first", experience)
    desk.flush()
    waiting = [report["id"] for report in desk.waiting]
    mailbox.is_open = True
    desk.flush()
    desk.flush()
    assert list(mailbox.reports) == waiting
    assert len(waiting) == mailbox.deliveries == 1


def test_a_change_of_decision_wakes_the_reporter() -> None:
    desk = new_desk()
    desk.note("first", Experience(5.0, True))
    assert desk.decision_changed.is_set()
    desk.flush()
    desk.note("first", Experience(5.0, True))
    assert not desk.decision_changed.is_set()


def test_the_app_process_writes_its_counts_and_stops_when_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", heldout_inputs=IMAGES, heldout_labels=LABELS)
    stats = tmp_path / "stats.json"
    with FakeDevice() as device:
        arguments = ["--device-url", device.url, "--application", "digits", "--data", str(tmp_path / "data.npz")]
        arguments += ["--rate", "50", "--persona", "careful", "--stats", str(stats)]
        with subprocess.Popen([sys.executable, "-m", "demo", "app", *arguments], stdout=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 20
            while not stats.exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
    counts = json.loads(stats.read_text())
    assert counts["failed"] == 0
    assert counts["requests"] > 0
    assert counts["accuracy"] == 1
