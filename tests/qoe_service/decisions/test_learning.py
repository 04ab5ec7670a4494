"""The log in, policy versions out: one learner, in order, once, and again from nothing."""

from __future__ import annotations

import hashlib
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from pytest_django import Settings

from qoe_service.decisions import learning, policies, tasks
from qoe_service.decisions.models import CalibrationRow, Learner, PolicyVersion
from tests.qoe_service.decisions.conftest import RunTogether
from tests.qoe_service.decisions.scenes import Scene, make_scene

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def first_policy_after_four(settings: Settings) -> None:
    settings.FIRST_POLICY_AFTER = 4


@pytest.fixture
def scene() -> Scene:
    return make_scene()


def learner() -> Learner:
    return Learner.objects.get()


def test_the_first_version_waits_for_enough_rewards(scene: Scene) -> None:
    scene.pass_leases(1)
    assert scene.learn() is None
    scene.pass_leases(1)
    version = scene.learn()
    assert version is not None
    assert (version.number, version.trained_through, learner().learnt_through) == (1, 4, 4)
    assert hashlib.sha256(bytes(version.state or b"")).hexdigest() == version.sha256
    assert {row.scope for row in CalibrationRow.objects.all()} == {
        "fleet",
        "class:tablet",
        "device:d-device-0",
        "device:d-device-1",
    }


def test_each_event_is_learnt_once(scene: Scene) -> None:
    scene.pass_leases(2)
    first = scene.learn()
    assert scene.learn() is None
    scene.pass_leases(1)
    second = scene.learn()
    assert first is not None
    assert second is not None
    assert (second.number, second.trained_through) == (2, 6)
    assert second.sha256 != first.sha256


def test_versions_keep_their_distance(scene: Scene, settings: Settings) -> None:
    settings.LEARN_INTERVAL_S = 30
    scene.pass_leases(2)
    scene.learn()
    scene.pass_leases(1)
    assert scene.learn() is None
    scene.now += timedelta(seconds=30)
    assert scene.learn() is not None


def test_after_an_outage_the_learner_catches_up_without_waiting(
    scene: Scene, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.LEARN_INTERVAL_S = 3600
    scene.pass_leases(2)
    scene.learn()
    monkeypatch.setattr(learning, "EVENTS_AT_ONCE", 4)
    scene.pass_leases(5)
    tasks.learn()
    # Two full batches at once; what is left over waits for its interval.
    assert list(PolicyVersion.objects.order_by("number").values_list("trained_through", flat=True)) == [4, 8, 12]


def test_replaying_the_log_rebuilds_the_same_bytes_and_calibration(scene: Scene) -> None:
    for count in (2, 1, 3):
        scene.pass_leases(count)
        scene.learn()
        learning.forget()  # as if every version had been learnt by another process
    found = learning.replay(application=scene.application)
    newest = PolicyVersion.objects.latest("number")
    assert found is not None
    assert found.mismatches == ()
    assert found.state == bytes(newest.state or b"")
    assert found.calibration == dict(CalibrationRow.objects.values_list("scope", "state"))
    assert found.through == 12


def test_a_learner_that_stays_and_one_that_restarts_write_the_same_bytes(scene: Scene) -> None:
    scene.pass_leases(2)
    scene.learn()
    scene.pass_leases(2)
    scene.learn()
    kept = PolicyVersion.objects.get(number=2)
    PolicyVersion.objects.filter(number=2).delete()
    CalibrationRow.objects.all().delete()
    PolicyVersion.objects.update(state=None)
    Learner.objects.update(learnt_through=4)
    learning.forget()
    again = scene.learn("learner-2")
    assert again is not None
    assert (again.number, again.sha256) == (2, kept.sha256)


def test_the_replay_command_tells_match_from_mismatch(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    call_command("replay", "digits")
    assert "no policy yet" in capsys.readouterr().out
    scene.pass_leases(2)
    scene.learn()
    call_command("replay", "digits")
    assert "match after 4 events" in capsys.readouterr().out
    CalibrationRow.objects.filter(scope="fleet").update(state={"revision": 99})
    with pytest.raises(CommandError, match="mismatch in calibration fleet"):
        call_command("replay", "digits")


@pytest.mark.parametrize("state", [None, b"rubbish"])
def test_lost_or_corrupt_bytes_are_replayed_from_the_log(
    scene: Scene, state: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    scene.pass_leases(2)
    scene.learn()
    scene.pass_leases(1)
    PolicyVersion.objects.update(state=state)
    learning.forget()
    version = scene.learn()
    assert version is not None
    assert "policy replayed" in caplog.text
    found = learning.replay(application=scene.application)
    assert found is not None
    assert found.mismatches == ()
    assert policies.champion(scene.application).number == version.number


def test_a_long_replay_keeps_its_lease(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each event takes ten seconds here, and another learner asks after each."""
    scene.pass_leases(3)
    scene.learn()
    scene.pass_leases(1)
    PolicyVersion.objects.update(state=b"of an older feature schema")
    learning.forget()
    mine = learning.claim(application=scene.application, owner="one", now=scene.now)
    assert mine is not None
    elapsed, refused = [0.0], []

    def seconds() -> float:
        later = scene.now + timedelta(seconds=elapsed[0])
        refused.append(learning.claim(application=scene.application, owner="two", now=later) is None)
        elapsed[0] += 10.0
        return elapsed[0] - 10.0

    monkeypatch.setattr(learning, "EVENTS_AT_ONCE", 1)
    monkeypatch.setattr("qoe_service.decisions.learning.time.monotonic", seconds)
    assert learning.learn_claimed(mine, scene.now) is not None
    assert elapsed[0] > 3 * learning.LEASE.total_seconds()
    assert all(refused)


def test_another_owner_waits_while_a_lease_lives_and_takes_over_after(scene: Scene) -> None:
    scene.pass_leases(2)
    mine = learning.claim(application=scene.application, owner="one", now=scene.now)
    assert mine is not None
    assert scene.learn("two") is None
    assert learning.claim(application=scene.application, owner="one", now=scene.now) is not None
    assert learner().fencing_number == mine.fencing_number
    scene.now += learning.LEASE
    version = scene.learn("two")
    assert version is not None
    assert version.fencing_number == mine.fencing_number + 1


def test_a_finished_learner_hands_over_at_once(scene: Scene) -> None:
    scene.pass_leases(2)
    assert scene.learn("one") is not None
    scene.pass_leases(1)
    assert scene.learn("two") is not None
    assert learner().fencing_number == 2


def test_the_late_write_of_an_old_learner_is_refused(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.pass_leases(2)
    old = learning.claim(application=scene.application, owner="old", now=scene.now)
    assert old is not None
    scene.now += learning.LEASE
    version = scene.learn("new")
    assert version is not None
    before = list(CalibrationRow.objects.values())
    assert learning.learn_claimed(old, scene.now) is None
    assert list(PolicyVersion.objects.values_list("number", flat=True)) == [1]
    assert list(CalibrationRow.objects.values()) == before
    assert "late learner refused" in caplog.text


def test_the_fence_holds_even_against_an_earlier_claim_of_the_same_owner(scene: Scene) -> None:
    scene.pass_leases(2)
    claims = []
    for owner in ("one", "two", "one"):
        claims.append(learning.claim(application=scene.application, owner=owner, now=scene.now))
        scene.now += learning.LEASE
    earliest, _, newest = claims
    assert earliest is not None
    assert newest is not None
    assert learning.learn_claimed(earliest, scene.now) is None
    assert not PolicyVersion.objects.exists()
    assert learning.learn_claimed(newest, scene.now) is not None


def test_two_learners_at_once_make_one_version(run_together: RunTogether) -> None:
    scene = make_scene()
    scene.pass_leases(2)
    now = scene.now + timedelta(seconds=2)
    made = run_together(
        *[
            lambda owner=owner: learning.learn(application=scene.application, owner=owner, now=now)
            for owner in ("one", "two", "three")
        ]
    )
    assert sum(version is not None for version in made) == 1
    assert PolicyVersion.objects.count() == 1
    assert learner().learnt_through == 4


def test_an_event_that_no_learner_may_see_is_passed_over(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.pass_leases(2)
    poisoned = scene.application.joined_events.get(number=2)
    poisoned.measurement["p95_ms"] = -5.0
    poisoned.save()
    version = scene.learn()
    assert version is not None
    assert version.trained_through == 4
    assert "event not learnt" in caplog.text
    found = learning.replay(application=scene.application)
    assert found is not None
    assert found.mismatches == ()


def test_the_joining_task_joins_and_is_safe_to_run_twice(scene: Scene) -> None:
    for device in scene.devices:
        scene.serve(scene.decide(device))
    tasks.close_due()
    tasks.close_due()
    assert list(scene.application.joined_events.values_list("number", flat=True)) == [1, 2]


def test_the_task_learns_every_application_and_is_safe_to_run_twice(scene: Scene) -> None:
    scene.pass_leases(2)
    tasks.learn()
    tasks.learn()
    assert list(PolicyVersion.objects.values_list("application", "number")) == [("digits", 1)]


def test_old_bytes_are_pruned_and_their_rows_stay(scene: Scene, settings: Settings) -> None:
    settings.POLICY_STATES_KEPT = 1
    for _ in range(3):
        scene.pass_leases(2)
        scene.learn()
    kept = {version.number: version.state is not None for version in PolicyVersion.objects.all()}
    assert kept == {1: False, 2: False, 3: True}
    assert policies.champion(scene.application).number == 3
