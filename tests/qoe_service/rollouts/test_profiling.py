"""Profiling over HTTP: an idle device finds its job in the signed document, and what it says of it is checked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from device_agents.wire import DesiredState, SignedDesired
from qoe_service.catalogue.models import Application, Artifact, IsaAccuracy, Profile
from qoe_service.decisions import ranking
from qoe_service.errors import Unavailable
from tests.builders import NOW, make_profile, sha256_of
from tests.qoe_service import calls
from tests.qoe_service.rollouts.conftest import Site

pytestmark = pytest.mark.django_db
IDLE = {"is_idle": True}


@pytest.fixture
def asked(site: Site) -> Site:
    """Samples are there; the small variant was measured by this device, the large one by nobody."""
    data, samples = (
        Artifact.objects.create(digest=letter * 64, size_bytes=2048, created_at=NOW) for letter in ("d", "e")
    )
    Application.objects.update(
        explore_unmeasured=False, dataset=data, samples=samples, samples_from=data.digest, samples_kind="top-1",
        samples_count=100,
    )  # fmt: skip
    Profile.objects.filter(variant=site.large).delete()
    site.application.refresh_from_db()
    return site


def document(site: Site) -> DesiredState:
    answer = calls.get(f"/api/v1/devices/{site.device.pk}/desired")
    return DesiredState.model_validate_json(SignedDesired.model_validate_json(answer.content).document)


def result(offer_id: str, site: Site, **changes: Any) -> dict[str, Any]:
    return {
        "job_id": offer_id,
        "architecture": "x86_64",
        "isa": ["avx2", "sse42"],
        "profile": {"digest": site.large.artifact_id, "threads": 1, "a_ms": 7.0, "b_ms": 1.0},
        "accuracy": {"kind": "top-1", "samples": 100, "correct": 97},
        **changes,
    }


def test_an_idle_device_finds_its_job_in_the_signed_document_and_reports_it(asked: Site) -> None:
    before = calls.check_in(asked.device, profiling={"is_idle": False}).json()["desired_version"]
    assert document(asked).profiling is None
    reply = calls.check_in(asked.device, profiling=IDLE).json()
    assert reply["desired_version"] > before
    job = document(asked).profiling
    assert job is not None
    assert (job.variant.digest, job.variant.name) == (asked.large.artifact_id, "digits-large")
    assert (job.samples.digest, job.samples.size_bytes) == ("e" * 64, 2048)
    again = calls.check_in(asked.device, profiling={"is_idle": True, "job_id": job.job_id}).json()
    assert again["desired_version"] == reply["desired_version"], "nothing is new"
    done = calls.check_in(asked.device, profiling={"is_idle": True, "results": [result(job.job_id, asked)]})
    assert done.status_code == 200, done.content
    assert done.json()["desired_version"] > reply["desired_version"]
    assert document(asked).profiling is None
    assert Profile.objects.get(variant=asked.large).a_ms == 7.0
    assert IsaAccuracy.objects.get().value == 0.97


def test_an_older_agent_is_offered_nothing(asked: Site) -> None:
    calls.check_in(asked.device)
    assert document(asked).profiling is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"accuracy": {"kind": "top-1", "samples": 201, "correct": 1}}, "profiling.results.0.accuracy.samples"),
        ({"accuracy": {"kind": "luck", "samples": 100}}, "profiling.results.0.accuracy.kind"),
        ({"accuracy": {"kind": "top-1", "samples": 100, "correct": 101}}, "profiling.results.0.accuracy.correct"),
        ({"accuracy": {"kind": "top-1", "samples": 100, "value": 1.5}}, "profiling.results.0.accuracy.value"),
        ({"profile": {"digest": "f" * 64, "threads": 1, "a_ms": 1, "b_ms": 1}}, "profiling.results.0.profile.digest"),
        ({"job_id": "not an id"}, "profiling.results.0.job_id"),
    ],
)
def test_what_makes_no_sense_is_a_problem_that_names_the_field(
    changes: dict[str, Any], field: str, asked: Site
) -> None:
    calls.check_in(asked.device, profiling=IDLE)
    job = document(asked).profiling
    assert job is not None
    answer = calls.check_in(
        asked.device, profiling={"is_idle": True, "results": [result(job.job_id, asked, **changes)]}
    )
    calls.problem(answer, status=400, code="invalid_input", field=field)
    assert not IsaAccuracy.objects.exists()


def test_numbers_that_are_not_finite_are_refused_by_their_field(asked: Site) -> None:
    body = json.dumps({"sent_at": NOW.isoformat(), "profiling": {"results": [result("1-1", asked)]}})
    answer = calls.post(f"/api/v1/devices/{asked.device.pk}/check-in", body.replace("7.0", "NaN").encode())
    calls.problem(answer, status=400, code="invalid_input", field="profiling.results.0.profile.a_ms")


def decided(site: Site) -> dict[str, list[str]]:
    """Hard masks of a decision by variant."""
    decision = ranking.decide(
        device=site.device,
        application=site.application,
        reason="enrolment",
        arrival_rate_rps=1.0,
        cached_digests=frozenset(),
        incumbent_decision=None,
        trace_id="a" * 32,
        now=NOW,
    )
    record = decision.candidates
    names = [record["variants"][at]["name"] for at in record["variant"]]
    return {name: record["hard_masks"].get(str(at), []) for at, name in enumerate(names)}


def test_a_decision_says_that_a_variant_was_not_measured(asked: Site) -> None:
    assert decided(asked) == {"digits-small": [], "digits-large": ["not_measured"]}
    make_profile(asked.large, asked.device)
    assert decided(asked) == {"digits-small": [], "digits-large": []}


def test_a_device_with_nothing_measured_gets_nothing_but_the_baseline(asked: Site) -> None:
    Profile.objects.all().delete()
    with pytest.raises(Unavailable, match="not_measured"):
        decided(asked)
    asked.application.baseline_digest = sha256_of("digits/digits-small")
    assert decided(asked) == {"digits-small": [], "digits-large": ["not_measured"]}


def test_decisions_use_the_accuracy_of_the_devices_own_instruction_sets(asked: Site) -> None:
    Application.objects.update(minimum_accuracy=0.8)
    asked.application.refresh_from_db()
    make_profile(asked.large, asked.device)
    for digest, isa in ((asked.large.pk, "aarch64"), (asked.small.pk, "x86_64 avx2")):
        IsaAccuracy.objects.create(
            variant_id=digest, isa="x86_64 avx2", device=asked.device, device_class="tablet", kind="top-1",
            value=0.5, low=0.4, high=0.6, samples=100, samples_digest="e" * 64, measured_at=NOW,
        )  # fmt: skip
        type(asked.large).objects.filter(pk=digest).update(accuracy_isa=isa)
    masks = decided(asked)
    assert masks["digits-large"] == ["accuracy_below_minimum"]
    assert masks["digits-small"] == [], "the server has these instruction sets, and measured on more samples"
