"""What a compression pass is to the program that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import onnx

from .datasets import Dataset
from .memory import Held


def tell_nobody(share: float) -> None:
    """For callers who do not wait for progress."""
    del share


@dataclass(frozen=True)
class Task:
    """One pass over one model: read ``source``, write ``target``, say how far it is as a share of 1."""

    source: Path
    target: Path
    parameters: dict[str, Any]
    data: Dataset | None = None
    tell: Callable[[float], None] = field(default=tell_nobody)


class Pass(Protocol):
    """One way to make a smaller or faster model out of a model. Same input, same bytes."""

    name: str
    uses_calibration: bool

    def why_not(self, model: onnx.ModelProto, data: Dataset | None) -> str | None:
        """Why it cannot help this model; None if it may. Cheap: it looks at the graph, it runs nothing."""
        ...

    def held_bytes(self, layers: Held, task: Task) -> int:  # noqa: ARG002 - most run nothing
        """What the model's layers hold at the peak, where the pass runs it."""
        return 0

    def apply(self, task: Task) -> None:
        """Write the derived model. Raises Refusal where only doing it shows that it does not help."""
        ...
