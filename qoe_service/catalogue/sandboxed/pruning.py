"""Structured channel pruning: whole channels go, and what they carried is rebuilt from those that stay.

Channels are chosen by pivoted elimination on calibration activations, scaled by how strongly the next layer reads them;
the next layer's weights and bias then absorb the best linear guess of the missing ones (after Chee et al., *Model
Preserving Compression for Neural Networks*, 2022). How far each layer is cut follows from a sweep of its sensitivity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from . import activations, channel_groups, checks, cost
from . import graph as graphs
from .channel_groups import Group, Weights
from .datasets import Dataset
from .interface import Task
from .memory import Held
from .reconstruction import Mixture, Moments, pivoted_order
from .refusal import Refusal

Floats = NDArray[np.float32]
PREPARED = Path("prepared.onnx")
MIN_CHANNELS, LEVELS, HELD_BACK = 16, 12, 4
MAX_CHANNELS = 8192


@dataclass
class Reduction:
    """A way to cut a group down: channels in the order in which they stay, and the error that is left for each count.

    ``errors`` maps a count to the share of the next layer's answer that is lost, on samples not fitted to.
    """

    group: Group
    order: NDArray[np.int64]
    errors: Mapping[int, float]
    sensitivity: float = 1.0


class PruneChannels:
    """Takes channels out of layers whose readers are known."""

    name = "prune-channels"
    uses_calibration = True

    def why_not(self, model: onnx.ModelProto, data: Dataset | None) -> str | None:
        """It needs plain layers that nothing but layers read, and samples to fit on."""
        if quantised := graphs.why_quantised(model):
            return quantised
        if data is None:
            return "it needs calibration samples, and the application has no data set"
        if graphs.weights_in(model, graphs.DENSE | graphs.CONVOLUTIONS) == 0:
            return "the model has no convolution or dense layer with constant weights"
        return None

    def held_bytes(self, layers: Held, task: Task) -> int:
        """What convolutions and dense layers read is collected, then the model's answers are compared."""
        kinds = graphs.DENSE | graphs.CONVOLUTIONS
        nodes = [node for node in checks.read(task.source).graph.node if node.op_type in kinds]
        axes = {node.input[0]: -1 if node.op_type in graphs.DENSE else 1 for node in nodes}
        answers = activations.ANSWERS_BATCH * layers.at_once
        return activations.collected_bytes(layers, axes, task, then=answers)

    def apply(self, task: Task) -> None:
        """Measure, choose, cut."""
        assert task.data is not None
        model = graphs.prepare(task.source, PREPARED)
        groups = [each for each in channel_groups.find(model) if 2 * MIN_CHANNELS <= each.channels <= MAX_CHANNELS]
        if not groups:
            raise Refusal(
                "prune-channels does not help here: no layer's channels can be cut without changing another "
                f"(short cuts tie them together), or none has {2 * MIN_CHANNELS} channels"
            )
        samples = task.data.calibration_inputs[: task.parameters["calibration_samples"]]
        fitted, held_back = _split(samples)
        found = activations.collect(model, samples, _axes(groups), task=task)
        reductions = [_reduction(each, model, found, len(fitted) / len(samples)) for each in groups]
        _find_sensitivities(model, reductions, found, held_back)
        bounds = float(task.parameters["keep_cost"]), float(task.parameters["most_error"])
        kept = _choose(model, reductions, *bounds)
        for reduction in reductions:
            count = kept[reduction.group.writer.output[0]]
            if count < reduction.group.channels:
                cut(model, reduction.group, np.sort(reduction.order[:count]), found)
        onnx.save(_fresh(model), task.target)


def cut(model: onnx.ModelProto, group: Group, keep: NDArray[np.int64], found: Mapping[str, Floats]) -> None:
    """Leave only ``keep`` of a group's channels; its readers make up for the rest."""
    weights = Weights(model)
    _cut_writer(group, keep, weights)
    for name in group.constants:
        values = weights.get(name)
        weights.set(name, np.take(values, keep, axis=values.shape.index(group.channels)))
    for reader in group.readers:
        mixture = Mixture.fitted(Moments.of(found[reader.tensor]), keep)
        name = channel_groups.weight_of(reader.node)
        by_channel = _by_channel(reader, weights.get(name), group.channels)
        channel_groups.shift_bias(model, reader.node, mixture.offset @ by_channel[mixture.missing].sum(axis=1))
        mixed = mixture.absorbed(by_channel)
        weights.set(name, _from_channels(reader, mixed, weights.shape(name)))


def _split(samples: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Three quarters to fit on, and the last quarter to check on."""
    border = max(len(samples) - len(samples) // HELD_BACK, 1)
    return samples[:border], samples[border:] if border < len(samples) else samples


def _axes(groups: Sequence[Group]) -> dict[str, int]:
    return {reader.tensor: group.axis for group in groups for reader in group.readers}


def _reduction(group: Group, model: onnx.ModelProto, found: Mapping[str, Floats], share: float) -> Reduction:
    weights = Weights(model)
    errors: dict[int, float] = {}
    reads = [(found[each.tensor], _reading(each, weights, group.channels)) for each in group.readers]
    borders = [int(len(rows) * share) for rows, _ in reads]
    parts = [(rows[:border], rows[border:]) for (rows, _), border in zip(reads, borders, strict=True)]
    scaled = [fit_on * _norms(reading) for (fit_on, _), (_, reading) in zip(parts, reads, strict=True)]
    order = pivoted_order(np.concatenate(scaled))
    moments = [(Moments.of(fit_on), Moments.of(check_on)) for fit_on, check_on in parts]
    for count in _levels(group.channels):
        keep = np.sort(order[:count])
        errors[count] = max(
            _lost(*pair, reading.astype(np.float64), keep) for pair, (_, reading) in zip(moments, reads, strict=True)
        )
    return Reduction(group, order, errors)


def _levels(channels: int) -> list[int]:
    """Counts worth trying: multiples of 16, because vectorised kernels pad to that, about a dozen of them."""
    step = max(16, round(channels / LEVELS / 16) * 16)
    return [*range(max(step, MIN_CHANNELS), channels, step)]


def _lost(fit_on: Moments, check_on: Moments, reading: NDArray[np.float64], keep: NDArray[np.int64]) -> float:
    """The share of what a reader gets that is lost on rows that were not fitted to."""
    mixture = Mixture.fitted(fit_on, keep)
    wanted = reading[mixture.missing]
    missed = np.zeros_like(reading)
    missed[mixture.missing], missed[keep] = wanted, -(mixture.left @ (mixture.right @ wanted))
    offset = check_on.mean @ missed - mixture.offset @ wanted
    whole = check_on.squares(reading, np.zeros(reading.shape[1]))
    return check_on.squares(missed, offset) / max(whole, 1e-30)


def _norms(reading: Floats) -> Floats:
    return np.asarray(np.sqrt((reading**2).sum(axis=1)), dtype=np.float32)


def _reading(reader: channel_groups.Reader, weights: Weights, channels: int) -> Floats:
    """A reader's weights as [channels, everything else], thinned to what tells channels apart."""
    values = _by_channel(reader, weights.get(channel_groups.weight_of(reader.node)), channels)
    flat = values.reshape(channels, -1)
    if flat.shape[1] > channels:  # the same Gram matrix from fewer columns
        flat = np.linalg.cholesky(flat @ flat.T + 1e-9 * np.trace(flat @ flat.T) / channels * np.eye(channels))
    return np.asarray(flat, dtype=np.float32)


def _by_channel(reader: channel_groups.Reader, values: NDArray[Any], channels: int) -> NDArray[np.float64]:
    """Weights as [channels, positions, outputs]; the bias of outputs moves with the sum over positions."""
    if reader.node.op_type == "Conv":
        return values.reshape(*values.shape[:2], -1).transpose(1, 2, 0).astype(np.float64)
    columns = values.T if channel_groups.transposed(reader.node) else values
    return columns.reshape(channels, reader.repeats, -1).astype(np.float64)


def _from_channels(
    reader: channel_groups.Reader, values: NDArray[np.float64], shape: tuple[int, ...]
) -> NDArray[np.float64]:
    if reader.node.op_type == "Conv":
        return values.transpose(2, 0, 1).reshape(shape[0], len(values), *shape[2:])
    columns = values.reshape(len(values) * reader.repeats, -1)
    return columns.T if channel_groups.transposed(reader.node) else columns


def _cut_writer(group: Group, keep: NDArray[np.int64], weights: Weights) -> None:
    node = group.writer
    name = channel_groups.weight_of(node)
    outputs_first = node.op_type == "Conv" or channel_groups.transposed(node)
    weights.set(name, np.take(weights.get(name), keep, axis=0 if outputs_first else 1))
    for bias in node.input[2:]:
        values = weights.get(bias)
        if values.size > 1:
            weights.set(bias, np.take(values, keep, axis=-1))


def _find_sensitivities(
    model: onnx.ModelProto, reductions: Sequence[Reduction], found: Mapping[str, Floats], samples: NDArray[Any]
) -> None:
    """How much the model's answer suffers, per unit of a layer's own error: each layer alone is cut by half."""
    (answer,) = activations.outputs_of(model, samples)
    spread = max(float(((answer - answer.mean(axis=0)) ** 2).sum()), 1e-30)
    for each in reductions:
        count = min(each.errors, key=lambda count: abs(count - each.group.channels / 2))
        trial = onnx.ModelProto()
        trial.CopyFrom(model)
        same = next(
            group for group in channel_groups.find(trial) if group.writer.output[0] == each.group.writer.output[0]
        )
        cut(trial, same, np.sort(each.order[:count]), found)
        (changed,) = activations.outputs_of(_fresh(trial), samples)
        lost = float(((changed - answer) ** 2).sum()) / spread
        each.sensitivity = max(lost, 1e-9) / max(each.errors[count], 1e-9)


def _choose(
    model: onnx.ModelProto, reductions: Sequence[Reduction], keep_cost: float, most_error: float
) -> dict[str, int]:
    """Channels to keep per group: always the step that costs least accuracy per multiplication saved.

    It ends at ``keep_cost`` of all multiplications, or where the expected error would exceed ``most_error``, as a share
    of the variance of the model's answer.
    """
    kept = {each.group.writer.output[0]: each.group.channels for each in reductions}
    layers = cost.Layers(model, [each.group for each in reductions])
    whole, error = layers.multiplications(kept), 0.0
    while layers.multiplications(kept) > keep_cost * whole:
        steps = [step for each in reductions if (step := _step(each, kept, layers)) is not None]
        affordable = [step for step in steps if error + step.lost <= most_error]
        if not affordable:
            break
        best = min(affordable, key=lambda step: (step.lost / max(step.saved, 1.0), step.name))
        kept[best.name] = best.left
        error += best.lost
    if all(kept[each.group.writer.output[0]] == each.group.channels for each in reductions):
        raise Refusal(
            f"prune-channels does not help here: taking any channels out costs more than {most_error:.1%} of the answer"
        )
    return kept


class _Step(NamedTuple):
    """Cutting one group down to its next level: what it loses and saves."""

    lost: float
    saved: float
    name: str
    left: int


def _step(reduction: Reduction, kept: Mapping[str, int], layers: cost.Layers) -> _Step | None:
    name = reduction.group.writer.output[0]
    lower = [count for count in reduction.errors if count < kept[name]]
    if not lower:
        return None
    count = max(lower)
    now = reduction.errors.get(kept[name], 0.0)
    saved = layers.multiplications(kept) - layers.multiplications({**kept, name: count})
    return _Step(reduction.sensitivity * max(reduction.errors[count] - now, 0.0), saved, name, count)


def _fresh(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the shapes that no longer hold, which are then inferred again."""
    del model.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(model)
