"""Feedback in, rows out: who may report, what counts once, what is late, lost or too much."""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import Any

import pytest
from pytest_django import DjangoAssertNumQueries, Settings

from device_agents import wire
from qoe_service.decisions import feedback
from qoe_service.decisions.feedback import ApplicationAuthor, Author, DeviceAuthor, accept, accept_one
from qoe_service.decisions.models import Decision, Feedback, Orphan
from qoe_service.errors import NotPermitted, TooManyRequests
from tests.builders import (
    NOW,
    make_application,
    make_application_key,
    make_decision,
    make_device,
    make_variant,
)

pytestmark = pytest.mark.django_db
Status = wire.FeedbackStatus


def report(decision_id: str, **fields: Any) -> wire.Feedback:
    fields.setdefault("id", uuid.uuid4().hex)
    if not {"rating", "components", "lease_closed"} & set(fields):
        fields["rating"] = 0.5
    return wire.Feedback(decision_id=decision_id, **fields)


def statuses(items: list[wire.Feedback], author: Author) -> list[str]:
    return [result.status.value for result in accept(items=items, author=author, now=NOW)]


@pytest.fixture
def decision() -> Decision:
    application = make_application()
    return make_decision(make_device(), application, make_variant(application))


@pytest.fixture
def device_author(decision: Decision) -> DeviceAuthor:
    return DeviceAuthor(decision.device)


@pytest.fixture
def app_author(decision: Decision) -> ApplicationAuthor:
    return ApplicationAuthor(make_application_key())


def test_feedback_sent_twice_is_stored_once(decision: Decision, app_author: ApplicationAuthor) -> None:
    item = report(decision.pk, id="r1", rating=0.4)
    assert statuses([item, item], app_author) == ["accepted", "duplicate"]
    assert statuses([item], app_author) == ["duplicate"]
    assert list(Feedback.objects.values_list("rating", flat=True)) == [0.4]


def test_the_same_id_with_other_content_changes_nothing(decision: Decision, app_author: ApplicationAuthor) -> None:
    accept(items=[report(decision.pk, id="r1", rating=0.4)], author=app_author, now=NOW)
    assert statuses([report(decision.pk, id="r1", rating=0.9)], app_author) == ["duplicate"]
    assert Feedback.objects.get().rating == 0.4


def test_device_and_app_may_use_the_same_id(
    decision: Decision, app_author: ApplicationAuthor, device_author: DeviceAuthor
) -> None:
    assert statuses([report(decision.pk, id="r1")], app_author) == ["accepted"]
    assert statuses([report(decision.pk, id="r1")], device_author) == ["accepted"]


def test_two_apps_may_use_the_same_id(decision: Decision, app_author: ApplicationAuthor) -> None:
    other = ApplicationAuthor(make_application_key(key="o" * 43))
    assert statuses([report(decision.pk, id="r1", rating=0.2)], app_author) == ["accepted"]
    assert statuses([report(decision.pk, id="r1", rating=0.8)], other) == ["accepted"]
    assert statuses([report(decision.pk, id="r1")], other) == ["duplicate"]
    assert set(Feedback.objects.values_list("rating", flat=True)) == {0.2, 0.8}


def test_an_id_from_before_senders_were_kept_still_counts_once(
    decision: Decision, app_author: ApplicationAuthor
) -> None:
    Feedback.objects.create(decision=decision, source="app", feedback_id="r1", rating=1, received_at=NOW)
    assert statuses([report(decision.pk, id="r1")], app_author) == ["duplicate"]


def test_only_the_closing_report_says_that_a_lease_was_overridden(
    decision: Decision, device_author: DeviceAuthor
) -> None:
    items = [
        report(decision.pk, id="rating", overridden=True),
        report(decision.pk, id="lease", overridden=True, lease_closed=True),
    ]
    accept(items=items, author=device_author, now=NOW)
    assert dict(Feedback.objects.values_list("feedback_id", "overridden")) == {"rating": False, "lease": True}


def test_ratings_that_used_up_the_quota_do_not_keep_a_device_from_closing_its_lease(
    decision: Decision, device_author: DeviceAuthor, settings: Settings
) -> None:
    settings.FEEDBACK_PER_DECISION = 1
    assert statuses([report(decision.pk) for _ in range(2)], device_author) == ["accepted", "rejected"]
    closing = [report(decision.pk, lease_closed=True) for _ in range(2)]
    assert statuses(closing, device_author) == ["accepted", "rejected"]


def test_an_explicit_zero_is_a_rating_and_absent_is_none(decision: Decision, app_author: ApplicationAuthor) -> None:
    components = wire.Components(accuracy=0.0)
    accept(
        items=[report(decision.pk, id="a", rating=0.0), report(decision.pk, id="b", components=components)],
        author=app_author,
        now=NOW,
    )
    zero, none = Feedback.objects.order_by("feedback_id")
    assert (zero.rating, none.rating) == (0.0, None)
    assert none.components == {"accuracy": 0.0}


def test_a_device_cannot_report_for_another(decision: Decision) -> None:
    stranger = DeviceAuthor(make_device("stranger"))
    [result] = accept(items=[report(decision.pk)], author=stranger, now=NOW)
    assert result.status is Status.REJECTED
    assert "somebody else" in result.detail
    with pytest.raises(NotPermitted):
        accept_one(item=report(decision.pk), author=stranger, now=NOW)
    assert not Feedback.objects.exists()


def test_an_app_cannot_rate_another_application(decision: Decision) -> None:
    other = ApplicationAuthor(make_application_key("speech", key="s" * 43))
    assert statuses([report(decision.pk)], other) == ["rejected"]
    assert not Feedback.objects.exists()


def test_an_app_cannot_close_a_lease(decision: Decision, app_author: ApplicationAuthor) -> None:
    assert statuses([report(decision.pk, lease_closed=True)], app_author) == ["rejected"]
    decision.refresh_from_db()
    assert decision.state == Decision.State.ACTIVE


def test_feedback_that_says_nothing_is_rejected(decision: Decision, app_author: ApplicationAuthor) -> None:
    [result] = accept(items=[wire.Feedback(id="r", decision_id=decision.pk)], author=app_author, now=NOW)
    assert (result.status, "rating" in result.detail) == (Status.REJECTED, True)


def test_feedback_about_an_unknown_decision_is_kept_once_as_an_orphan(app_author: ApplicationAuthor) -> None:
    item = report("nobody-made-this", id="r1")
    assert statuses([item], app_author) == ["orphan"]
    assert statuses([item], app_author) == ["orphan"]
    assert Orphan.objects.get().decision_id == "nobody-made-this"
    assert not Feedback.objects.exists()


def test_only_the_newest_orphans_are_kept(app_author: ApplicationAuthor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "ORPHANS_KEPT", 3)
    accept(items=[report(f"unknown-{number}") for number in range(5)], author=app_author, now=NOW)
    assert set(Orphan.objects.values_list("decision_id", flat=True)) == {"unknown-2", "unknown-3", "unknown-4"}


@pytest.mark.parametrize("state", [Decision.State.JOINED, Decision.State.DROPPED, Decision.State.NEVER_ACTIVE])
def test_feedback_after_the_join_is_kept_and_marked_late(
    decision: Decision, app_author: ApplicationAuthor, state: Decision.State
) -> None:
    Decision.objects.update(state=state)
    assert statuses([report(decision.pk)], app_author) == ["late"]
    assert Feedback.objects.get().is_late


def test_the_device_closes_its_lease_and_later_ratings_still_count(
    decision: Decision, device_author: DeviceAuthor, app_author: ApplicationAuthor
) -> None:
    closing = report(decision.pk, lease_closed=True, components=wire.Components(requests=9), active_s=8)
    assert statuses([closing], device_author) == ["accepted"]
    assert statuses([report(decision.pk)], app_author) == ["accepted"]
    decision.refresh_from_db()
    assert (decision.state, decision.closed_at) == (Decision.State.CLOSED, NOW)


def test_a_lease_closed_before_the_service_saw_it_active_supersedes_older_ones(
    decision: Decision, device_author: DeviceAuthor
) -> None:
    variant = make_variant(decision.application, "digits-large")
    new = make_decision(
        decision.device,
        decision.application,
        variant,
        state="pending",
        active_at=None,
        decided_at=NOW + timedelta(seconds=5),
    )
    Decision.objects.filter(pk=decision.pk).update(state="pending", active_at=None)
    accept(items=[report(new.pk, lease_closed=True, active_s=8)], author=device_author, now=NOW)
    new.refresh_from_db()
    decision.refresh_from_db()
    assert (new.state, new.active_at) == ("closed", NOW - timedelta(seconds=8))
    assert decision.state == "never_active"


def test_a_decision_takes_only_so_many_reports(
    decision: Decision, app_author: ApplicationAuthor, settings: Settings
) -> None:
    settings.FEEDBACK_PER_DECISION = 2
    assert statuses([report(decision.pk) for _ in range(3)], app_author) == ["accepted", "accepted", "rejected"]
    with pytest.raises(TooManyRequests) as refused:
        accept_one(item=report(decision.pk), author=app_author, now=NOW)
    assert refused.value.retry_after_s
    assert Feedback.objects.count() == 2


def test_a_full_batch_takes_a_fixed_number_of_queries(
    decision: Decision, app_author: ApplicationAuthor, django_assert_max_num_queries: DjangoAssertNumQueries
) -> None:
    items = [report(decision.pk) for _ in range(wire.FEEDBACK_BATCH_LIMIT)]
    # SQLite takes 999 values a statement, so the rows alone are six inserts.
    with django_assert_max_num_queries(14):
        assert set(statuses(items, app_author)) == {"accepted"}
    assert Feedback.objects.count() == wire.FEEDBACK_BATCH_LIMIT
