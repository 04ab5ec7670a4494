"""The Device page: identity, what runs, and how updates ended."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from qoe_service.decisions.models import Ban
from qoe_service.rollouts.models import Assignment, AttemptOutcome
from tests import builders
from tests.web.reading import fragment, text_of
from web.device_rows import STEPS, steps
from web.placements import UPDATE_STATES

pytestmark = pytest.mark.django_db
PATH = "/devices/d-kitchen-tablet/"


def test_an_unknown_device_is_not_found_and_the_page_leads_back(operator: Client) -> None:
    answer = operator.get("/devices/nobody/")
    assert answer.status_code == 404
    assert b"Nothing here" in answer.content
    assert b'href="/"' in answer.content


def test_a_device_without_a_decision_says_what_comes_next(operator: Client) -> None:
    builders.make_device()
    page = text_of(operator.get(PATH))
    assert "Its first decision follows its first check-in" in page
    assert "No update has ended yet" in page
    assert "predictions borrow from its class" in page


def test_identity_hardware_and_telemetry_are_shown_in_human_units(operator: Client) -> None:
    builders.make_device(
        labels={"cpu-limit": "real", "applications": "digits"},
        hardware={"cores": 4, "memory_bytes": 8_000_000_000, "isa": ["avx2", "vnni"], "cpu_model": "Cortex-A72"},
        telemetry={
            "memory_free_bytes": 512_000_000,
            "cpu_load_share": 0.25,
            "temperature_c": 61.4,
            "throttled": True,
            "network": "wifi",
            "downlink_mbps": 18.5,
        },
        dropped={"spool_full": 7},
        agent_version="0.1.0",
    )
    page = text_of(operator.get(PATH))
    for shown in (
        *("class tablet", "cpu limit: real", "Cortex-A72", "Cores 4", "Memory 8.00 GB", "avx2, vnni", "Agent 0.1.0"),
        *("Memory free 512 MB", "CPU used by others 25.0 %", "61 °C", "Throttled yes", "spool full 7"),
        "Network wifi, 18.5 Mbit/s down",
    ):
        assert shown in page, shown


def test_running_is_what_the_device_says_and_desired_stands_beside_it(operator: Client) -> None:
    device, application = builders.make_device(), builders.make_application()
    old, new = builders.make_variant(application, "digits-old"), builders.make_variant(application, "digits-new")
    before = builders.make_decision(
        device, application, old, configuration={"max_batch": 8, "max_concurrency": 1, "threads": 2}
    )
    decision = builders.make_decision(device, application, new)
    builders.make_assignment(
        device,
        application,
        decision,
        reported_digest=old.artifact_id,
        reported_decision_id=before.pk,
        reported_state="warming",
        reported_active_s=6.0,
    )
    page = text_of(operator.get(PATH))
    assert f"Runs, as the device says digits-old {old.artifact_id[:12]} batch 8 · 1 at once · 2 threads" in page
    assert f"Desired digits-new {new.artifact_id[:12]}" in page
    assert "not yet running" in page
    assert "Lease 6 s of 8 s" in page
    assert 'aria-current="step"><span>warming</span>' in operator.get(PATH).content.decode()


def test_an_unknown_digest_is_shown_as_it_is(operator: Client) -> None:
    device, application = builders.make_device(), builders.make_application()
    builders.make_assignment(device, application, reported_digest="ab" * 32, reported_state="committed")
    assert "abababababab configuration not reported" in text_of(operator.get("/"))


def test_rollbacks_show_the_reason_that_the_device_gave(operator: Client) -> None:
    device, application = builders.make_device(), builders.make_application()
    variant = builders.make_variant(application)
    decision = builders.make_decision(device, application, variant)
    AttemptOutcome.objects.create(
        device=device,
        application=application,
        decision_id=decision.pk,
        outcome="rolled_back",
        reason="p95 <b>above</b> the gate",
        evidence="traffic",
        download_bytes=1_500_000,
        swap_ms=312.0,
        at=timezone.now() - timedelta(minutes=4),
    )
    page = text_of(operator.get(PATH))
    assert "4 min ago rolled back digits-small p95 <b>above</b> the gate 312 ms 1.50 MB traffic" in page
    assert b"<b>above</b>" not in operator.get(PATH).content


def test_bans_in_force_are_shown_and_expired_ones_are_not(operator: Client) -> None:
    device, application = builders.make_device(), builders.make_application()
    builders.make_assignment(device, application)
    now = timezone.now()
    for name, where, ends in (("here", device, 5), ("everywhere", None, None), ("over", device, -5)):
        variant = builders.make_variant(application, f"digits-{name}")
        Ban.objects.create(
            application=application,
            device=where,
            variant_digest=variant.artifact_id,
            reason="rolled back",
            created_at=now,
            expires_at=now + timedelta(minutes=ends) if ends else None,
        )
    page = text_of(operator.get(PATH))
    assert "digits-here digits this device rolled back just now in" in page
    assert "digits-everywhere digits everywhere rolled back just now when lifted" in page
    assert "digits-over" not in page


def test_profiles_are_shown_per_variant(operator: Client) -> None:
    device = builders.make_device()
    variant = builders.make_variant(builders.make_application())
    builders.make_profile(variant, device, a_ms=12.34, b_ms=0.5, threads=2)
    assert "digits-small 2 12.3 ms 0.50 ms" in text_of(operator.get(PATH))


def test_recent_decisions_lead_to_their_pages_with_their_rewards(operator: Client) -> None:
    device, application = builders.make_device(), builders.make_application()
    variant = builders.make_variant(application)
    decision = builders.make_decision(
        device, application, variant, kind="holdout_uniform", propensity=0.25, state="joined", policy_number=3
    )
    builders.make_joined_event(decision, reward=0.66)
    answer = operator.get(PATH)
    assert "holdout uniform 25.0 % joined 0.66" in text_of(answer)
    assert f'href="/decisions/{decision.pk}/"' in answer.content.decode()


def test_queries_do_not_grow_with_the_history(operator: Client) -> None:
    device, application = builders.make_device(), builders.make_application()
    variant = builders.make_variant(application)
    decision = builders.make_decision(device, application, variant)
    builders.make_assignment(device, application, decision)
    fragment(operator, PATH)
    counts = []
    for number in range(3):
        past = builders.make_decision(device, application, variant)
        builders.make_joined_event(past)
        builders.make_profile(variant, device, threads=number + 1)
        AttemptOutcome.objects.create(
            device=device, application=application, decision_id=past.pk, outcome="committed", at=timezone.now()
        )
        with CaptureQueriesContext(connection) as queries:
            fragment(operator, PATH)
        counts.append(len(queries))
    assert len(set(counts)) == 1
    assert counts[0] <= 12


def test_the_way_of_an_update_knows_every_state_that_devices_report() -> None:
    assert set(UPDATE_STATES) == {*STEPS, "idle", "rolled_back"}
    assert [step.standing for step in steps("staged")] == ["done", "done", "under way", "to come", "to come", "to come"]
    assert {step.standing for step in steps("committed")} == {"done"}
    assert steps("rolled_back") == steps("") == []
    assert Assignment().reported_state == ""
