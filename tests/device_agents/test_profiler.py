"""Warm-up and the fit of a*n + b."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agents.errors import AttemptFailed
from device_agents.profiler import Run, at_rest_ms, fit, warm_up
from device_agents.runtime import Array, RunCost, Session
from device_agents.wire import Outcome, ProfileReport
from tests.device_agents.models import Model, dense, scaling

DIGEST = "a" * 64


@given(a_ms=st.floats(0.01, 100), b_ms=st.floats(0, 100))
def test_the_fit_finds_an_exact_line(a_ms: float, b_ms: float) -> None:
    line = fit([(n, a_ms * n + b_ms) for n in (1, 2, 4, 8)])
    assert line.a_ms == pytest.approx(a_ms, rel=1e-3, abs=1e-5)
    assert line.b_ms == pytest.approx(b_ms, rel=1e-3, abs=1e-4)
    assert line.predict_ms(16) == pytest.approx(16 * a_ms + b_ms, rel=1e-2)


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(0.001, 1e5)), min_size=1, max_size=6))
def test_no_part_of_a_fit_is_negative(points: list[tuple[int, float]]) -> None:
    line = fit(points)
    assert line.a_ms >= 0
    assert line.b_ms >= 0
    assert line.r2 <= 1


def test_a_profile_is_measured_within_two_seconds(tmp_path: Path) -> None:
    started_s = time.monotonic()
    path = dense().write(tmp_path / "m.onnx")
    profile = warm_up(path, digest=DIGEST, threads=1, max_batch=8, budget_s=0.3).profile
    assert time.monotonic() - started_s < 2
    assert profile is not None
    assert profile.a_ms + profile.b_ms > 0
    assert profile.load_ms > 0
    assert profile.memory_bytes >= path.stat().st_size
    assert profile.cpu_ms_per_row is not None
    assert profile.cpu_ms_per_row > 0


class Slow(Session):
    """Takes ``row_s`` for each row, as a model does on a device that is too small for it."""

    row_s = 0.4

    def run_timed(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], RunCost]:
        outputs, cost = super().run_timed(inputs)
        time.sleep(self.row_s * len(inputs["x"]))
        return outputs, RunCost(cost.service_ms + self.row_s * len(inputs["x"]) * 1000, cost.cpu_ms)


class Slower(Slow):
    row_s = 0.8


@pytest.mark.parametrize(("slow", "row_ms"), [(Slow, 400), (Slower, 800)])
def test_a_slow_model_is_profiled_within_two_seconds_too(tmp_path: Path, slow: type[Slow], row_ms: float) -> None:
    path = scaling(2).write(tmp_path / "m.onnx")
    started_s = time.monotonic()
    profile = warm_up(path, digest=DIGEST, threads=1, max_batch=8, budget_s=0.3, open_session=slow).profile
    assert time.monotonic() - started_s < 2
    assert profile is not None
    assert profile.golden is not None, "that it answers the same twice was found out in that time as well"
    assert profile.a_ms == pytest.approx(row_ms, rel=0.05)
    assert profile.b_ms < 0.05 * row_ms


def test_what_a_quota_stopped_counts_only_by_what_it_worked_and_only_alone() -> None:
    stopped, free = Run(True, 21.0, 1.1), Run(False, 1.2, 1.0)
    assert at_rest_ms([stopped, stopped]) == 1.1
    assert at_rest_ms([stopped, free, stopped]) == 1.2


def test_a_known_profile_is_not_measured_again(tmp_path: Path) -> None:
    known = ProfileReport(digest=DIGEST, threads=1, a_ms=1, b_ms=1)
    path = scaling(2).write(tmp_path / "m.onnx")
    again = warm_up(path, digest=DIGEST, threads=1, max_batch=4, budget_s=0.1, known=known).profile
    assert again is not None
    assert again.golden is not None, "an older release knew none"
    assert again.model_copy(update={"golden": None}) == known
    assert warm_up(path, digest=DIGEST, threads=1, max_batch=4, budget_s=0.1, known=again).profile is None


def test_a_fixed_batch_is_profiled_at_that_size(tmp_path: Path) -> None:
    path = scaling(2, rows=1).write(tmp_path / "m.onnx")
    profile = warm_up(path, digest=DIGEST, threads=1, max_batch=8, budget_s=0.1).profile
    assert profile is not None
    assert profile.b_ms == 0


@pytest.mark.parametrize(
    ("new", "old", "fits"),
    [
        (scaling(3), scaling(2), True),
        (scaling(3), scaling(2, rows=1), True),
        (scaling(3, rows=1), scaling(2), False),
        (scaling(3, output="z"), scaling(2), False),
    ],
    ids=["same", "opens a size", "fixes a size", "renames"],
)
def test_a_candidate_must_be_usable_as_the_running_model_is(tmp_path: Path, new: Model, old: Model, fits: bool) -> None:
    running = Session(old.write(tmp_path / "old.onnx"), threads=1)
    path = new.write(tmp_path / "new.onnx")
    if fits:
        warm_up(path, digest=DIGEST, threads=1, max_batch=2, budget_s=0.05, must_match=running)
        return
    with pytest.raises(AttemptFailed) as failed:
        warm_up(path, digest=DIGEST, threads=1, max_batch=2, budget_s=0.05, must_match=running)
    assert failed.value.outcome is Outcome.INCOMPATIBLE


def unsupported_opset() -> bytes:
    model = onnx.load_from_string(scaling(2).content)
    model.opset_import[0].version = 9999
    content: bytes = model.SerializeToString()
    return content


def reaching_out_of_its_folder() -> bytes:
    """Its weights are said to stand in a file that is none of its business."""
    model = onnx.load_from_string(scaling(2).content)
    tensor = model.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "../../../../../../etc/passwd"), ("offset", "0"), ("length", "4")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    content: bytes = model.SerializeToString()
    return content


@pytest.mark.parametrize(
    "content",
    [b"", b"no model", scaling(2).content[:40], unsupported_opset(), reaching_out_of_its_folder()],
    ids=["empty", "no model", "truncated", "unsupported opset", "a path out of its folder"],
)
def test_a_file_that_is_no_sound_model_is_refused_with_a_reason(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(AttemptFailed, match=r"cannot be loaded: .+") as refused:
        warm_up(path, digest=DIGEST, threads=1, max_batch=4, budget_s=0.1)
    assert refused.value.outcome is Outcome.INCOMPATIBLE
