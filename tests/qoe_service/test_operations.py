"""What supervisors, load balancers and Prometheus ask."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from django.conf import LazySettings
from django.test import Client
from django.utils import timezone
from prometheus_client.parser import text_string_to_metric_families

from qoe_service.decisions.models import Feedback, Learner, Orphan
from qoe_service.rollouts import reconcile, tasks
from tests.builders import (
    make_application,
    make_assignment,
    make_decision,
    make_device,
    make_joined_event,
    make_policy_version,
    make_variant,
)
from tests.qoe_service import calls

pytestmark = pytest.mark.django_db


def scrape() -> dict[tuple[str, ...], float]:
    """Values by (metric, label values in order of their names)."""
    text = Client().get("/metrics").content.decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(each.name, *(each.labels[name] for name in sorted(each.labels))): each.value for each in samples}


def test_a_live_process_says_so_without_the_database() -> None:
    assert Client().get("/healthz").json() == {"status": "ok"}


@pytest.mark.django_db(databases=[])
def test_liveness_asks_no_database() -> None:
    assert Client().get("/healthz").status_code == 200


def test_readiness_names_each_part() -> None:
    answer = Client().get("/readyz")
    checks = answer.json()["checks"]
    assert (answer.status_code, set(checks)) == (200, {"database", "broker", "policy"})
    assert all(check["ok"] for check in checks.values())


def test_a_broker_that_is_away_makes_the_service_not_ready(settings: LazySettings, tmp_path: Path) -> None:
    settings.BROKER_DIR = tmp_path / "gone"
    answer = Client().get("/readyz")
    assert answer.status_code == 503
    assert not answer.json()["checks"]["broker"]["ok"]
    assert answer.json()["checks"]["database"]["ok"]
    settings.REDIS_URL = "redis://127.0.0.1:1"
    assert not Client().get("/readyz").json()["checks"]["broker"]["ok"]


def test_a_corrupt_policy_makes_the_service_not_ready_and_is_named() -> None:
    make_policy_version(make_application("corrupt"))
    answer = Client().get("/readyz")
    assert answer.status_code == 503
    assert "corrupt" in answer.json()["checks"]["policy"]["detail"]


def test_requests_are_timed_by_route_method_and_status() -> None:
    key = ("qoe_http_request_seconds_count", "POST", "api/v1/devices/<device_id>/check-in")
    before = scrape()
    device = make_device()
    calls.check_in(device)
    calls.check_in(device, telemetry={"cpu_load_share": 2})
    after = scrape()
    for status in ("2xx", "4xx"):
        assert after[*key, status] == before.get((*key, status), 0) + 1


def test_unknown_paths_and_methods_make_no_new_series() -> None:
    for n in range(3):
        Client().generic(f"ODD{n}", f"/nowhere-{n}")
    named = {key for key in scrape() if key[0] == "qoe_http_request_seconds_count"}
    assert not [key for key in named if "nowhere" in str(key) or "ODD" in str(key)]


def test_lags_and_counts_follow_from_the_rows() -> None:
    now = timezone.now()
    application, device = make_application(), make_device()
    variant = make_variant(application)
    closed = make_decision(device, application, variant, state="closed", closed_at=now - timedelta(seconds=30))
    joined = make_decision(device, application, variant, state="joined")
    make_joined_event(joined, joined_at=now - timedelta(seconds=20))
    Learner.objects.update(last_event_number=5, learnt_through=0)
    Feedback.objects.create(decision=closed, feedback_id="a", source="app", rating=1, received_at=now)
    Feedback.objects.create(decision=closed, feedback_id="b", source="app", rating=1, is_late=True, received_at=now)
    Orphan.objects.create(feedback_id="c", decision_id="lost", source="app", received_at=now)
    values = scrape()
    assert values["qoe_join_lag_seconds", "digits"] == pytest.approx(30, abs=5)
    assert values["qoe_learner_lag_events", "digits"] == 5
    assert values["qoe_learner_lag_seconds", "digits"] == pytest.approx(20, abs=5)
    assert values["qoe_feedback_total", "false", "app"] == 1
    assert values["qoe_feedback_total", "true", "app"] == 1
    assert values["qoe_orphans",] == 1
    assert values["qoe_decisions", "digits", "closed"] == 1


def test_queues_show_their_length_and_the_age_of_the_oldest(settings: LazySettings, tmp_path: Path) -> None:
    settings.BROKER_DIR = tmp_path
    (tmp_path / "1.service.msg").write_text("look")
    application, device = make_application(), make_device()
    decision = make_decision(device, application, make_variant(application), state="joined")
    make_assignment(device, application, decision, reported_at=timezone.now() - timedelta(seconds=40))
    values = scrape()
    assert values["qoe_queue_length", "messages"] == 1
    assert values["qoe_queue_length", "reconcile"] == 1
    assert values["qoe_queue_age_seconds", "reconcile"] == pytest.approx(40, abs=5)
    assert values["qoe_queue_length", "compress"] == 0


def test_rankings_in_workers_show_in_web_processes() -> None:
    make_variant(make_application())
    device = make_device()
    before = scrape()["qoe_ranking_seconds_count",]
    tasks.reconcile_device(device.pk)
    values = scrape()
    assert values["qoe_ranking_seconds_count",] >= before + 1
    assert values["qoe_ranking_seconds_bucket", "+Inf"] == values["qoe_ranking_seconds_count",]
    assert reconcile.due().count() == 0
