from __future__ import annotations

from datetime import timedelta

import pytest
from django.conf import LazySettings
from django.db import transaction

from qoe_service.decisions.models import Decision
from qoe_service.fleet import enrolment
from qoe_service.rollouts import changes, reconcile, tasks
from qoe_service.rollouts.models import Assignment, AttemptOutcome, Change, DesiredVersion, RankingTime
from tests.builders import NOW, make_application, make_decision, make_device, make_variant
from tests.qoe_service.rollouts.conftest import RunTogether, Site

pytestmark = pytest.mark.django_db
TRACE = "a" * 32


def decide(site: Site, seconds: float = 0) -> list[Decision]:
    return reconcile.reconcile(device_id=site.device.pk, trace_id=TRACE, now=NOW + timedelta(seconds=seconds))


def report(site: Site, **fields: object) -> None:
    Assignment.objects.filter(device=site.device).update(**fields)


def test_a_new_device_gets_a_decision_and_is_told(site: Site) -> None:
    [decision] = decide(site)
    assert (decision.reason, decision.trace_id, decision.state) == ("enrolment", TRACE, "pending")
    assert Assignment.objects.get().decision == decision
    assert DesiredVersion.objects.get().version == 1
    assert list(Change.objects.values_list("device_id", "version")) == [(site.device.pk, 1)]


def test_nothing_is_decided_while_nothing_is_due(site: Site) -> None:
    decide(site)
    assert decide(site, 60) == []
    assert Decision.objects.count() == 1
    assert DesiredVersion.objects.get().version == 1


def test_a_lease_that_the_device_reports_as_over_is_followed_by_the_next(site: Site) -> None:
    [first] = decide(site)
    report(site, reported_decision_id=first.pk, reported_active_s=site.application.lease_s - 0.1)
    assert decide(site, 5) == []
    report(site, reported_active_s=site.application.lease_s)
    [second] = decide(site, 10)
    assert second.reason == "lease_over"
    assert DesiredVersion.objects.get().version == 2


def test_lease_time_of_an_older_decision_ends_nothing(site: Site) -> None:
    decide(site)
    report(site, reported_decision_id="older", reported_active_s=1000)
    assert decide(site, 10) == []


@pytest.mark.parametrize("state", ["closed", "joined", "dropped"])
def test_a_decision_whose_feedback_is_in_is_followed_by_the_next(site: Site, state: str) -> None:
    [first] = decide(site)
    Decision.objects.filter(pk=first.pk).update(state=state)
    assert [each.reason for each in decide(site, 10)] == ["lease_over"]


def test_a_rollback_is_followed_by_the_next(site: Site) -> None:
    [first] = decide(site)
    AttemptOutcome.objects.create(
        device=site.device, application=site.application, decision_id=first.pk, outcome="rolled_back", at=NOW
    )
    assert [each.reason for each in decide(site, 1)] == ["rollback"]


def test_a_device_that_is_there_but_cannot_activate_gets_another_decision(site: Site, settings: LazySettings) -> None:
    settings.ACTIVATION_TIMEOUT_S = 60
    decide(site)
    site.device.last_seen_at = NOW + timedelta(seconds=59)
    site.device.save()
    assert decide(site, 1000) == [], "a device that was away has not failed"
    site.device.last_seen_at = NOW + timedelta(seconds=61)
    site.device.save()
    assert [each.reason for each in decide(site, 1000)] == ["not_activated"]


def test_a_revoked_device_gets_nothing(site: Site) -> None:
    enrolment.revoke(device_id=site.device.pk, actor="anna", now=NOW)
    assert decide(site) == []


def test_an_application_without_a_measured_variant_waits(site: Site) -> None:
    make_variant(make_application("words"), "words-small", accuracy=None)
    assert [each.application_id for each in decide(site)] == ["digits"]


def test_a_label_narrows_the_applications_of_a_device(site: Site) -> None:
    make_variant(make_application("words"), "words-small")
    narrowed = make_device("narrowed", labels={"applications": "words, other"})
    reconcile.assign_applications()
    names = Assignment.objects.filter(device=narrowed).values_list("application", flat=True)
    assert list(names) == ["words"]
    assert Assignment.objects.filter(device=site.device).count() == 2


def test_when_everything_is_forbidden_the_device_keeps_what_it_runs(site: Site) -> None:
    [first] = decide(site)
    Decision.objects.filter(pk=first.pk).update(state="joined")
    site.application.bans.create(variant_digest=site.small.artifact_id, reason="test", created_at=NOW)
    site.application.bans.create(variant_digest=site.large.artifact_id, reason="test", created_at=NOW)
    assert decide(site, 10) == []
    assert Assignment.objects.get().decision == first
    assert DesiredVersion.objects.get().version == 1


def test_what_cannot_be_decided_is_tried_ever_less_often_and_told_once(
    site: Site, caplog: pytest.LogCaptureFixture, settings: LazySettings
) -> None:
    settings.RESCAN_S = 2
    for variant in (site.small, site.large):
        site.application.bans.create(variant_digest=variant.artifact_id, reason="test", created_at=NOW)
    tried = []
    for seconds in range(0, 200, 2):
        before = Assignment.objects.values_list("undecided_until", flat=True).first()
        assert decide(site, seconds) == []
        if Assignment.objects.get().undecided_until != before:
            tried.append(seconds)
    assert tried == [0, 2, 6, 14, 30, 62, 122, 182]
    assert caplog.text.count("no decision") == 1
    site.application.bans.all().delete()
    assert decide(site, 240) == []
    assert len(decide(site, 242)) == 1
    row = Assignment.objects.get()
    assert (row.undecided_until, row.undecided_wait_s, row.undecided_why) == (None, 0, "")


def test_devices_that_never_had_a_decision_come_first(site: Site) -> None:
    [first] = decide(site)
    Decision.objects.filter(pk=first.pk).update(state="joined")
    newcomer = make_device("newcomer")
    reconcile.assign_applications()
    assert [each.device_id for each in reconcile.ready(now=NOW)] == [newcomer.pk, site.device.pk]
    assert "NULLS FIRST" in str(reconcile.ready(now=NOW).query)


def test_whoever_comes_second_leaves_nothing_behind(site: Site) -> None:
    reconcile.assign_applications()
    stale = reconcile.due().get()
    [first] = decide(site)
    with pytest.raises(reconcile._LostRaceError), transaction.atomic():
        reconcile._decide(stale, TRACE, NOW)
    assert list(Decision.objects.all()) == [first]
    assert DesiredVersion.objects.get().version == 1


@pytest.mark.django_db(transaction=True)
def test_reconciling_from_several_workers_at_once_decides_once(site: Site, run_together: RunTogether) -> None:
    made = run_together(*[lambda: decide(site)] * 4)
    assert sum(len(each) for each in made) == 1
    assert Decision.objects.count() == 1
    assert DesiredVersion.objects.get().version == 1


def test_the_scan_finds_what_no_message_announced(site: Site) -> None:
    others = [make_device(f"device-{n}") for n in range(3)]
    tasks.reconcile_due()
    tasks.reconcile_due()
    assert Decision.objects.count() == 1 + len(others)
    assert RankingTime.objects.count() > 0


def test_every_decision_is_one_log_line_with_its_ids(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="qoe_service")
    tasks.reconcile_device(site.device.pk, TRACE)
    decision = Decision.objects.get()
    [line] = [each for each in caplog.records if each.message.startswith("decided")]
    for word in (site.device.pk, "digits", decision.pk):
        assert word in line.message
    assert decision.trace_id == TRACE


def test_old_changes_are_forgotten_and_new_ones_kept(site: Site) -> None:
    Change.objects.create(device=site.device, version=1, changed_at=NOW - timedelta(days=1))
    decide(site)
    Change.objects.filter(version=1).exclude(changed_at=NOW).update(version=0)
    changes.prune(now=NOW + timedelta(minutes=5))
    assert list(Change.objects.values_list("version", flat=True)) == [1]


def test_a_decision_of_another_device_is_never_due_here(site: Site) -> None:
    other = make_device("other")
    make_decision(other, site.application, site.small)
    assert [each.device_id for each in decide(site)] == [site.device.pk]
