from __future__ import annotations

import json
import random
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.conf import LazySettings
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from device_agents.wire import CheckInReply
from qoe_service.catalogue.models import Profile
from qoe_service.decisions.models import Ban, Decision, JoinedEvent
from qoe_service.fleet import keys
from qoe_service.fleet.models import Device
from qoe_service.rollouts import desired
from qoe_service.rollouts.models import Assignment, AttemptOutcome, DesiredVersion
from tests.builders import NOW, make_assignment, make_decision, make_device
from tests.qoe_service import calls
from tests.qoe_service.rollouts.conftest import Site

pytestmark = pytest.mark.django_db
GOLDEN = Path(__file__).parents[2] / "device_agents" / "golden"


def running(site: Site, decision: Decision, **fields: Any) -> dict[str, Any]:
    return {
        "application": "digits",
        "state": "committed",
        "running_digest": decision.variant_digest,
        "decision_id": decision.pk,
        **fields,
    }


def outcome(decision: Decision, kind: str, **fields: Any) -> dict[str, Any]:
    return {
        "application": "digits",
        "decision_id": decision.pk,
        "outcome": kind,
        "at": NOW.isoformat(),
        **fields,
    }


def pending(site: Site) -> Decision:
    decision = make_decision(site.device, site.application, site.small, state="pending", active_at=None)
    make_assignment(site.device, site.application, decision, reported_decision_id="", reported_state="")
    return decision


def test_a_check_in_keeps_what_the_device_says_of_itself(site: Site) -> None:
    telemetry = {"cpu_load_share": 0.4, "temperature_c": 61.5, "network": "metered"}
    answer = calls.check_in(
        site.device,
        telemetry=telemetry,
        hardware={"cores": 8, "isa": ["avx512"]},
        agent_version="1.2",
        serving_url="http://127.0.0.1:9000",
        dropped={"telemetry": 3},
        profiles=[{"digest": site.small.artifact_id, "threads": 2, "a_ms": 1.5, "b_ms": 0.5}],
    )
    reply = CheckInReply.model_validate_json(answer.content)
    device = Device.objects.get(pk=site.device.pk)
    assert telemetry.items() <= device.telemetry.items()
    assert (device.hardware["cores"], device.agent_version, device.dropped) == (8, "1.2", {"telemetry": 3})
    assert device.serving_url == "http://127.0.0.1:9000"
    assert device.last_seen_at is not None
    assert device.next_check_in_due_at == device.last_seen_at + timedelta(seconds=reply.check_in_interval_s)
    assert Profile.objects.get(device=device, threads=2).a_ms == 1.5


def test_the_clock_offset_is_measured(site: Site) -> None:
    calls.check_in(site.device, sent_at=(timezone.now() + timedelta(seconds=100)).isoformat())
    assert Device.objects.get().clock_offset_s == pytest.approx(100, abs=5)


def test_what_the_device_runs_is_what_it_says(site: Site) -> None:
    decision = pending(site)
    report = running(site, decision, lease_active_s=3, arrival_rate_rps=12.5, cached_digests=[site.large.artifact_id])
    calls.check_in(site.device, applications=[report])
    row = Assignment.objects.get()
    assert (row.reported_state, row.reported_digest) == ("committed", decision.variant_digest)
    assert (row.reported_decision_id, row.reported_active_s, row.reported_rps) == (decision.pk, 3, 12.5)
    assert row.cached_digests == [site.large.artifact_id]


def test_the_lease_clock_starts_with_the_first_report_that_serves_the_decision(site: Site) -> None:
    decision = pending(site)
    calls.check_in(site.device, applications=[running(site, decision, state="warming")])
    decision.refresh_from_db()
    assert decision.active_at is None
    calls.check_in(site.device, applications=[running(site, decision, state="soaking")])
    decision.refresh_from_db()
    assert decision.state == "active"
    started = decision.active_at
    assert started is not None
    calls.check_in(site.device, applications=[running(site, decision)])
    decision.refresh_from_db()
    assert decision.active_at == started


def test_a_check_in_decides_nothing(site: Site) -> None:
    assert calls.check_in(site.device).json()["desired_version"] == 0
    assert not Decision.objects.exists()
    assert not DesiredVersion.objects.exists()


def test_a_commit_makes_the_variant_the_last_good_one(site: Site) -> None:
    decision = pending(site)
    calls.check_in(site.device, outcomes=[outcome(decision, "committed", swap_ms=140, download_bytes=9)])
    assert Assignment.objects.get().last_good_digest == decision.variant_digest
    row = AttemptOutcome.objects.get()
    assert (row.outcome, row.swap_ms, row.download_bytes) == ("committed", 140, 9)


@pytest.mark.parametrize("kind", ["rolled_back", "no_space", "verify_failed", "incompatible"])
def test_a_failed_attempt_is_a_reward_and_a_ban_on_this_device(site: Site, kind: str) -> None:
    decision = pending(site)
    for _ in range(2):
        answer = calls.check_in(site.device, outcomes=[outcome(decision, kind, reason="too slow")])
        assert answer.status_code == 200
    ban = Ban.objects.get()
    assert (ban.device, ban.variant_digest) == (site.device, decision.variant_digest)
    assert ban.expires_at is not None
    assert "too slow" in ban.reason
    assert JoinedEvent.objects.get().decision == decision
    assert AttemptOutcome.objects.count() == 1


def test_a_broken_download_keeps_the_variant_away_for_a_minute_only(site: Site) -> None:
    decision = pending(site)
    calls.check_in(site.device, outcomes=[outcome(decision, "download_failed")])
    assert JoinedEvent.objects.count() == 1
    ban = Ban.objects.get()
    assert (ban.device, ban.variant_digest) == (site.device, decision.variant_digest)
    assert ban.expires_at == ban.created_at + timedelta(seconds=60)


def test_locks_are_taken_in_one_order_before_anything_is_written(site: Site) -> None:
    decision = pending(site)
    with CaptureQueriesContext(connection) as queries:
        calls.check_in(site.device, outcomes=[outcome(decision, "rolled_back")], applications=[running(site, decision)])
    told = [each["sql"] for each in queries]
    learners = next(n for n, sql in enumerate(told) if sql.startswith("SELECT") and 'FROM "decisions_learner"' in sql)
    decisions = next(n for n, sql in enumerate(told) if sql.startswith("SELECT") and "'pending'" in sql)
    writes = next(n for n, sql in enumerate(told) if sql.startswith("UPDATE"))
    assert learners < decisions < writes
    assert decision.pk in told[decisions]
    assert told[decisions].endswith("ORDER BY 1 ASC")


def test_the_first_word_of_a_device_ends_the_wait_for_a_decision(site: Site) -> None:
    Device.objects.update(last_seen_at=None)
    make_assignment(site.device, site.application, undecided_until=timezone.now() + timedelta(minutes=1))
    calls.check_in(site.device)
    assert Assignment.objects.get().undecided_until is None


def test_a_superseded_attempt_is_kept_and_nothing_follows(site: Site) -> None:
    calls.check_in(site.device, outcomes=[outcome(pending(site), "superseded")])
    assert AttemptOutcome.objects.count() == 1
    assert not JoinedEvent.objects.exists()
    assert not Ban.objects.exists()


def test_outcomes_of_decisions_that_the_service_lost_are_passed_over(site: Site) -> None:
    lost = {"application": "digits", "decision_id": "lost", "outcome": "committed", "at": NOW.isoformat()}
    assert calls.check_in(site.device, outcomes=[lost]).status_code == 200
    assert not AttemptOutcome.objects.exists()


def test_a_device_with_a_nonsense_clock_is_heard_all_the_same(site: Site) -> None:
    decision = pending(site)
    wild = outcome(decision, "committed") | {"at": "0001-01-01T00:00:00+14:00"}
    assert calls.check_in(site.device, sent_at="9999-12-31T23:59:59-12:00", outcomes=[wild]).status_code == 200
    assert calls.check_in(site.device, sent_at="2026-06-01T12:00:00").status_code == 200
    assert AttemptOutcome.objects.get().at.year > 2000


def test_a_device_speaks_only_for_itself(site: Site) -> None:
    other = make_device("other", credential="o" * 43)
    for path in ("check-in", "desired", "wake-up"):
        url = f"/api/v1/devices/{other.pk}/{path}"
        answer = calls.post(url, {"sent_at": NOW.isoformat()}) if path == "check-in" else calls.get(url)
        calls.problem(answer, status=403, code="not_permitted", field="device_id")


@pytest.mark.parametrize("path", ["check-in", "desired"])
def test_what_cannot_be_a_device_is_refused_by_its_field(site: Site, path: str) -> None:
    url = f"/api/v1/devices/%00/{path}"
    answer = calls.post(url, {"sent_at": NOW.isoformat()}) if path == "check-in" else calls.get(url)
    calls.problem(answer, status=400, code="invalid_input", field="device_id")


@pytest.mark.parametrize("part", ["outcomes", "applications"])
def test_a_decision_of_another_device_is_refused_by_its_field_and_changes_nothing(site: Site, part: str) -> None:
    other = make_device("other", credential="o" * 43)
    theirs = make_decision(other, site.application, site.small, state="pending", active_at=None)
    make_assignment(site.device, site.application)
    report = outcome(theirs, "rolled_back") if part == "outcomes" else running(site, theirs)
    fields: dict[str, Any] = {part: [report], "agent_version": "new"}
    answer = calls.check_in(site.device, **fields)
    calls.problem(answer, status=403, code="not_permitted", field=f"{part}.0.decision_id")
    theirs.refresh_from_db()
    assert theirs.state == "pending"
    assert not AttemptOutcome.objects.exists()
    assert Device.objects.get(pk=site.device.pk).agent_version == ""


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"telemetry": {"cpu_load_share": 1.5}}, "telemetry.cpu_load_share"),
        ({"telemetry": {"temperature_c": "hot"}}, "telemetry.temperature_c"),
        ({"applications": [{"application": "digits", "state": "asleep"}]}, "applications.0.state"),
        (
            {"applications": [{"application": "digits", "state": "idle", "running_digest": "XYZ"}]},
            "applications.0.running_digest",
        ),
        ({"desired_version_seen": -1}, "desired_version_seen"),
        ({"profiles": [{"digest": "0" * 64, "threads": 0, "a_ms": 1, "b_ms": 1}]}, "profiles.0.threads"),
        ({"agent_version": "a\0b"}, "agent_version"),
        ({"sent_at": "yesterday"}, "sent_at"),
    ],
)
def test_a_wrong_field_is_named_and_nothing_is_recorded(site: Site, fields: dict[str, Any], field: str) -> None:
    seen = site.device.last_seen_at
    calls.problem(calls.check_in(site.device, **fields), status=400, code="invalid_input", field=field)
    assert Device.objects.get().last_seen_at == seen


def test_fields_of_a_newer_agent_are_ignored(site: Site) -> None:
    assert calls.check_in(site.device, mood="sunny", telemetry={"altitude_m": 3}).status_code == 200


def test_intervals_are_jittered_within_bounds(site: Site, settings: LazySettings) -> None:
    settings.CHECK_IN_INTERVAL_S, settings.CHECK_IN_JITTER_SHARE = 10, 0.2
    rng = random.Random(1)
    drawn = [desired.check_in_interval_s(rng) for _ in range(500)]
    assert min(drawn) >= 8
    assert max(drawn) <= 12
    assert max(drawn) - min(drawn) > 3.5
    replies = {calls.check_in(site.device).json()["check_in_interval_s"] for _ in range(3)}
    assert len(replies) == 3
    assert all(8 <= each <= 12 for each in replies)


def test_a_check_in_brings_newer_keys_to_a_device_that_follows_rotations(site: Site) -> None:
    keys.trusted_keys(now=NOW)
    known = keys.keys_version()
    assert calls.check_in(site.device, keys_version=known).json()["keys"] is None
    keys.create_signing_key(actor="anna", now=NOW)
    assert len(json.loads(calls.check_in(site.device, keys_version=known).json()["keys"]["document"])["keys"]) == 2
    assert calls.check_in(site.device).json()["keys"] is None


@pytest.mark.parametrize("path", sorted((GOLDEN).glob("check_in.*.json")), ids=lambda path: path.name)
def test_a_device_of_each_wire_version_is_understood(site: Site, path: Path) -> None:
    told = json.loads(path.read_text())
    for name in ("applications", "outcomes"):
        told[name] = [each | {"decision_id": None} for each in told[name]] if name == "applications" else []
    reply = CheckInReply.model_validate(calls.check_in(site.device, **told).json())
    assert reply.check_in_interval_s > 0
