"""HTTP in, answers and rows out: the feedback endpoints and the state of a decision."""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.test import Client
from pytest_django import Settings

from qoe_service.decisions.models import Decision, Feedback
from tests.builders import (
    CREDENTIAL,
    make_application,
    make_application_key,
    make_decision,
    make_device,
    make_joined_event,
    make_variant,
)

pytestmark = pytest.mark.django_db
KEY = "k" * 43


@pytest.fixture
def decision() -> Decision:
    application = make_application()
    make_application_key()
    return make_decision(make_device(), application, make_variant(application))


def post(client: Client, path: str, body: Any, secret: str = KEY) -> Any:
    text = body if isinstance(body, str) else json.dumps(body)
    headers = {"Authorization": f"Bearer {secret}"}
    return client.post(f"/api/v1/{path}", text, content_type="application/json", headers=headers)


def get(client: Client, path: str, secret: str) -> Any:
    return client.get(f"/api/v1/{path}", headers={"Authorization": f"Bearer {secret}"})


def test_an_app_rates_one_decision(client: Client, decision: Decision) -> None:
    answer = post(client, "feedback", {"id": "r1", "decision_id": decision.pk, "rating": 0})
    assert (answer.status_code, answer.json()["status"]) == (200, "accepted")
    assert Feedback.objects.get().rating == 0


def test_a_batch_answers_each_item_in_order(client: Client, decision: Decision) -> None:
    items = [
        {"id": "a", "decision_id": decision.pk, "rating": 0.5},
        {"id": "a", "decision_id": decision.pk, "rating": 0.5},
        {"id": "b", "decision_id": "unknown", "rating": 0.5},
        {"id": "c", "decision_id": decision.pk, "lease_closed": True},
    ]
    results = post(client, "feedback/batch", {"items": items}).json()["results"]
    assert [(each["id"], each["status"]) for each in results] == [
        ("a", "accepted"),
        ("a", "duplicate"),
        ("b", "orphan"),
        ("c", "rejected"),
    ]


def test_a_device_closes_its_lease(client: Client, decision: Decision) -> None:
    body = {"id": "x", "decision_id": decision.pk, "lease_closed": True, "components": {"requests": 3}}
    answer = post(client, "feedback/batch", {"items": [body]}, CREDENTIAL)
    assert answer.json()["results"][0]["status"] == "accepted"
    decision.refresh_from_db()
    assert decision.state == "closed"


@pytest.mark.parametrize("secret", ["", "w" * 43])
def test_without_a_good_credential_nothing_is_taken(client: Client, decision: Decision, secret: str) -> None:
    assert post(client, "feedback", {"id": "r", "decision_id": decision.pk, "rating": 1}, secret).status_code == 401
    assert not Feedback.objects.exists()


def test_a_revoked_device_cannot_report(client: Client, decision: Decision) -> None:
    type(decision.device).objects.update(revoked_at=decision.decided_at)
    answer = post(client, "feedback", {"id": "r", "decision_id": decision.pk, "rating": 1}, CREDENTIAL)
    assert answer.status_code in {401, 403}
    assert not Feedback.objects.exists()


def test_the_wrong_owner_is_told_so(client: Client, decision: Decision) -> None:
    make_application_key("speech", key="s" * 43)
    make_device("other", credential="o" * 43)
    for secret in ("s" * 43, "o" * 43):
        answer = post(client, "feedback", {"id": "r", "decision_id": decision.pk, "rating": 1}, secret)
        assert (answer.status_code, answer.json()["code"]) == (403, "not_permitted")
        assert answer.json()["fields"][0]["field"] == "decision_id"
    assert not Feedback.objects.exists()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ('"rating": NaN', "rating"),
        ('"rating": Infinity', "rating"),
        ('"rating": 1.01', "rating"),
        ('"rating": -0.01', "rating"),
        ('"components": {"p95_ms": NaN}', "p95_ms"),
        ('"components": {"p95_ms": -1}', "p95_ms"),
        ('"components": {"slo_hit_share": 2}', "slo_hit_share"),
        ('"components": {"requests": -1}', "requests"),
        ('"components": {"accuracy": "high"}', "accuracy"),
        ('"active_s": 1e300, "rating": 1', "active_s"),
    ],
)
def test_bad_numbers_are_refused_by_name_and_change_nothing(
    client: Client, decision: Decision, fields: str, named: str
) -> None:
    body = f'{{"id": "r", "decision_id": "{decision.pk}", {fields}}}'
    for path, text in (("feedback", body), ("feedback/batch", f'{{"items": [{body}]}}')):
        answer = post(client, path, text)
        assert 400 <= answer.status_code < 500
        assert any(named in each["field"] for each in answer.json()["fields"])
    assert not Feedback.objects.exists()
    decision.refresh_from_db()
    assert decision.state == "active"


@pytest.mark.parametrize("body", ["", "{", "[]", '{"items": []}'])
def test_malformed_bodies_are_refused(client: Client, decision: Decision, body: str) -> None:
    assert 400 <= post(client, "feedback/batch", body).status_code < 500


def test_more_than_a_batch_is_refused(client: Client, decision: Decision) -> None:
    items = [{"id": f"r{number}", "decision_id": decision.pk, "rating": 1} for number in range(501)]
    assert 400 <= post(client, "feedback/batch", {"items": items}).status_code < 500
    assert not Feedback.objects.exists()


def test_a_decision_s_quota_answers_429_and_says_when_to_come_again(
    client: Client, decision: Decision, settings: Settings
) -> None:
    settings.FEEDBACK_PER_DECISION = 1
    post(client, "feedback", {"id": "a", "decision_id": decision.pk, "rating": 1})
    answer = post(client, "feedback", {"id": "b", "decision_id": decision.pk, "rating": 1})
    assert (answer.status_code, answer["Retry-After"]) == (429, "60")


def test_the_owner_follows_a_decision_to_its_reward(client: Client, decision: Decision) -> None:
    make_joined_event(decision, reward=0.7)
    Decision.objects.update(state="joined")
    post(client, "feedback", {"id": "late", "decision_id": decision.pk, "rating": 1})
    for secret in (KEY, CREDENTIAL):
        found = get(client, f"decisions/{decision.pk}", secret).json()
        assert (found["state"], found["reward"], found["feedback"], found["late_feedback"]) == ("joined", 0.7, 1, 1)
        assert found["configuration"]["max_batch"] == 1


def test_a_decision_without_a_reward_has_none(client: Client, decision: Decision) -> None:
    found = get(client, f"decisions/{decision.pk}", KEY).json()
    assert (found["state"], found["reward"], found["feedback"]) == ("active", None, 0)


@pytest.mark.parametrize("odd", ["%00", "a%00b", "%27", "a" * 65, "%F0%9F%98%80"])
def test_an_id_that_no_decision_can_have_is_refused_before_the_database_sees_it(
    client: Client, decision: Decision, odd: str
) -> None:
    answer = get(client, f"decisions/{odd}", KEY)
    assert (answer.status_code, answer.json()["fields"][0]["field"]) == (400, "decision_id")


def test_a_refused_report_is_logged_once(client: Client, decision: Decision, caplog: pytest.LogCaptureFixture) -> None:
    post(client, "feedback", {"id": "r", "decision_id": decision.pk, "lease_closed": True})
    assert [record.getMessage().split()[0] for record in caplog.records if "refused" in record.getMessage()] == [
        "refused"
    ]


def test_nobody_else_follows_it(client: Client, decision: Decision) -> None:
    make_device("other", credential="o" * 43)
    assert get(client, f"decisions/{decision.pk}", "o" * 43).status_code == 403
    assert get(client, "decisions/unknown", KEY).status_code == 404
