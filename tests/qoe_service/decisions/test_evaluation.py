"""The log in, the verdict out: numbers where there is evidence, and plain words where there is none."""

from __future__ import annotations

import json
import time
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command

from qoe_service.decisions import evaluation
from qoe_service.decisions.models import Decision, JoinedEvent
from qoe_service.decisions.record import interaction_of
from selector.records import candidates_from_record
from selector.verdict import verdict as selector_verdict
from tests.builders import NOW, make_application, make_decision, make_device, make_joined_event, make_variant
from tests.qoe_service.decisions.scenes import Scene, make_scene

pytestmark = pytest.mark.django_db
KEYS = {
    "qoe",
    "uniform",
    "best_fixed",
    "lift_over_uniform",
    "lift_over_best_fixed",
    "slo_violation_share",
    "decisions",
    "feedback",
}


def copy_log(scene: Scene, count: int) -> None:
    """Many more decisions like those of the scene, spread over its devices."""
    events = list(JoinedEvent.objects.select_related("decision").order_by("number"))
    decisions, copies = [], []
    for index in range(count):
        event = events[index % len(events)]
        original = event.decision
        row = {field.attname: getattr(original, field.attname) for field in Decision._meta.concrete_fields}
        copy = Decision(**{**row, "id": f"copy-{index}"})
        decisions.append(copy)
        copies.append(
            JoinedEvent(
                application=scene.application,
                number=len(events) + index + 1,
                decision=copy,
                measurement=event.measurement,
                reward=event.reward,
                formula_version=1,
                joined_at=NOW + timedelta(seconds=index),
            )
        )
    Decision.objects.bulk_create(decisions)
    JoinedEvent.objects.bulk_create(copies)


def test_json_has_exactly_its_keys_and_nulls_without_evidence(capsys: pytest.CaptureFixture[str]) -> None:
    make_application()
    call_command("verdict", "digits", "--json")
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    found = json.loads(line)
    assert set(found) == KEYS
    assert (found.pop("decisions"), found.pop("feedback")) == (0, 0)
    assert set(found.values()) == {None}


def test_json_has_estimates_once_there_is_evidence(capsys: pytest.CaptureFixture[str]) -> None:
    scene = make_scene(devices=4)
    scene.pass_leases(9)
    call_command("verdict", "digits", "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["decisions"], found["feedback"]) == (36, 36)
    assert set(found["qoe"]) == {"mean", "low", "high"}
    assert found["uniform"]["low"] <= found["uniform"]["mean"] <= found["uniform"]["high"]
    # Before the first policy the choice is uniform, so there is no lift over it: within five standard errors of none.
    lift = found["lift_over_uniform"]
    assert abs(lift["mean"]) <= 5 / (2 * 1.96) * (lift["high"] - lift["low"])
    assert 0 < found["slo_violation_share"] < 1


def test_the_table_says_what_is_known_and_why_something_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    scene = make_scene()
    scene.pass_leases(1)
    call_command("verdict", "digits")
    text = capsys.readouterr().out
    assert "digits: 2 decisions on 2 devices, 2 feedback" in text
    assert "not enough evidence: needs an effective sample" in text
    scene.pass_leases(16)
    call_command("verdict", "digits")
    text = capsys.readouterr().out
    assert "fixed_n" in text
    assert "effective sample" in text
    with pytest.raises(CommandError, match="no application"):
        call_command("verdict", "speech")


def test_slim_evidence_gives_the_verdict_of_the_whole_log() -> None:
    scene = make_scene(devices=4)
    scene.pass_leases(9)
    events = JoinedEvent.objects.select_related("decision").order_by("number")
    whole = selector_verdict([interaction_of(event) for event in events])
    assert evaluation.verdict(application=scene.application, now=NOW).verdict == whole


def test_only_what_is_new_is_read() -> None:
    scene = make_scene()
    scene.pass_leases(2)
    first = evaluation.verdict(application=scene.application, now=scene.now)
    again = evaluation.verdict(application=scene.application, now=scene.now)
    assert again.verdict is first.verdict
    scene.pass_leases(1)
    assert evaluation.verdict(application=scene.application, now=scene.now).verdict.decisions == 6


def test_a_long_log_is_judged_by_its_newest_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "EVENTS_JUDGED", 6)
    scene = make_scene()
    scene.pass_leases(4)
    for _ in range(2):
        newest = list(JoinedEvent.objects.select_related("decision").order_by("-number")[:6])[::-1]
        expected = selector_verdict([interaction_of(event) for event in newest])
        assert evaluation.verdict(application=scene.application, now=scene.now).verdict == expected
        # More of the log passes, and the window moves with it, though it is as full as it was.
        scene.pass_leases(1)
    evaluation._logs.clear()
    assert evaluation.verdict(application=scene.application, now=scene.now).verdict.decisions == 6


def test_another_log_under_the_same_numbers_is_read_anew() -> None:
    scene = make_scene()
    scene.pass_leases(2)
    before = evaluation.verdict(application=scene.application, now=scene.now).verdict
    Decision.objects.all().delete()
    type(scene.application.learner).objects.update(last_event_number=0)
    scene.pass_leases(2)
    after = evaluation.verdict(application=scene.application, now=scene.now).verdict
    assert (before.decisions, after.decisions) == (4, 4)
    assert after is not before


def test_five_thousand_decisions_are_judged_within_a_second_of_processor_time() -> None:
    scene = make_scene(devices=4)
    scene.pass_leases(2)
    copy_log(scene, 5_000)
    evaluation.verdict(application=scene.application, now=NOW)
    scene.application.learner.refresh_from_db()
    type(scene.application.learner).objects.update(last_event_number=5_008)
    scene.pass_leases(1)
    at_once = evaluation.verdict(application=scene.application, now=NOW)
    started = time.thread_time()
    later = evaluation.verdict(application=scene.application, now=NOW + evaluation.MINOR_FOR)
    assert time.thread_time() - started < 1.0
    # Four decisions more in five thousand are not worth judging the log again within seconds.
    assert (at_once.verdict.decisions, later.verdict.decisions) == (5_008, 5_012)


def test_an_unreadable_record_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    application = make_application()
    make_joined_event(make_decision(make_device(), application, make_variant(application)))
    assert evaluation.verdict(application=application, now=NOW).verdict.decisions == 0
    assert "event not evaluated" in caplog.text


def test_qoe_over_time_is_bucketed_with_counts() -> None:
    application = make_application()
    variant, device = make_variant(application), make_device()
    for second, reward in ((0, 0.2), (1, 0.4), (10, 0.9)):
        decision = make_decision(device, application, variant)
        make_joined_event(decision, reward=reward, joined_at=NOW + timedelta(seconds=second))
    now = NOW + timedelta(seconds=20)
    curve = evaluation.qoe_over_time(application=application, now=now, buckets=4)
    assert [(point.at, round(point.mean, 6), point.count) for point in curve.points] == [
        (NOW, 0.3, 2),
        (NOW + timedelta(seconds=10), 0.9, 1),
    ]
    assert (curve.uniform, curve.best_fixed) == (None, None)
    window = evaluation.qoe_over_time(application=application, now=now, window=timedelta(seconds=12), buckets=4)
    assert [point.count for point in window.points] == [1]


def test_a_decision_is_explained_likeliest_first() -> None:
    scene = make_scene()
    decision = scene.decide()
    rows = evaluation.explain(decision=decision)
    shares = [row.candidate.probability for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert [row.candidate.action.key for row in rows if row.is_chosen] == [decision.action_key]
    assert len(rows) == len(candidates_from_record(decision.candidates))


def test_an_unreadable_decision_has_no_explanation() -> None:
    application = make_application()
    assert evaluation.explain(decision=make_decision(make_device(), application, make_variant(application))) == []
