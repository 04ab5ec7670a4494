"""What was measured where, over REST; profiling jobs that are cancelled and run again; the gate, opened and shut."""

from __future__ import annotations

import pytest
from django.contrib.auth.models import User
from django.test import Client

from qoe_service.catalogue import roles
from qoe_service.catalogue.models import ProfilingJob, Variant
from tests.builders import (
    NOW,
    make_application,
    make_application_key,
    make_device,
    make_isa_accuracy,
    make_profile,
    make_variant,
)

pytestmark = pytest.mark.django_db
HERE = "/api/v1/applications/digits"


@pytest.fixture
def job() -> ProfilingJob:
    variant, device = make_variant(make_application()), make_device()
    make_profile(variant)
    return ProfilingJob.objects.create(
        variant=variant, device_class="tablet", isa="x86_64 avx2", device=device, state="running", created_at=NOW
    )


def logged_in(role: str = "editor") -> Client:
    User.objects.create_user("ada")
    roles.give(username="ada", role=role, actor="test", now=NOW)
    client = Client()
    client.force_login(User.objects.get())
    return client


def test_only_what_was_measured_is_listed_with_its_device(job: ProfilingJob) -> None:
    operator = logged_in("viewer")
    measured = operator.get(f"{HERE}/measurements").json()
    assert [(each["device"], each["isa"]) for each in measured["profiles"]] == [(None, "")]
    assert measured["accuracies"] == []
    assert job.device is not None
    make_profile(job.variant, job.device, load_ms=30.0)
    job.variant.application.samples = job.variant.artifact
    job.variant.application.save()
    make_isa_accuracy(job.variant, job.device)
    measured = operator.get(f"{HERE}/measurements").json()
    (_, profile), (accuracy,) = measured["profiles"], measured["accuracies"]
    assert (profile["device"], profile["device_class"], profile["isa"]) == (job.device_id, "tablet", "x86_64 avx2")
    assert (accuracy["device"], accuracy["value"], accuracy["samples"]) == (job.device_id, 0.9, 200)


def test_a_job_is_cancelled_and_run_again(job: ProfilingJob) -> None:
    operator = logged_in()
    (listed,) = operator.get(f"{HERE}/profiling-jobs").json()
    assert (listed["variant"], listed["device"], listed["state"]) == ("digits-small", job.device_id, "running")
    at = f"/api/v1/profiling-jobs/{job.pk}"
    assert operator.post(f"{at}/run-again").status_code == 409
    assert operator.post(f"{at}/cancel").json()["state"] == "cancelled"
    assert operator.post(f"{at}/cancel").status_code == 409
    assert operator.post(f"{at}/run-again").json()["state"] == "queued"
    assert operator.post("/api/v1/profiling-jobs/999/cancel").status_code == 404


def test_the_gate_is_opened_and_shut_for_one_variant(job: ProfilingJob) -> None:
    operator, at = logged_in(), f"{HERE}/variants/digits-small"
    for verb, is_open in (("explore", True), ("explore", True), ("measure-first", False)):
        assert operator.post(f"{at}/{verb}").status_code == 204
        assert Variant.objects.get().explore_unmeasured is is_open
    answer = operator.post(f"{HERE}/variants/nothing/explore")
    assert (answer.status_code, answer.json()["fields"][0]["field"]) == (404, "variant")


def test_a_viewer_changes_nothing_and_an_app_sees_nothing(job: ProfilingJob) -> None:
    viewer = logged_in("viewer")
    for path in (
        f"/api/v1/profiling-jobs/{job.pk}/cancel",
        f"/api/v1/profiling-jobs/{job.pk}/run-again",
        f"{HERE}/variants/digits-small/explore",
        f"{HERE}/variants/digits-small/measure-first",
    ):
        assert viewer.post(path).status_code == 403, path
    make_application_key()
    by_key = {"Authorization": f"Bearer {'k' * 43}"}
    assert Client().get(f"{HERE}/measurements", headers=by_key).status_code == 401
