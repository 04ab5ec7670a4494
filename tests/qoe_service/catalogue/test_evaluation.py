from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

from qoe_service.catalogue import artifacts, compression, imports, jobs, retirement
from qoe_service.catalogue import datasets as application_data
from qoe_service.catalogue import evaluation as measuring
from qoe_service.catalogue.evaluation import wilson_interval
from qoe_service.catalogue.models import Application, Artifact, Job, Variant
from qoe_service.catalogue.sandboxed import checks, datasets, evaluation
from tests.builders import NOW, make_application, make_variant
from tests.qoe_service.catalogue.tiny_models import dense_model, pictures, quarters, write_data, write_model


def with_and_without_labels(folder: Path) -> tuple[Artifact, Artifact]:
    """Two data sets of one application."""
    return (
        artifacts.store(write_data(folder / "with.npz"), now=NOW),
        artifacts.store(write_data(folder / "without.npz", heldout_labels=None), now=NOW),
    )


@pytest.mark.parametrize(
    ("correct", "samples", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),  # by hand, and as tabulated in Newcombe 1998
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
    ],
)
def test_the_interval_agrees_with_published_values(correct: int, samples: int, low: float, high: float) -> None:
    assert wilson_interval(correct, samples) == pytest.approx((low, high), abs=5e-4)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    truth, trials = 0.95, 4000
    covered = sum(
        low <= truth <= high for low, high in (wilson_interval(int(c), 200) for c in rng.binomial(200, truth, trials))
    )
    # the standard error of the coverage is 0.0035
    assert 0.93 < covered / trials < 0.97


def scored(tmp_path: Path, **replaced: Any) -> dict[str, Any]:
    path = write_model(tmp_path / "dense.onnx", dense_model())
    data = datasets.load(write_data(tmp_path / "data.npz", **replaced))
    return evaluation.score(path, checks.check(path), data)


def test_targets_are_judged_by_the_variance_explained(tmp_path: Path) -> None:
    inputs, _ = pictures(200, seed=2)
    targets = inputs.reshape(200, -1).astype(np.float64) @ quarters() / 255
    exact = scored(tmp_path, heldout_labels=targets)
    assert (exact["kind"], round(exact["value"], 4)) == ("regression", 1.0)
    noise = np.random.default_rng(0).normal(scale=targets.std(axis=0), size=targets.shape)
    noisy = scored(tmp_path, heldout_labels=targets + noise)
    # noise as strong as the signal leaves half of the variance explained
    assert noisy["low"] < 0.5 < noisy["high"]
    assert noisy["root_mean_square_error"] == pytest.approx(targets.std(), rel=0.15)


@pytest.mark.django_db
@pytest.mark.usefixtures("quick_profiler")
def test_without_labels_a_variant_is_judged_by_its_agreement_with_the_base(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.npz", heldout_labels=None)
    application = make_application("quarters", dataset=artifacts.store(data, now=NOW))
    path = write_model(tmp_path / "dense.onnx", dense_model())
    base = imports.import_model(application=application, path=path, name="dense", passes=["dynamic-int8"], now=NOW)
    assert (base.accuracy, base.details["accuracy"]["kind"]) == (1.0, "agreement")
    for job_id in jobs.runnable(now=NOW):
        compression.run(job_id=job_id, clock=lambda: NOW)
    derived = Variant.objects.get(base=base)
    assert derived.details["accuracy"]["kind"] == "agreement"
    assert derived.accuracy is not None
    assert 0.95 < derived.accuracy <= 1.0


@pytest.mark.django_db
def test_what_comes_back_is_measured_on_the_data_that_came_meanwhile() -> None:
    old, new = (artifacts.store(io.BytesIO(content), now=NOW) for content in (b"old", b"new"))
    application = make_application("quarters", dataset=old)
    variant = make_variant(application, "dense")
    retirement.retire(variant=variant, actor="ada", now=NOW)
    application_data.replace(application=application, dataset=new)
    jobs.queue_all_accuracies(application=application, now=NOW)
    assert not Job.objects.exists()
    assert retirement.restore(variant=variant, actor="ada", now=NOW)
    job = Job.objects.get()
    assert (job.base, job.compression_pass, job.parameters) == (variant, "accuracy", {"dataset": new.pk})


@pytest.mark.django_db
def test_data_that_come_back_are_measured_on_again() -> None:
    first, second = (artifacts.store(io.BytesIO(content), now=NOW) for content in (b"first", b"second"))
    application = make_application("quarters", dataset=first)
    variant = make_variant(application, "dense", details={"accuracy": {"kind": "top-1", "dataset": first.pk}})
    for dataset in (second, first, second):
        application_data.replace(application=application, dataset=dataset)
        jobs.queue_all_accuracies(application=application, now=NOW)
        job = Job.objects.get(state=Job.State.QUEUED)
        assert job.parameters == {"dataset": dataset.pk}
        jobs.queue_all_accuracies(application=application, now=NOW)
        assert Job.objects.filter(state=Job.State.QUEUED).count() == 1
        variant.details["accuracy"]["dataset"] = dataset.pk  # as a worker that has measured
        variant.save(update_fields=["details"])
        Job.objects.filter(pk=job.pk).update(state=Job.State.DONE)


@pytest.mark.django_db
@pytest.mark.usefixtures("quick_profiler")
def test_data_that_come_back_while_a_variant_is_measured_on_others_judge_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = with_and_without_labels(tmp_path)
    application = make_application("quarters", dataset=first)
    path = write_model(tmp_path / "dense.onnx", dense_model())
    imports.import_model(application=application, path=path, name="dense", now=NOW)
    for dataset in (second, first):
        application_data.replace(application=application, dataset=dataset)
        jobs.queue_all_accuracies(application=application, now=NOW)
        compression.run(job_id=jobs.runnable(now=NOW)[0], clock=lambda: NOW)
    application_data.replace(application=application, dataset=second)
    jobs.queue_all_accuracies(application=application, now=NOW)
    measure = measuring.measure

    def measured_while_the_first_come_back(*args: Any, **options: Any) -> measuring.Measured:
        measured = measure(*args, **options)
        again = Application.objects.get()
        application_data.replace(application=again, dataset=first)
        jobs.queue_all_accuracies(application=again, now=NOW)
        return measured

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(measuring, "measure", measured_while_the_first_come_back)
        ended = compression.run(job_id=jobs.runnable(now=NOW)[0], clock=lambda: NOW)
    assert ended is not None
    assert ended.state == Job.State.DONE
    while waiting := jobs.runnable(now=NOW):
        compression.run(job_id=waiting[0], clock=lambda: NOW)
    variant = Variant.objects.get()
    assert (variant.accuracy_kind, variant.accuracy_dataset) == ("top-1", first.pk)
    application_data.replace(application=Application.objects.get(), dataset=second)
    jobs.queue_all_accuracies(application=Application.objects.get(), now=NOW)
    compression.run(job_id=jobs.runnable(now=NOW)[0], clock=lambda: NOW)
    assert Variant.objects.get().accuracy_dataset == second.pk


@pytest.mark.django_db
@pytest.mark.usefixtures("quick_profiler")
@pytest.mark.parametrize("has_data", [True, False])
def test_a_variant_that_was_made_while_other_data_came_is_measured_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_data: bool
) -> None:
    first, second = with_and_without_labels(tmp_path)
    application = make_application("quarters", dataset=first if has_data else None)
    path = write_model(tmp_path / "dense.onnx", dense_model())
    measure = measuring.measure

    def measured_while_others_come(*args: Any, **options: Any) -> measuring.Measured:
        measured = measure(*args, **options)
        application_data.replace(application=Application.objects.get(), dataset=second)
        return measured

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(measuring, "measure", measured_while_others_come)
        imports.import_model(application=application, path=path, name="dense", now=NOW)
    assert Variant.objects.get().accuracy_dataset != second.pk
    compression.run(job_id=jobs.runnable(now=NOW)[0], clock=lambda: NOW)
    assert Variant.objects.get().accuracy_dataset == second.pk


@pytest.mark.django_db
@pytest.mark.usefixtures("quick_profiler")
def test_new_data_without_labels_asks_for_agreement_with_a_base_that_is_measured_no_more(tmp_path: Path) -> None:
    with_labels, without = with_and_without_labels(tmp_path)
    application = make_application("quarters", dataset=with_labels)
    turned = dense_model()
    weights = next(each for each in turned.graph.initializer if each.name == "weights")
    weights.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(weights), 1, axis=1), "weights"))
    for name, content in (("dense", dense_model()), ("turned", turned)):
        path = write_model(tmp_path / f"{name}.onnx", content)
        imports.import_model(application=application, path=path, name=name, now=NOW)
    assert [each.accuracy for each in Variant.objects.order_by("pk")] == [1.0, 0.0]
    retirement.retire(variant=Variant.objects.get(name="dense"), actor="ada", now=NOW)
    assert not any(each.is_judged_by_former_data for each in application.variants.all())
    application_data.replace(application=application, dataset=without)
    assert all(each.is_judged_by_former_data for each in application.variants.all())
    jobs.queue_all_accuracies(application=application, now=NOW)
    ended = compression.run(job_id=jobs.runnable(now=NOW)[0], clock=lambda: NOW)
    assert ended is not None
    assert ended.result is not None
    assert (ended.result.accuracy, ended.result.details["accuracy"]["kind"]) == (0.0, "agreement")
    assert not ended.result.is_judged_by_former_data
