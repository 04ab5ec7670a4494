"""Profiling jobs: who is asked to measure what, what is kept of the answers, and what each number holds for."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from device_agents.wire import ProfilingResult, ProfilingState
from qoe_service.catalogue import accuracies, exploration, profiles, profiling
from qoe_service.catalogue.models import Application, Artifact, IsaAccuracy, Job, Profile, ProfilingJob, Variant
from qoe_service.catalogue.places import Place
from qoe_service.errors import Conflict, InvalidInput, NotFound
from qoe_service.fleet.models import AuditEntry, Device
from tests.builders import NOW, make_application, make_device, make_profile, make_variant

pytestmark = pytest.mark.django_db
BOARD = {"architecture": "aarch64", "isa": ["neon", "neon-dot"], "cores": 4}
BOARDS = Place("board", "aarch64 neon-dot")
IDLE, BUSY = ProfilingState(is_idle=True), ProfilingState(is_idle=False, busy_with="requests come in")
State = ProfilingJob.State


def artifact(letter: str) -> Artifact:
    return Artifact.objects.create(digest=letter * 64, size_bytes=4096, created_at=NOW)


@pytest.fixture
def application() -> Application:
    data = artifact("d")
    return make_application(
        explore_unmeasured=False,
        dataset=data,
        samples=artifact("e"),
        samples_from=data.digest,
        samples_kind="top-1",
        samples_count=200,
    )


@pytest.fixture
def variant(application: Application) -> Variant:
    return make_variant(application)


@pytest.fixture
def board() -> Device:
    return make_device("board-1", device_class="board", hardware=BOARD)


def attend(device: Device, report: ProfilingState, *, now: datetime = NOW) -> bool:
    return profiling.attend(device=device, report=report, applications=["digits"], now=now)


def result(job: ProfilingJob, **changes: Any) -> dict[str, Any]:
    """A job done well, with changes; dotted names reach into its parts."""
    fields: dict[str, Any] = {
        "job_id": job.offer_id,
        "architecture": "aarch64",
        "isa": ["neon", "neon-dot"],
        "profile": {"digest": job.variant.artifact_id, "threads": 1, "a_ms": 4.0, "b_ms": 1.0, "load_ms": 30.0},
        "accuracy": {"kind": "top-1", "samples": 200, "correct": 150},
    }
    for name, value in changes.items():
        part, _, key = name.partition("__")
        if key:
            fields[part] = {**fields[part], key: value}
        else:
            fields[part] = value
    return fields


def told(job: ProfilingJob, **changes: Any) -> ProfilingState:
    return ProfilingState(is_idle=True, results=(ProfilingResult.model_validate(result(job, **changes)),))


def offered(device: Device) -> ProfilingJob:
    job = profiling.offered_to(device)
    assert job is not None
    return job


def test_an_idle_device_is_offered_one_unmeasured_variant_and_its_numbers_are_kept(
    variant: Variant, board: Device
) -> None:
    assert attend(board, IDLE)
    job = offered(board)
    assert (job.variant, job.device_class, job.isa) == (variant, "board", "aarch64 neon-dot")
    assert attend(board, told(job)), "the document changes: the job leaves it"
    profile, accuracy = Profile.objects.get(), IsaAccuracy.objects.get()
    assert (profile.device, profile.isa, profile.a_ms, profile.load_ms) == (board, "aarch64 neon-dot", 4.0, 30.0)
    assert (accuracy.device, accuracy.isa, accuracy.value, accuracy.samples) == (board, "aarch64 neon-dot", 0.75, 200)
    assert (round(accuracy.low, 3), round(accuracy.high, 3)) == (0.686, 0.805)  # Wilson's interval of 150 in 200
    assert ProfilingJob.objects.get().state == State.DONE
    assert not attend(board, IDLE), "nothing is left to measure"


def test_the_same_result_told_twice_changes_nothing(variant: Variant, board: Device) -> None:
    attend(board, IDLE)
    job = offered(board)
    attend(board, told(job))
    later = NOW + timedelta(hours=1)
    assert not attend(board, told(job, profile__a_ms=9.0), now=later)
    assert Profile.objects.get().a_ms == 4.0
    assert IsaAccuracy.objects.get().measured_at == NOW


@pytest.mark.parametrize(
    ("report", "why"),
    [(BUSY, "it is busy"), (None, "its agent knows no profiling jobs")],
)
def test_a_device_is_not_asked(report: ProfilingState | None, why: str, variant: Variant, board: Device) -> None:
    assert not profiling.attend(device=board, report=report, applications=["digits"], now=NOW), why
    assert not ProfilingJob.objects.exists()


def test_only_what_the_device_runs_and_may_be_chosen_is_measured(variant: Variant, board: Device) -> None:
    assert not profiling.attend(device=board, report=IDLE, applications=["parity"], now=NOW)
    Variant.objects.update(retired_at=NOW)
    assert not attend(board, IDLE)
    Variant.objects.update(retired_at=None)
    Application.objects.update(samples_from="f" * 64)
    assert not Job.objects.exists()
    assert not attend(board, IDLE), "its samples are of another data set"
    assert [job.compression_pass for job in Job.objects.all()] == ["samples"], "a worker makes them now"


def test_one_device_of_a_place_measures_for_all(variant: Variant, board: Device) -> None:
    peer = make_device("board-2", device_class="board", hardware=BOARD)
    elsewhere = make_device("board-3", device_class="board", hardware={**BOARD, "isa": ["neon", "neon-dot", "i8mm"]})
    assert attend(board, IDLE)
    assert not attend(peer, IDLE)
    assert attend(elsewhere, IDLE), "other instruction sets are another place"
    assert profiling.offered_to(peer) is None


def test_what_a_warm_up_measured_needs_only_an_accuracy_where_there_is_none(variant: Variant, board: Device) -> None:
    make_profile(variant, board)
    assert attend(board, IDLE), "no accuracy on these instruction sets yet"
    tablet = make_device("tablet-1")
    make_profile(variant, tablet)
    assert not attend(tablet, IDLE), "the server has the same instruction sets"


def test_a_device_that_has_no_time_for_long_loses_its_job_to_another(variant: Variant, board: Device) -> None:
    peer = make_device("board-2", device_class="board", hardware=BOARD)
    attend(board, IDLE)
    first = offered(board)
    later = NOW + profiling.LEASE + timedelta(seconds=1)
    assert not attend(board, BUSY, now=NOW + timedelta(minutes=14))
    assert attend(board, BUSY, now=later)
    assert attend(peer, IDLE, now=later)
    assert offered(peer).offer_id != first.offer_id
    assert not attend(board, BUSY.model_copy(update={"results": told(first).results}), now=later)
    assert not Profile.objects.exists(), "what comes too late belongs to nobody's job"


def test_a_device_that_went_away_is_replaced(variant: Variant, board: Device) -> None:
    peer = make_device("board-2", device_class="board", hardware=BOARD)
    attend(board, IDLE)
    assert not attend(peer, IDLE, now=NOW + profiling.LEASE)
    assert attend(peer, IDLE, now=NOW + profiling.LEASE + timedelta(seconds=1))
    assert offered(peer)
    assert profiling.offered_to(board) is None


def test_trouble_is_told_and_tried_again_a_bounded_number_of_times(variant: Variant, board: Device) -> None:
    now = NOW
    for failures in range(1, profiling.MAX_FAILURES + 1):
        assert attend(board, IDLE, now=now)
        attend(board, told(offered(board), profile=None, accuracy=None, error="no room"), now=now)
        assert not attend(board, IDLE, now=now + timedelta(minutes=1)), "it rests"
        now += profiling.RETRY_AFTER + timedelta(seconds=1)
        assert ProfilingJob.objects.get().failures == failures
    job = ProfilingJob.objects.get()
    assert (job.state, job.error) == (State.FAILED, "no room")
    assert not attend(board, IDLE, now=now)
    profiling.run_again(job_id=job.pk, actor="ada", now=now)
    assert attend(board, IDLE, now=now)


def test_numbers_of_other_instruction_sets_are_not_kept(variant: Variant, board: Device) -> None:
    attend(board, IDLE)
    attend(board, told(offered(board), isa=["neon"]))
    assert ProfilingJob.objects.get().error == "measured with aarch64, not aarch64 neon-dot"
    assert not Profile.objects.exists()


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"profile__digest": "f" * 64}, "profile.digest", "not the variant"),
        ({"profile__threads": 2}, "profile.threads", "must be 1"),
        ({"profile__a_ms": 0.0, "profile__b_ms": 0.0}, "profile.a_ms", "no model runs in no time"),
        ({"accuracy": None}, "accuracy", "is missing"),
        ({"accuracy__kind": "agreement"}, "accuracy.kind", "must be top-1"),
        ({"accuracy__samples": 199}, "accuracy.samples", "must be 200"),
        ({"accuracy__correct": None}, "accuracy.correct", "is missing"),
    ],
)
def test_a_result_that_makes_no_sense_is_refused_by_its_field(
    changes: dict[str, Any], field: str, says: str, variant: Variant, board: Device
) -> None:
    attend(board, IDLE)
    with pytest.raises(InvalidInput, match=says) as refused:
        attend(board, told(offered(board), **changes))
    assert refused.value.field == f"profiling.results.0.{field}"
    assert not Profile.objects.exists()
    assert not IsaAccuracy.objects.exists()


def test_more_right_answers_than_samples_are_refused(variant: Variant, board: Device) -> None:
    Application.objects.update(samples_count=100)
    attend(board, IDLE)
    with pytest.raises(InvalidInput, match="at most 100") as refused:
        attend(board, told(offered(board), accuracy__samples=100, accuracy__correct=150))
    assert refused.value.field == "profiling.results.0.accuracy.correct"


def test_a_regression_brings_its_interval(variant: Variant, board: Device) -> None:
    Application.objects.update(samples_kind="regression")
    attend(board, IDLE)
    share = {"kind": "regression", "samples": 200, "value": 0.8, "low": 0.7, "high": 0.85}
    with pytest.raises(InvalidInput, match="between low and high"):
        attend(board, told(offered(board), accuracy={**share, "low": 0.9}))
    attend(board, told(offered(board), accuracy=share))
    kept = IsaAccuracy.objects.get()
    assert (kept.value, kept.low, kept.high) == (0.8, 0.7, 0.85)


def test_new_data_asks_for_new_accuracies(variant: Variant, board: Device) -> None:
    attend(board, IDLE)
    attend(board, told(offered(board)))
    application = Application.objects.get()
    assert accuracies.by_devices(application, BOARDS.isa) == {variant.pk: 0.75}
    data = artifact("a")
    Application.objects.update(dataset=data, samples=artifact("b"), samples_from=data.digest)
    application.refresh_from_db()
    assert accuracies.by_devices(application, BOARDS.isa) == {}
    assert attend(board, IDLE)


def test_samples_that_changed_while_a_device_measured_are_measured_anew(variant: Variant, board: Device) -> None:
    attend(board, IDLE)
    job = offered(board)
    Application.objects.update(samples=artifact("b"))
    attend(board, told(job))
    assert ProfilingJob.objects.get().error == "the samples changed meanwhile"
    assert not IsaAccuracy.objects.exists()


def test_a_cancelled_job_leaves_the_device_and_is_offered_no_more(variant: Variant, board: Device) -> None:
    attend(board, IDLE)
    job = offered(board)
    assert profiling.cancel(job_id=job.pk, actor="ada", now=NOW)
    assert not profiling.cancel(job_id=job.pk, actor="ada", now=NOW)
    assert profiling.offered_to(board) is None
    assert attend(board, IDLE.model_copy(update={"job_id": job.offer_id})), "its document must change"
    assert ProfilingJob.objects.get().state == State.CANCELLED
    assert profiling.run_again(job_id=job.pk, actor="ada", now=NOW).state == State.QUEUED
    with pytest.raises(Conflict):
        profiling.run_again(job_id=job.pk, actor="ada", now=NOW)
    with pytest.raises(NotFound):
        profiling.cancel(job_id=0, actor="ada", now=NOW)
    assert list(AuditEntry.objects.order_by("pk").values_list("verb", flat=True)) == [
        "cancel_profiling",
        "measure_again",
    ]


def test_what_was_measured_is_measured_again_when_an_operator_asks(variant: Variant, board: Device) -> None:
    attend(board, IDLE)
    attend(board, told(offered(board)))
    profiling.run_again(job_id=ProfilingJob.objects.get().pk, actor="ada", now=NOW)
    assert attend(board, IDLE)
    attend(board, told(offered(board), profile__a_ms=6.0))
    assert Profile.objects.get().a_ms == 6.0


# -- the gate ----------------------------------------------------------------------------------------------------------


def test_a_class_gets_only_what_it_measured_or_may_explore(variant: Variant, board: Device) -> None:
    application = variant.application
    other = make_variant(application, "digits-large")

    def closed(device: Device = board) -> set[str]:
        digests = exploration.unmeasured(device=device, application=application)
        return {each.name for each in (variant, other) if each.artifact_id in digests}

    make_profile(variant)
    make_profile(variant, make_device("tablet-1"))
    assert closed() == {"digits-small", "digits-large"}, "neither the server's nor another class's numbers count"
    peer = make_device("board-2", device_class="board", hardware=BOARD)
    make_profile(variant, peer)
    assert closed() == {"digits-large"}
    assert closed(make_device("board-3", device_class="board", hardware={"architecture": "x86_64"})) == {
        "digits-small",
        "digits-large",
    }
    assert exploration.allow(variant=other, is_allowed=True, actor="ada", now=NOW)
    assert closed() == set()
    assert not exploration.allow(variant=other, is_allowed=True, actor="ada", now=NOW)
    assert exploration.allow(variant=other, is_allowed=False, actor="ada", now=NOW)
    application.baseline_digest = other.artifact_id
    assert closed() == set(), "the safe baseline was named by an operator"
    application.baseline_digest = ""
    application.explore_unmeasured = True
    assert closed() == set()


def test_a_peer_on_other_instruction_sets_lends_no_profile(variant: Variant, board: Device) -> None:
    newer = make_device("board-2", device_class="board", hardware={**BOARD, "isa": ["neon-dot", "i8mm"]})
    make_profile(variant, newer)
    assert profiles.profiles_for(device=board, application=variant.application) == ()


def test_unknown_instruction_sets_are_nobodys(variant: Variant) -> None:
    Variant.objects.update(accuracy_isa="")
    assert accuracies.of(variant.application) == {}
    silent = make_device("silent", hardware={})
    assert not attend(silent, IDLE), "a device that has not told its architecture measures for nobody"
