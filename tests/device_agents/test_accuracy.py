"""Accuracy on samples: what counts as right for each kind, and files that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_agents.__main__ import main
from device_agents.accuracy import Samples, accuracy, read, score
from device_agents.errors import AttemptFailed
from tests.device_agents.models import scaling

INPUTS = np.eye(4, dtype=np.float32)[np.arange(10) % 4]
CLASSES = np.arange(10) % 4


def write(path: Path, **arrays: Any) -> Path:
    with path.open("wb") as file:
        np.savez_compressed(file, **{"kind": "top-1", "inputs": INPUTS, "expected": CLASSES, **arrays})
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Twice its input: the largest output is where the largest input is."""
    return scaling(2).write(tmp_path / "model.onnx")


def test_right_classes_are_counted(model: Path, tmp_path: Path) -> None:
    half = np.where(np.arange(10) < 5, CLASSES, (CLASSES + 1) % 4)
    found = accuracy(model, write(tmp_path / "samples.npz", expected=half), threads=1)
    assert (found.kind, found.samples, found.correct) == ("top-1", 10, 5)


def test_agreement_looks_at_the_largest_output_only(model: Path, tmp_path: Path) -> None:
    found = accuracy(model, write(tmp_path / "s.npz", kind="agreement", expected=INPUTS * 9.0), threads=1)
    assert (found.kind, found.correct) == ("agreement", 10)


def test_a_regression_tells_the_variance_it_explains() -> None:
    wanted = np.linspace(0, 1, 50)[:, None]
    samples = Samples("regression", np.zeros((50, 1)), wanted)
    assert score(wanted, samples).value == 1.0
    off = score(wanted + np.where(np.arange(50) % 2, 0.1, -0.1)[:, None], samples)
    # hand-computed: 1 - 50 * 0.01 / sum((x - 0.5)^2)
    assert off.value == pytest.approx(1 - 0.5 / ((wanted - 0.5) ** 2).sum())
    assert off.low < off.value < off.high
    assert score(1 - wanted, samples).value == 0.0


def test_classes_in_a_table_of_their_own_are_not_compared_crosswise() -> None:
    with pytest.raises(AttemptFailed, match="do not fit"):
        score(INPUTS, Samples("top-1", INPUTS, CLASSES[:, None]))


def test_numbers_that_are_not_finite_are_no_answer() -> None:
    samples = Samples("top-1", INPUTS, CLASSES)
    with pytest.raises(AttemptFailed, match="not finite"):
        score(np.full((10, 4), np.nan), samples)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"kind": "vibes"}, "unknown kind 'vibes'"),
        ({"expected": CLASSES[:3]}, "hold 10 inputs and 3 answers"),
        ({"inputs": np.zeros((201, 4), np.float32), "expected": np.zeros(201)}, "1 to 200"),
        ({"inputs": np.zeros((0, 4), np.float32), "expected": np.zeros(0)}, "1 to 200"),
        ({"inputs": np.float32(1)}, "hold 1 inputs"),
        ({"inputs": np.array([{"a": 1}] * 10)}, "cannot be read"),
    ],
)
def test_samples_that_make_no_sense_are_refused(tmp_path: Path, arrays: dict[str, Any], says: str) -> None:
    with pytest.raises(AttemptFailed, match=says):
        read(write(tmp_path / "samples.npz", **arrays))


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_a_damaged_file_of_samples_is_refused(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "samples.npz")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AttemptFailed, match="the samples cannot be read"):
        read(path)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"inputs": INPUTS.astype(np.float64)}, "takes 1 inputs of float32"),
        ({"kind": "regression", "expected": np.zeros((10, 3))}, "do not fit"),
    ],
)
def test_samples_for_another_model_are_refused(model: Path, tmp_path: Path, arrays: dict[str, Any], says: str) -> None:
    with pytest.raises(AttemptFailed, match=says):
        accuracy(model, write(tmp_path / "samples.npz", **arrays), threads=1)


def test_the_command_measures_speed_and_accuracy(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "samples.npz")
    assert main(["profile", str(model), "--json", "--samples", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"]["correct"] == 10
    assert found["digest"] == scaling(2).digest
    assert main(["profile", str(model), "--samples", str(path)]) == 0
    assert "accuracy 1.000 (top-1) on 10 samples" in capsys.readouterr().out
