"""What a model's layers hold while it runs is known beforehand, and refused where it is too much."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from pytest_django import Settings

from qoe_service.catalogue import artifacts, compression, imports, jobs
from qoe_service.catalogue.models import Application, Job
from qoe_service.catalogue.sandboxed import activations, memory, passes
from qoe_service.catalogue.sandboxed.datasets import Dataset
from qoe_service.catalogue.sandboxed.interface import Task
from qoe_service.errors import InvalidInput
from tests.builders import NOW, make_application, make_variant
from tests.qoe_service.catalogue.tiny_models import pictures, wide_model, write_data, write_model

MIB = 2**20
ROW = (1, 8, 8)
BROAD = 512  # copies: 2048 channels, whose two tensors hold 1 MiB per picture


@pytest.fixture
def application(tmp_path: Path) -> Application:
    return make_application("quarters", dataset=artifacts.store(write_data(tmp_path / "data.npz"), now=NOW))


def test_what_layers_hold_is_counted_by_hand() -> None:
    held = memory.held(wide_model(), ROW)
    three, one = 64 * 64 * 4, 48 * 64 * 4
    assert held.at_once == 2 * three  # an activation and what it was made from; nobody reads the others any more
    assert held.in_all == 2 * 64 * 4 + 2 * one + 3 * three + 4 * 4
    assert held.shapes["one"] == [1, 48, 8, 8]


def test_a_free_side_is_as_long_as_in_the_data() -> None:
    free = wide_model()
    free.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    assert memory.held(free, ROW) == memory.held(wide_model(), ROW)


def test_weights_that_are_inputs_too_are_not_taken_for_the_input() -> None:
    old = wide_model()
    weights = [onnx.helper.make_tensor_value_info(each.name, 1, each.dims) for each in old.graph.initializer]
    inputs = [*weights, *old.graph.input]
    del old.graph.input[:]
    old.graph.input.extend(inputs)
    assert memory.held(old, ROW) == memory.held(wide_model(), ROW)


def test_what_is_collected_counts_a_batch_of_it_and_the_rows_that_are_kept() -> None:
    held = memory.held(wide_model(), ROW)
    batch = activations.BATCH * (held.at_once + 48 * 64 * 4)
    images = pictures(32, seed=1)[0]
    found = activations.collect(wide_model(), images, {"two": 1})
    task = Task(Path(), Path(), {"calibration_samples": 256}, Dataset(images, images, None))
    assert activations.collected_bytes(held, {"two": 1}, task) == batch + found["two"].nbytes
    assert activations.collected_bytes(held, {"two": 1}, task, then=10**9) == 10**9 + found["two"].nbytes


def test_ranges_read_off_whole_tensors_need_more_than_smallest_and_largest_values(tmp_path: Path) -> None:
    images = pictures(64, seed=1)[0]
    data = Dataset(images, images, np.zeros(64, dtype=np.int64))
    base, static = write_model(tmp_path / "wide.onnx", wide_model()), dict(compression.PASSES["static-int8"].parameters)
    least, most = (
        passes.held_bytes("static-int8", Task(base, tmp_path / "x", {**static, "ranges": ranges}, data))
        for ranges in ("minmax", "percentile")
    )
    held = memory.held(wide_model(), ROW)
    assert (least, most) == (8 * held.at_once, 32 * held.in_all)


@pytest.mark.django_db
# a batch of 64 pictures to measure on; and 4096 rows of 2048 channels to choose from
@pytest.mark.parametrize(("name", "held_mib"), [("static-int8", 64), ("dynamic-int8", 64), ("prune", 97)])
def test_a_pass_over_layers_that_hold_too_much_is_refused_beforehand_with_the_estimate(
    name: str, held_mib: int, application: Application, tmp_path: Path, settings: Settings
) -> None:
    path = write_model(tmp_path / "broad.onnx", wide_model(BROAD))
    base = make_variant(application, "broad", digest=artifacts.store(path, now=NOW).digest)
    parameters = dict(compression.PASSES[name].parameters)
    job = jobs.queue(base=base, compression_pass=name, parameters=parameters, now=NOW)
    model_bytes = 128 * MIB + int(compression.PASSES[name].memory_factor * path.stat().st_size)
    settings.SANDBOX_MEMORY_BYTES = model_bytes + 32 * MIB
    ended = compression.run(job_id=job.pk, clock=lambda: NOW)
    assert ended is not None
    assert ended.state == Job.State.REFUSED
    said = rf"{name} would need about \d+ MiB of memory \({model_bytes // MIB} MiB for the model, (\d+) MiB for what"
    found = re.match(said, ended.error)
    assert found is not None, ended.error
    assert int(found[1]) == held_mib
    assert "its layers hold); the sandbox has" in ended.error


@pytest.mark.django_db
def test_a_model_whose_layers_hold_too_much_is_not_taken_in(
    application: Application, tmp_path: Path, settings: Settings
) -> None:
    path = write_model(tmp_path / "broad.onnx", wide_model(BROAD))
    settings.SANDBOX_MEMORY_BYTES = 190 * MIB
    with pytest.raises(InvalidInput, match=r"checking it would need about \d+ MiB .* 64 MiB for what its layers hold"):
        imports.import_model(application=application, path=path, name="broad", now=NOW)
