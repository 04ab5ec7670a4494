from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import onnx
import pytest
from django.core.management import CommandError, call_command
from pytest_django import Settings

from qoe_service.catalogue import artifacts, compression, evaluation, imports, jobs, sandbox
from qoe_service.catalogue.models import Application, Job, Variant
from qoe_service.errors import NotFound
from tests.builders import NOW, make_application, make_variant
from tests.qoe_service.catalogue.tiny_models import (
    conv_model,
    dense_model,
    pictures,
    weightless_model,
    wide_model,
    write_data,
    write_model,
)

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("quick_profiler")]

LATER = NOW + timedelta(seconds=60)


class Clock:
    """Stands still until it is told to do something at one of its readings."""

    def __init__(self, now: datetime = NOW) -> None:
        self.now, self.readings = now, 0

    def __call__(self) -> datetime:
        self.readings += 1
        return self.now


@pytest.fixture
def application(tmp_path: Path) -> Application:
    dataset = artifacts.store(write_data(tmp_path / "data.npz"), now=NOW)
    return make_application("quarters", dataset=dataset)


def stored(application: Application, content: onnx.ModelProto, name: str, tmp_path: Path) -> Variant:
    path = write_model(tmp_path / f"{name}.onnx", content)
    return make_variant(application, name, digest=artifacts.store(path, now=NOW).digest)


def queued(base: Variant, name: str = "static-int8") -> Job:
    parameters = dict(compression.PASSES[name].parameters)
    return jobs.queue(base=base, compression_pass=name, parameters=parameters, now=NOW)


def plain_job(state: Job.State = Job.State.QUEUED, **fields: object) -> Job:
    application = Application.objects.filter(name="plain").first() or make_application("plain")
    base = make_variant(application, f"base-{Job.objects.count()}")
    return Job.objects.create(
        application=application, base=base, compression_pass="static-int8", state=state, created_at=NOW, **fields
    )


@pytest.mark.parametrize(("name", "operator"), [("static-int8", "QuantizeLinear"), ("dynamic-int8", "MatMulInteger")])
def test_a_pass_makes_a_measured_variant_that_says_how_it_came_about(
    application: Application, tmp_path: Path, name: str, operator: str
) -> None:
    base = stored(application, dense_model(), "dense", tmp_path)
    job = compression.run(job_id=queued(base, name).pk, clock=Clock())
    assert job is not None
    assert (job.state, job.error, job.progress, job.attempts) == (Job.State.DONE, "", 1.0, 1)
    variant = job.result
    assert variant is not None
    assert (variant.name, variant.base, variant.precision) == (f"dense-{name}", base, "int8")
    assert operator in variant.operators
    assert variant.is_selectable
    assert variant.accuracy is not None
    assert variant.accuracy > 0.95
    assert variant.profiles.filter(device=None, threads=1).exists()
    assert variant.provenance["base_digest"] == base.artifact_id
    assert variant.provenance["pass"] == name
    assert variant.provenance["parameters"] == job.parameters
    assert set(variant.provenance["versions"]) == {"numpy", "onnx", "onnxruntime", "onnxslim"}
    assert (variant.provenance["calibration_digest"] is not None) == (name == "static-int8")


def test_the_same_pass_over_the_same_model_gives_the_same_bytes(application: Application, tmp_path: Path) -> None:
    twin = make_application("twin", dataset=application.dataset)
    digests = set()
    for owner in (application, twin):
        job = compression.run(job_id=queued(stored(owner, conv_model(), "conv", tmp_path)).pk, clock=Clock())
        assert job is not None
        assert job.result is not None
        digests.add(job.result.artifact_id)
    assert len(digests) == 1


def test_a_variant_is_rebuilt_from_its_provenance_bit_for_bit(
    application: Application, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = stored(application, conv_model(), "conv", tmp_path)
    job = compression.run(job_id=queued(base).pk, clock=Clock())
    assert job is not None
    assert job.result is not None
    call_command("rebuild_variant", "quarters", job.result.name)
    assert capsys.readouterr().out == f"{job.result.name} {job.result.artifact_id}: the same bytes\n"
    with pytest.raises(CommandError, match="conv was handed in, not derived"):
        call_command("rebuild_variant", "quarters", "conv")
    job.result.provenance["parameters"]["per_channel"] = False
    job.result.save()
    with pytest.raises(CommandError, match="other bytes"):
        call_command("rebuild_variant", "quarters", job.result.name)
    calibration = pictures(64, seed=9)[0]
    application.dataset = artifacts.store(write_data(tmp_path / "b.npz", calibration_inputs=calibration), now=NOW)
    application.save()
    with pytest.raises(CommandError, match="calibrated on other data"):
        call_command("rebuild_variant", "quarters", job.result.name)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("dynamic-int8", conv_model, "no dense layer"),
        ("static-int8", weightless_model, "no convolution or dense"),
    ],
)
def test_a_pass_that_cannot_help_says_so(
    application: Application, tmp_path: Path, name: str, content: Callable[[], onnx.ModelProto], reason: str
) -> None:
    job = compression.run(job_id=queued(stored(application, content(), "base", tmp_path), name).pk, clock=Clock())
    assert job is not None
    assert (job.state, job.result) == (Job.State.REFUSED, None)
    assert reason in job.error


@pytest.mark.parametrize("name", compression.PASSES)
def test_a_pass_that_would_exceed_the_memory_of_the_sandbox_is_refused_beforehand_with_the_estimate(
    name: str, application: Application, tmp_path: Path, settings: Settings
) -> None:
    settings.SANDBOX_MEMORY_BYTES = 128 * 2**20
    job = compression.run(job_id=queued(stored(application, wide_model(), "wide", tmp_path), name).pk, clock=Clock())
    assert job is not None
    assert job.state == Job.State.REFUSED
    assert re.match(rf"{name} would need about \d+ MiB of memory \(\d+ times the model", job.error)
    assert "the sandbox has 128 MiB (SANDBOX_MEMORY_BYTES)" in job.error


def test_a_rebuild_that_would_exceed_the_memory_is_refused_with_the_estimate_too(
    application: Application, tmp_path: Path, settings: Settings
) -> None:
    job = compression.run(job_id=queued(stored(application, conv_model(), "conv", tmp_path)).pk, clock=Clock())
    assert job is not None
    assert job.result is not None
    settings.SANDBOX_MEMORY_BYTES = 128 * 2**20
    with pytest.raises(CommandError, match="static-int8 would need about 128 MiB of memory"):
        call_command("rebuild_variant", "quarters", job.result.name)


def test_a_pass_that_needs_data_says_so(tmp_path: Path) -> None:
    base = stored(make_application("bare"), conv_model(), "conv", tmp_path)
    job = compression.run(job_id=queued(base).pk, clock=Clock())
    assert job is not None
    assert "needs calibration samples" in job.error


def test_a_quantised_model_is_not_quantised_again(application: Application, tmp_path: Path) -> None:
    base = stored(application, dense_model(), "dense", tmp_path)
    first = compression.run(job_id=queued(base, "dynamic-int8").pk, clock=Clock())
    assert first is not None
    assert first.result is not None
    second = compression.run(job_id=queued(first.result).pk, clock=Clock())
    assert second is not None
    assert "quantised already" in second.error


def test_a_job_has_one_runner(application: Application, tmp_path: Path) -> None:
    job_id = queued(stored(application, dense_model(), "dense", tmp_path)).pk
    rivals: list[object] = []

    class RivalsTry(Clock):
        def __call__(self) -> datetime:
            if self.readings:
                rivals.append(compression.run(job_id=job_id, clock=Clock()))
            return super().__call__()

    job = compression.run(job_id=job_id, clock=RivalsTry())
    assert job is not None
    assert (job.state, job.attempts) == (Job.State.DONE, 1)
    assert rivals
    assert set(rivals) == {None}
    assert compression.run(job_id=job_id, clock=Clock(LATER)) is None


def test_cancelling_stops_a_running_job(application: Application, tmp_path: Path) -> None:
    job_id = queued(stored(application, dense_model(), "dense", tmp_path)).pk

    class CancelledAtTheSecondReading(Clock):
        def __call__(self) -> datetime:
            if self.readings == 1:
                assert jobs.cancel(job_id=job_id, now=NOW)
            return super().__call__()

    job = compression.run(job_id=job_id, clock=CancelledAtTheSecondReading())
    assert job is not None
    assert (job.state, job.result, job.finished_at) == (Job.State.CANCELLED, None, NOW)
    assert Variant.objects.count() == 1
    assert not jobs.cancel(job_id=job_id, now=NOW)


def test_cancelling_an_unknown_job_is_not_found() -> None:
    with pytest.raises(NotFound):
        jobs.cancel(job_id=7, now=NOW)


def test_a_job_whose_runner_died_is_taken_over_and_the_dead_one_is_ignored() -> None:
    job = plain_job()
    first = jobs.claim(job_id=job.pk, now=NOW)
    assert first is not None
    assert jobs.runnable(now=NOW + jobs.STALE_AFTER) == []
    assert jobs.runnable(now=LATER) == [job.pk]
    second = jobs.claim(job_id=job.pk, now=LATER)
    assert second is not None
    assert second.attempts == 2
    assert not jobs.beat(job=first, progress=0.5, now=LATER)
    assert not jobs.finish(job=first, state=Job.State.DONE, now=LATER)
    assert jobs.finish(job=second, state=Job.State.DONE, now=LATER)


def test_a_beating_job_is_not_taken_over() -> None:
    first = jobs.claim(job_id=plain_job().pk, now=NOW)
    assert first is not None
    assert jobs.beat(job=first, progress=0.5, now=LATER)
    assert jobs.claim(job_id=first.pk, now=LATER) is None


def test_a_job_that_kills_its_runners_is_given_up() -> None:
    job = plain_job(Job.State.RUNNING, attempts=jobs.MAX_ATTEMPTS, heartbeat_at=NOW)
    assert jobs.runnable(now=LATER) == []
    assert jobs.claim(job_id=job.pk, now=LATER) is None
    job.refresh_from_db()
    assert job.state == Job.State.FAILED
    assert "died 3 times" in job.error


def test_no_more_jobs_run_at_once_than_allowed(settings: Settings) -> None:
    waiting = [plain_job().pk for _ in range(3)]
    assert jobs.runnable(now=NOW) == waiting[:1]
    assert jobs.claim(job_id=waiting[0], now=NOW) is not None
    assert jobs.runnable(now=NOW) == []
    assert jobs.claim(job_id=waiting[1], now=NOW) is None
    settings.COMPRESSION_JOBS = 2
    assert jobs.runnable(now=NOW) == waiting[1:2]


def test_asking_again_starts_over_only_what_ended_without_result() -> None:
    base = plain_job().base
    job = queued(base)
    assert queued(base) == job
    jobs.cancel(job_id=job.pk, now=NOW)
    again = queued(base)
    assert (again.pk != job.pk, again.state) == (True, Job.State.QUEUED)


def test_the_sandbox_knows_every_pass_that_can_be_asked_for() -> None:
    methods = list(dict.fromkeys(each.method for each in compression.PASSES.values()))
    with sandbox.opened() as box:
        (box.folder / "probe.py").write_text(
            f"import sys; sys.path.append({str(sandbox.FOLDER)!r})\n"
            "from sandboxed.passes import PASSES\nprint(' '.join(PASSES))"
        )
        box.run(box.folder, "probe")
        assert (box.folder / "stdout").read_text().split() == methods


def test_accuracy_is_measured_on_all_samples_at_once_where_that_takes_seconds(tmp_path: Path) -> None:
    inputs, labels = pictures(1000, seed=4)
    path = write_data(
        tmp_path / "data.npz", heldout_inputs=inputs, heldout_labels=np.where(inputs[:, 0, 0, 0], labels, 9)
    )
    application = make_application("quarters", dataset=artifacts.store(path, now=NOW))
    model = write_model(tmp_path / "dense.onnx", dense_model())
    variant = imports.import_model(application=application, path=model, name="dense", now=NOW)
    assert (variant.accuracy_samples, variant.accuracy) == (1000, float((inputs[:, 0, 0, 0] > 0).mean()))
    assert not Job.objects.exists()


@pytest.mark.parametrize(("changed", "correct"), [({}, 700), ({"isa": "another"}, 1000)])
def test_samples_that_were_looked_at_first_with_the_same_instruction_sets_are_not_looked_at_again(
    changed: dict[str, str], correct: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "PATIENCE_S", 0.0)
    inputs, labels = pictures(1000, seed=4)
    path = write_data(tmp_path / "data.npz", heldout_inputs=inputs, heldout_labels=labels)
    application = make_application("quarters", dataset=artifacts.store(path, now=NOW))
    model = write_model(tmp_path / "dense.onnx", dense_model())
    imports.import_model(application=application, path=model, name="dense", now=NOW)
    job = Job.objects.get()
    job.parameters["seen"] |= {"correct": 0, **changed}
    job.save()
    ended = compression.run(job_id=job.pk, clock=Clock())
    assert ended is not None
    assert ended.result is not None
    assert (ended.result.accuracy_samples, ended.result.accuracy) == (1000, correct / 1000)


def test_accuracy_is_first_measured_on_a_part_and_refined_when_nothing_else_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "PATIENCE_S", 0.0)
    inputs, labels = pictures(1000, seed=4)
    path = write_data(tmp_path / "data.npz", heldout_inputs=inputs, heldout_labels=labels)
    application = make_application("quarters", dataset=artifacts.store(path, now=NOW))
    variant = imports.import_model(
        application=application,
        path=write_model(tmp_path / "dense.onnx", dense_model()),
        name="dense",
        passes=["static-int8"],
        now=NOW,
    )
    assert (variant.is_selectable, variant.accuracy_samples) == (True, 300)
    ended: list[tuple[str, int, int]] = []
    while waiting := jobs.runnable(now=NOW):
        job = compression.run(job_id=waiting[0], clock=Clock())
        assert job is not None
        assert job.result is not None
        ended.append((job.compression_pass, job.base_id, job.result.accuracy_samples))
    derived = Variant.objects.get(base=variant)
    assert ended == [("static-int8", variant.pk, 300), ("accuracy", variant.pk, 1000), ("accuracy", derived.pk, 1000)]
    variant.refresh_from_db()
    assert (variant.accuracy_samples, variant.accuracy) == (1000, 1.0)
