"""Closed leases in, rewards out: folding, waiting, silence, failures, and one gapless order."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from device_agents import wire
from qoe_service.catalogue.models import Application
from qoe_service.decisions import feedback
from qoe_service.decisions.feedback import DeviceAuthor
from qoe_service.decisions.models import Decision, Feedback, JoinedEvent, Learner
from qoe_service.fleet.models import Device
from tests.builders import NOW, make_application, make_decision, make_device, make_variant
from tests.qoe_service.decisions.conftest import RunTogether

pytestmark = pytest.mark.django_db
FORMULA = {"weight_latency": 1, "weight_accuracy": 0, "weight_energy": 0, "weight_rating": 1, "switching_weight": 0}


def later(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


@pytest.fixture
def application() -> Application:
    return make_application(formula=FORMULA)


@pytest.fixture
def device() -> Device:
    return make_device()


def lease(device: Device, application: Application, **fields: Any) -> Decision:
    variant = application.variants.first() or make_variant(application)
    return make_decision(device, application, variant, **fields)


def closed(device: Device, application: Application, **fields: Any) -> Decision:
    return lease(device, application, state="closed", closed_at=NOW, **fields)


def add(decision: Decision, **fields: Any) -> Feedback:
    fields.setdefault("source", "device" if "components" in fields else "app")
    fields.setdefault("lease_closed", fields["source"] == "device")
    number = Feedback.objects.count()
    return Feedback.objects.create(decision=decision, feedback_id=f"f{number}", received_at=NOW, **fields)


def state_of(decision: Decision) -> str:
    decision.refresh_from_db()
    return decision.state


def test_a_closed_lease_waits_for_ratings_and_then_becomes_a_reward(device: Device, application: Application) -> None:
    decision = closed(device, application)
    add(decision, components={"requests": 10, "slo_hit_share": 0.5})
    assert feedback.close_due(now=later(0.9)) == []
    add(decision, rating=1.0)
    assert feedback.close_due(now=later(1.0)) == ["digits"]
    event = JoinedEvent.objects.get()
    assert (event.number, event.reward, event.formula_version) == (1, 0.75, 1)
    assert (event.measurement["rating"], event.measurement["ratings"]) == (1.0, 1)
    assert state_of(decision) == "joined"


def test_components_weigh_by_requests_and_ratings_are_averaged(device: Device, application: Application) -> None:
    decision = closed(device, application)
    add(decision, components={"requests": 30, "p95_ms": 10.0, "slo_hit_share": 1.0})
    add(decision, components={"requests": 10, "p95_ms": 50.0, "slo_hit_share": 0.0, "errors": 2})
    for rating in (0.0, 1.0, 0.5):
        add(decision, rating=rating)
    feedback.close_due(now=later(2))
    measurement = JoinedEvent.objects.get().measurement
    assert (measurement["requests"], measurement["errors"]) == (40, 2)
    assert (measurement["p95_ms"], measurement["slo_hit_share"]) == (20.0, 0.75)
    assert (measurement["rating"], measurement["ratings"]) == (0.5, 3)


def test_what_apps_say_through_the_device_cannot_outweigh_its_measurements(
    device: Device, application: Application
) -> None:
    decision = closed(device, application)
    add(decision, components={"requests": 10, "p95_ms": 10.0, "slo_hit_share": 1.0, "accuracy": 0.9})
    claim = {"requests": 10**9, "errors": 10**9, "p95_ms": 1000.0, "slo_hit_share": 0.0, "accuracy": 0.0}
    add(decision, components=claim, rating=0.5, lease_closed=False)
    feedback.close_due(now=later(2))
    measurement = JoinedEvent.objects.get().measurement
    assert (measurement["requests"], measurement.get("errors", 0)) == (10, 0)
    assert (measurement["p95_ms"], measurement["slo_hit_share"]) == (10.0, 1.0)
    assert measurement["accuracy"] == pytest.approx(0.9 * 10 / 11)
    assert (measurement["rating"], measurement["ratings"]) == (0.5, 1)


def test_a_rating_of_zero_lowers_the_reward_and_a_missing_one_does_not(
    device: Device, application: Application
) -> None:
    rated, silent = closed(device, application), closed(device, application)
    for decision in (rated, silent):
        add(decision, components={"requests": 10, "slo_hit_share": 1.0})
    add(rated, rating=0.0)
    feedback.close_due(now=later(2))
    rewards = dict(JoinedEvent.objects.values_list("decision_id", "reward"))
    assert rewards == {rated.pk: 0.5, silent.pk: 1.0}


def test_late_feedback_does_not_count(device: Device, application: Application) -> None:
    decision = closed(device, application)
    add(decision, components={"requests": 10, "slo_hit_share": 1.0})
    add(decision, rating=0.0, is_late=True)
    feedback.close_due(now=later(2))
    assert JoinedEvent.objects.get().reward == 1.0


def test_the_download_is_charged_unless_the_device_had_the_variant(device: Device, application: Application) -> None:
    variant = make_variant(application, size_bytes=7_000)
    fetched = closed(device, application, context={"cached_digests": []})
    cached = closed(device, application, context={"cached_digests": [variant.artifact_id]})
    running = closed(device, application, context={"incumbent": f"{variant.artifact_id[:12]}/b1c1t1"})
    for decision in (fetched, cached, running):
        add(decision, components={"requests": 1, "slo_hit_share": 1.0})
    feedback.close_due(now=later(2))
    sizes = {event.decision_id: event.measurement["download_bytes"] for event in JoinedEvent.objects.all()}
    assert sizes == {fetched.pk: 7_000, cached.pk: 0, running.pk: 0}


def test_an_overridden_lease_is_not_learnt_from(device: Device, application: Application) -> None:
    decision = closed(device, application)
    add(decision, components={"requests": 10, "slo_hit_share": 1.0}, overridden=True)
    assert feedback.close_due(now=later(2)) == []
    assert state_of(decision) == "dropped"


def test_a_lease_without_requests_or_ratings_is_dropped(device: Device, application: Application) -> None:
    decision = closed(device, application)
    add(decision, components={"requests": 0}, lease_closed=True)
    assert feedback.close_due(now=later(2)) == []
    assert (state_of(decision), JoinedEvent.objects.count()) == ("dropped", 0)


@pytest.mark.parametrize(("silence_reward", "state", "rewards"), [(None, "dropped", []), (0.1, "joined", [0.1])])
def test_silence_follows_the_rule_of_the_application(
    device: Device, silence_reward: float | None, state: str, rewards: list[float]
) -> None:
    application = make_application(silence_after_s=60, silence_reward=silence_reward)
    decision = lease(device, application, active_at=NOW)
    feedback.close_due(now=later(67.9))
    assert state_of(decision) == "active"
    feedback.close_due(now=later(68))
    assert state_of(decision) == state
    assert list(JoinedEvent.objects.values_list("reward", flat=True)) == rewards


def test_a_silent_device_whose_users_rated_is_judged_by_them(device: Device) -> None:
    application = make_application(silence_after_s=60, silence_reward=0.0, formula=FORMULA)
    decision = lease(device, application, active_at=NOW)
    add(decision, rating=0.8)
    feedback.close_due(now=later(68))
    assert JoinedEvent.objects.get().reward == 0.8


def test_a_decision_that_never_became_active_is_never_joined(device: Device, application: Application) -> None:
    decision = lease(device, application, state="pending", active_at=None)
    assert feedback.close_due(now=later(10**6)) == []
    assert state_of(decision) == "pending"


@pytest.mark.parametrize("state", ["pending", "active", "closed"])
def test_a_failure_becomes_a_reward_at_once_and_once(device: Device, state: str) -> None:
    application = make_application(formula={**FORMULA, "failure_reward": 0.05})
    decision = lease(device, application, state=state, closed_at=NOW if state == "closed" else None, propensity=0.25)
    assert feedback.report_failure(decision_id=decision.pk, device=device, reason="p95 too high", now=NOW)
    assert not feedback.report_failure(decision_id=decision.pk, device=device, reason="p95 too high", now=NOW)
    event = JoinedEvent.objects.get()
    assert (event.reward, event.measurement["failed"], event.decision.propensity) == (0.05, True, 0.25)
    assert not Feedback.objects.exists()
    assert state_of(decision) == "joined"


@pytest.mark.parametrize("requests", [10, 0])
def test_a_failure_after_the_join_is_logged_and_kept_once_as_late(
    device: Device, application: Application, requests: int, caplog: pytest.LogCaptureFixture
) -> None:
    decision = closed(device, application)
    add(decision, components={"requests": requests, "slo_hit_share": 1.0})
    feedback.close_due(now=later(2))
    before = list(JoinedEvent.objects.values())
    for _ in range(2):
        assert not feedback.report_failure(decision_id=decision.pk, device=device, reason="crashed", now=later(3))
    assert list(JoinedEvent.objects.values()) == before
    assert Feedback.objects.filter(decision=decision, is_late=True).count() == 1
    assert caplog.text.count("too late to be learnt") == 1
    assert "crashed" in caplog.text


def test_a_failure_of_another_device_or_an_unknown_decision_changes_nothing(
    device: Device, application: Application
) -> None:
    decision = lease(device, application)
    other = make_device("other")
    assert not feedback.report_failure(decision_id=decision.pk, device=other, reason="", now=NOW)
    assert not feedback.report_failure(decision_id="unknown", device=device, reason="", now=NOW)
    assert state_of(decision) == "active"


def test_joining_twice_writes_every_reward_once(device: Device, application: Application) -> None:
    for _ in range(3):
        add(closed(device, application), components={"requests": 1, "slo_hit_share": 1.0})
    feedback.close_due(now=later(2))
    feedback.close_due(now=later(3))
    assert list(JoinedEvent.objects.values_list("number", flat=True)) == [1, 2, 3]


def test_applications_have_logs_of_their_own(device: Device, application: Application) -> None:
    speech = make_application("speech")
    for each in (application, speech):
        add(closed(device, each), components={"requests": 1, "slo_hit_share": 1.0})
    assert sorted(feedback.close_due(now=later(2))) == ["digits", "speech"]
    assert list(JoinedEvent.objects.values_list("number", flat=True)) == [1, 1]


def test_an_application_that_cannot_be_joined_does_not_keep_others_from_it(
    device: Device, application: Application, caplog: pytest.LogCaptureFixture
) -> None:
    broken = make_application("a-broken-one", formula={"weight_latency": "much"})
    waiting = closed(device, broken)
    add(closed(device, application), components={"requests": 1, "slo_hit_share": 1.0})
    assert feedback.close_due(now=later(2)) == ["digits"]
    assert state_of(waiting) == "closed"
    assert "joining failed application=a-broken-one" in caplog.text


def test_concurrent_joins_leave_no_gap_and_no_double(run_together: RunTogether) -> None:
    application, device = make_application(formula=FORMULA), make_device()
    for _ in range(40):
        add(closed(device, application), components={"requests": 1, "slo_hit_share": 1.0})
    failing = [lease(device, application) for _ in range(20)]

    def fail_all() -> None:
        for decision in failing:
            feedback.report_failure(decision_id=decision.pk, device=device, reason="", now=NOW)

    run_together(
        lambda: feedback.close_due(now=later(2)),
        lambda: feedback.close_due(now=later(2)),
        fail_all,
        fail_all,
    )
    assert sorted(JoinedEvent.objects.values_list("number", flat=True)) == list(range(1, 61))
    assert Learner.objects.get().last_event_number == 60


def test_one_report_sent_by_two_threads_is_stored_once(run_together: RunTogether) -> None:
    application, device = make_application(), make_device()
    decision = lease(device, application)
    items = [wire.Feedback(id=f"r{number}", decision_id=decision.pk, rating=0.5) for number in range(50)]
    results = run_together(*[lambda: feedback.accept(items=items, author=DeviceAuthor(device), now=NOW)] * 2)
    assert Feedback.objects.count() == 50
    assert sum(each.status is wire.FeedbackStatus.ACCEPTED for result in results for each in result) == 50
