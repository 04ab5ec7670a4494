"""What a variant answers to one row of fixed input. A variant that answers something else than it did is not served.

Answers are comparable only where the same runtime computed them on the same instruction sets: quantised kernels
round differently elsewhere, and nobody's answer would be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from device_agents.runtime import Array
from device_agents.wire import GoldenOutput, GoldenTensor

GOLDEN_INPUT = "sine-1"  # ``profiler.sample_inputs`` of one row; another input takes another name
VALUES_KEPT, OUTPUTS_KEPT = 32, 8
TOLERANCE, NOTHING = 1e-3, 1e-6  # relative to the largest value, and absolute
LONGEST_NAME, MOST_AXES = 256, 16


def golden_output(outputs: Mapping[str, Array], *, computed_by: str) -> GoldenOutput:
    """The first values of the outputs, to six digits; strings are told by their shape alone."""
    room, tensors = VALUES_KEPT, []
    for name, array in list(outputs.items())[:OUTPUTS_KEPT]:
        values = array.reshape(-1)[:room].astype(np.float64) if array.dtype.kind in "fiub" else np.empty(0)
        room -= len(values)
        kept = tuple(float(f"{value:.6g}") for value in values)
        tensors.append(GoldenTensor(name=name[:LONGEST_NAME], shape=array.shape[:MOST_AXES], values=kept))
    return GoldenOutput(input=GOLDEN_INPUT, computed_by=computed_by[:LONGEST_NAME], outputs=tuple(tensors))


def is_comparable(known: GoldenOutput | None, found: GoldenOutput) -> bool:
    """Whether two answers must agree."""
    return known is not None and (known.input, known.computed_by) == (found.input, found.computed_by)


def agrees(known: GoldenOutput, found: GoldenOutput) -> bool:
    """Whether two comparable answers are the same but for the order in which threads add up.

    >>> tensor = GoldenTensor(name="y", shape=(1, 2), values=(0.5, -2.0))
    >>> known = GoldenOutput(input="sine-1", computed_by="a", outputs=(tensor,))
    >>> other = tensor.model_copy(update={"values": (0.5, -2.1)})
    >>> agrees(known, known), agrees(known, known.model_copy(update={"outputs": (other,)}))
    (True, False)
    """
    shapes = [[(tensor.name, tensor.shape, len(tensor.values)) for tensor in each.outputs] for each in (known, found)]
    if shapes[0] != shapes[1]:
        return False
    return all(_is_close(old.values, new.values) for old, new in zip(known.outputs, found.outputs, strict=True))


def _is_close(old: tuple[float, ...], new: tuple[float, ...]) -> bool:
    scale = max((abs(value) for value in old), default=0.0)
    return all(abs(a - b) <= TOLERANCE * scale + NOTHING for a, b in zip(old, new, strict=True))
