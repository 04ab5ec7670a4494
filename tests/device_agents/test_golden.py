"""The golden output of a variant: measured once, compared at every later warm-up, null where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from device_agents.errors import AttemptFailed
from device_agents.golden import OUTPUTS_KEPT, VALUES_KEPT, agrees, golden_output
from device_agents.profiler import warm_up
from device_agents.wire import GoldenOutput, Outcome, ProfileReport
from tests.device_agents.models import Model, drawing_lots, echo, scaling


def profiled(model: Model, folder: Path, known: ProfileReport | None = None) -> ProfileReport | None:
    path = model.write(folder / "m.onnx")
    return warm_up(path, digest=model.digest, threads=1, max_batch=2, budget_s=0.05, known=known).profile


@pytest.fixture
def known(tmp_path: Path) -> ProfileReport:
    found = profiled(scaling(2), tmp_path)
    assert found is not None
    return found


def test_a_profile_holds_what_the_variant_answered(known: ProfileReport) -> None:
    assert known.golden is not None
    assert "onnxruntime" in known.golden.computed_by
    [output] = known.golden.outputs
    assert (output.name, output.shape) == ("y", (1, 4))
    assert output.values == pytest.approx([2 * 1.7 * np.sin(12.9898 * place) for place in range(4)], abs=1e-4)


def test_a_variant_that_answers_as_before_is_not_measured_again(known: ProfileReport, tmp_path: Path) -> None:
    assert profiled(scaling(2), tmp_path, known) is None


def test_a_variant_that_answers_something_else_than_before_is_refused(known: ProfileReport, tmp_path: Path) -> None:
    with pytest.raises(AttemptFailed, match="golden input") as refused:
        profiled(scaling(2.01), tmp_path, known)
    assert refused.value.outcome is Outcome.INCOMPATIBLE


def test_another_runtime_or_processor_may_answer_otherwise_and_is_noted(known: ProfileReport, tmp_path: Path) -> None:
    assert known.golden is not None
    moved = known.model_copy(update={"golden": known.golden.model_copy(update={"computed_by": "another machine"})})
    renewed = profiled(scaling(2.01), tmp_path, moved)
    assert renewed is not None
    assert renewed.golden is not None
    assert renewed.golden.computed_by == known.golden.computed_by
    assert renewed.golden.outputs != known.golden.outputs
    assert (renewed.a_ms, renewed.load_ms) == (known.a_ms, known.load_ms), "the speed is not measured again"


def test_a_profile_of_an_older_release_gets_its_golden_output(known: ProfileReport, tmp_path: Path) -> None:
    renewed = profiled(scaling(2), tmp_path, known.model_copy(update={"golden": None}))
    assert renewed == known


def test_what_draws_random_numbers_has_no_golden_output_and_is_served_all_the_same(tmp_path: Path) -> None:
    found = profiled(drawing_lots(), tmp_path)
    assert found is not None
    assert found.golden is None
    assert profiled(drawing_lots(), tmp_path, found) is None


def test_strings_are_told_by_their_shape(tmp_path: Path) -> None:
    found = profiled(echo(TensorProto.STRING), tmp_path)
    assert found is not None
    assert found.golden is not None
    assert [(output.shape, output.values) for output in found.golden.outputs] == [((1, 3), ())]


def test_a_golden_output_is_small_whatever_the_variant_answers() -> None:
    outputs = {f"{place}{'y' * 300}": np.ones((1, 1000), dtype=np.float32) for place in range(50)}
    golden = GoldenOutput.model_validate_json(golden_output(outputs, computed_by="here").model_dump_json())
    assert len(golden.outputs) == OUTPUTS_KEPT
    assert sum(len(output.values) for output in golden.outputs) == VALUES_KEPT


def test_what_threads_add_up_in_another_order_is_the_same_answer() -> None:
    numbers = np.random.default_rng(1).standard_normal(32).astype(np.float32)
    known = golden_output({"y": numbers}, computed_by="here")
    assert agrees(known, golden_output({"y": numbers * np.float32(1 + 1e-5)}, computed_by="here"))
    assert not agrees(known, golden_output({"y": numbers * np.float32(1.01)}, computed_by="here"))
    assert not agrees(known, golden_output({"z": numbers}, computed_by="here"))
