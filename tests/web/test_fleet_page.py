"""The Fleet page: every device, what it runs, and the headline numbers."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from qoe_service.catalogue.models import Application, Variant
from qoe_service.decisions.models import Decision
from qoe_service.fleet.models import Device
from qoe_service.rollouts.models import Assignment
from tests import builders
from tests.web.demo_rows import seed_fleet
from tests.web.reading import fragment, text_of

pytestmark = pytest.mark.django_db


def running_device(name: str, application: Application, variant: Variant, **fields: Any) -> Device:
    """A device that was seen three seconds ago and runs what it should."""
    now = timezone.now()
    device = builders.make_device(
        name, last_seen_at=now - timedelta(seconds=3), next_check_in_due_at=now + timedelta(seconds=9), **fields
    )
    decision = builders.make_decision(device, application, variant)
    builders.make_joined_event(decision, reward=0.64)
    builders.make_assignment(device, application, decision)
    return device


@pytest.fixture
def digits() -> Variant:
    return builders.make_variant(builders.make_application(), "digits-small-int8")


def test_a_stranger_is_asked_to_log_in_and_comes_back() -> None:
    answer = Client().get("/?state=drift")
    assert answer.status_code == 302
    assert answer.headers["Location"] == "/login/?next=/%3Fstate%3Ddrift"


def test_a_fragment_without_a_session_sends_the_whole_page_to_the_log_in() -> None:
    headers = {"HX-Request": "true", "HX-Current-URL": "http://testserver/devices/d-1/"}
    answer = Client().get("/devices/d-1/", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["HX-Redirect"] == "/login/?next=%2Fdevices%2Fd-1%2F"


def test_an_empty_fleet_says_what_to_do_next(operator: Client) -> None:
    page = text_of(operator.get("/"))
    assert "No device has enrolled yet" in page
    assert "manage.py issue_token" in page


def test_a_device_shows_what_it_runs_and_how_well(operator: Client, digits: Variant) -> None:
    running_device("porch-camera", digits.application, digits, device_class="camera", labels={"cpu-limit": "emulated"})
    page = text_of(operator.get("/"))
    row = page[page.index("porch-camera") :]
    for shown in ("camera", "cpu limit emulated", "3 s ago", "Digits", "digits-small-int8", "batch 1", "committed"):
        assert shown in row
    assert "0.64" in row
    assert "30.0 ms / 50 ms" in row


def test_last_seen_is_an_age_and_never_a_claim_to_be_online(operator: Client, digits: Variant) -> None:
    running_device("a", digits.application, digits)
    body = operator.get("/").content.decode()
    assert re.search(r'<time datetime="[^"]+" title="[^"]+ UTC" data-ago>3 s ago</time>', body)
    assert "online" not in body.lower().replace("inline", "")


def test_a_device_that_missed_its_check_in_is_overdue(operator: Client, digits: Variant) -> None:
    device = running_device("a", digits.application, digits)
    assert "none overdue" in text_of(operator.get("/"))
    Device.objects.filter(pk=device.pk).update(next_check_in_due_at=timezone.now() - timedelta(minutes=5))
    page = text_of(operator.get("/"))
    assert "1 overdue" in page
    assert "overdue" in page[page.index("Last seen") :]


def test_drift_is_a_headline_number_and_names_what_is_desired(operator: Client, digits: Variant) -> None:
    device = running_device("a", digits.application, digits)
    running_device("b", digits.application, digits)
    assert "Desired ≠ running 0 of 2" in text_of(operator.get("/"))
    wanted = builders.make_variant(digits.application, "digits-large")
    decision = builders.make_decision(device, digits.application, wanted, state=Decision.State.PENDING)
    Assignment.objects.filter(device=device).update(decision=decision, reported_state="downloading")
    page = text_of(operator.get("/"))
    assert "Desired ≠ running 1 of 2" in page
    assert re.search(r"digits-small-int8 batch 1 · 1 at once · 1 thread desired: digits-large, wanted", page)
    assert "downloading" in page


def test_slo_violations_count_leases_that_missed_their_p95_or_failed(operator: Client, digits: Variant) -> None:
    device = running_device("a", digits.application, digits)
    for measurement in ({"p95_ms": 80.0}, {"failed": True}, {"p95_ms": None}, {"p95_ms": 49.0}):
        decision = builders.make_decision(device, digits.application, digits)
        builders.make_joined_event(decision, measurement=measurement)
    assert "SLO violations 50.0 % of the last 4 leases missed" in text_of(operator.get("/"))


def test_before_the_first_policy_the_console_says_when_it_is_expected(operator: Client, digits: Variant) -> None:
    running_device("a", digits.application, digits)
    page = text_of(operator.get("/"))
    assert re.search(r"Exploring uniformly first policy expected in about \d+ s, after \d+ more lease", page)


def test_a_policy_shows_its_version_and_age(operator: Client, digits: Variant) -> None:
    at = timezone.now() - timedelta(seconds=70)
    builders.make_policy_version(digits.application, 3, created_at=at - timedelta(hours=1))
    builders.make_policy_version(digits.application, 4, created_at=at, trained_through=31)
    assert "v4 learnt 70 s ago from 31 leases" in text_of(operator.get("/"))


def test_many_devices_can_be_narrowed_by_name_class_and_state(operator: Client, digits: Variant) -> None:
    running_device("lonely", digits.application, digits)
    assert "Narrow the devices" not in operator.get("/").content.decode()
    for number in range(9):
        running_device(f"hall-{number}", digits.application, digits, device_class="camera" if number < 4 else "hub")
    Assignment.objects.filter(device="d-hall-7").update(reported_state="soaking", reported_digest="")
    assert "Narrow the devices" in operator.get("/").content.decode()
    for query, found in (
        ("q=lonely", ["lonely"]),
        ("class=camera", ["hall-0", "hall-1", "hall-2", "hall-3"]),
        ("state=soaking", ["hall-7"]),
        ("state=drift", ["hall-7"]),
        ("state=overdue", []),
        ("q=%00%27%22<&state=nonsense", []),
    ):
        body = fragment(operator, f"/?{query}").content.decode()
        assert re.findall(r'<a id="device-d-([\w-]+)"', body) == found, query
    assert "No device matches" in text_of(operator.get("/?q=nobody"))


def test_long_lists_are_split_into_pages(operator: Client) -> None:
    for number in range(51):
        builders.make_device(f"n-{number:02}")
    body = operator.get("/?page=2").content.decode()
    assert "Page 2 of 2" in text_of(operator.get("/?page=2"))
    assert re.findall(r'<a id="device-d-(n-\d+)"', body) == ["n-50"]


def test_queries_do_not_grow_with_devices(operator: Client, digits: Variant) -> None:
    builders.make_policy_version(digits.application)
    running_device("first", digits.application, digits)
    fragment(operator, "/")
    counts = []
    for number in range(12):
        running_device(f"more-{number}", digits.application, digits)
        with CaptureQueriesContext(
            connection,
        ) as queries:
            fragment(operator, "/")
        counts.append(len(queries))
    assert len(set(counts)) == 1
    assert counts[0] <= 13


def test_a_fragment_is_sent_again_only_when_something_but_the_time_changed(operator: Client, digits: Variant) -> None:
    device = running_device("a", digits.application, digits)
    first = fragment(operator, "/")
    etag = first.headers["ETag"]
    assert b"<html" not in first.content
    time.sleep(1.1)
    again = fragment(operator, "/", etag)
    assert (again.status_code, again.content) == (304, b"")
    Assignment.objects.filter(device=device).update(reported_state="rolled_back")
    changed = fragment(operator, "/", etag)
    assert changed.status_code == 200
    assert "rolled back" in text_of(changed)


def test_the_fragment_of_six_devices_takes_under_a_tenth_of_a_second_of_processor_time(operator: Client) -> None:
    seed_fleet(now=timezone.now(), leases=4)
    fragment(operator, "/")
    durations = []
    for _ in range(7):
        start = time.process_time()
        fragment(operator, "/")
        durations.append(time.process_time() - start)
    assert min(durations) < 0.1
