"""The samples that devices measure on: few, small, the same for all, and only for those who were asked."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qoe_service.catalogue import artifacts, compression, jobs, samples
from qoe_service.catalogue.models import Application, Job, Variant
from qoe_service.catalogue.sandboxed import datasets as sandboxed_datasets
from qoe_service.catalogue.sandboxed import samples as sandboxed_samples
from tests.builders import NOW, make_application, make_variant
from tests.qoe_service.catalogue.tiny_models import dense_model, pictures, write_data, write_model

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("quick_profiler")]


def prepared(tmp_path: Path, **replaced: Any) -> Variant:
    """An application with data and a model that was measured on it."""
    dataset = artifacts.store(write_data(tmp_path / "data.npz", **replaced), now=NOW)
    application = make_application("quarters", dataset=dataset)
    path = write_model(tmp_path / "dense.onnx", dense_model())
    return make_variant(application, "dense", digest=artifacts.store(path, now=NOW).digest)


def made() -> Application:
    """Runs the job that a worker finds."""
    samples.queue_missing(applications=["quarters"], now=NOW)
    job = compression.run(job_id=Job.objects.get().pk, clock=lambda: NOW)
    assert job is not None
    assert (job.state, job.error) == (Job.State.DONE, "")
    return Application.objects.get()


def arrays(application: Application) -> dict[str, Any]:
    assert application.samples is not None
    with artifacts.open_for_reading(application.samples.digest) as file:
        content = io.BytesIO(file.read())
    with np.load(content, allow_pickle=False) as loaded:
        return dict(loaded)


def test_a_worker_chooses_samples_once_per_data_set(tmp_path: Path) -> None:
    inputs, labels = pictures(450, seed=3)
    variant = prepared(tmp_path, heldout_inputs=inputs, heldout_labels=labels)
    application = made()
    assert (application.samples_kind, application.samples_count) == ("top-1", 200)
    found = arrays(application)
    assert (str(found["kind"]), found["inputs"].shape) == ("top-1", (200, 1, 8, 8))
    chosen = np.unique(np.linspace(0, 449, 200).astype(int))
    assert (found["expected"] == labels[chosen]).all()
    samples.queue_missing(applications=["quarters", "others"], now=NOW)
    assert Job.objects.count() == 1
    data = artifacts.store(write_data(tmp_path / "b.npz", calibration_inputs=pictures(64, seed=9)[0]), now=NOW)
    Application.objects.update(dataset=data)
    samples.queue_missing(applications=["quarters"], now=NOW)
    samples.queue_missing(applications=["quarters"], now=NOW)
    assert list(Job.objects.values_list("base", flat=True)) == [variant.pk] * 2


@pytest.mark.parametrize(("max_bytes", "count"), [(64 * 7, 7), (1, 1), (10**9, 200)])
def test_large_inputs_mean_fewer_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int, count: int
) -> None:
    monkeypatch.chdir(tmp_path)  # programs of the sandbox write into the folder that they run in
    data = sandboxed_datasets.load(write_data(tmp_path / "data.npz"))
    answer = sandboxed_samples.write(data, Path("none.onnx"), count=200, max_bytes=max_bytes)
    assert answer == {"kind": "top-1", "count": count}


def test_targets_are_sent_with_their_samples(tmp_path: Path) -> None:
    targets = np.linspace(0, 1, 200).reshape(200, 1)
    prepared(tmp_path, heldout_labels=targets)
    application = made()
    assert application.samples_kind == "regression"
    assert arrays(application)["expected"].shape == (200, 1)


def test_without_labels_the_base_models_answers_are_right(tmp_path: Path) -> None:
    prepared(tmp_path, heldout_labels=None)
    application = made()
    found = arrays(application)
    assert (application.samples_kind, found["expected"].shape) == ("agreement", (200, 4))
    _, labels = pictures(200, seed=2)
    assert (found["expected"].argmax(axis=1) == labels).all()


def test_a_base_model_that_does_not_take_the_data_is_nothing_to_measure_by(tmp_path: Path) -> None:
    small = np.zeros((20, 1, 4, 4), dtype=np.uint8)
    prepared(tmp_path, calibration_inputs=small, heldout_inputs=small, heldout_labels=None)
    samples.queue_missing(applications=["quarters"], now=NOW)
    job = compression.run(job_id=Job.objects.get().pk, clock=lambda: NOW)
    assert job is not None
    assert job.state == Job.State.REFUSED
    assert "its input takes uint8" in job.error
    samples.queue_missing(applications=["quarters"], now=NOW)
    assert Job.objects.get().state == Job.State.REFUSED, "a refusal is no reason to ask for ever"


def test_samples_wait_for_everything_that_makes_variants(tmp_path: Path) -> None:
    variant = prepared(tmp_path)
    samples.queue_missing(applications=["quarters"], now=NOW)
    later = jobs.queue(base=variant, compression_pass="static-int8", parameters={}, now=NOW)
    assert jobs.runnable(now=NOW) == [later.pk]
