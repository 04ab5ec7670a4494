"""What a model is and how accurate it is, as the sandbox found it; and how sure of that one can be."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from qoe_service.catalogue.models import Variant
from qoe_service.catalogue.sandbox import Refused, Sandbox, Watch

Z_95 = 1.959964
FIRST_LOOK_SAMPLES = 300  # enough to choose by; the rest is measured when workers have time
Text = Annotated[str, Field(max_length=256)]


class Tensor(BaseModel):
    """One input or output; a free axis has a name or nothing."""

    name: Text
    type: Text
    shape: list[int | Text | None] = Field(max_length=32)


class Facts(BaseModel):
    """What a model takes, gives and is made of."""

    inputs: list[Tensor] = Field(max_length=64)
    outputs: list[Tensor] = Field(max_length=256)
    operators: list[Text] = Field(max_length=1000)
    opset: int


class Score(BaseModel):
    """Right answers on held-out data, and the instruction sets they were computed with."""

    correct: int = Field(ge=0)
    samples: int = Field(gt=0)
    available: int = Field(gt=0)
    isa: Annotated[str, Field(max_length=100)]


class Measured(BaseModel):
    """The sandbox's answer about one model. It comes from a program that read hostile bytes, so it is validated."""

    facts: Facts
    score: Score | None
    provenance: dict[str, Any] = Field(default_factory=dict)

    @property
    def is_first_look(self) -> bool:
        """Whether there is more held-out data than was measured on."""
        return self.score is not None and self.score.samples < self.score.available

    def as_fields(self) -> dict[str, Any]:
        """The columns of Variant that it fills."""
        fields = self.facts.model_dump(include={"inputs", "outputs", "operators"})
        if self.score is None:
            return fields
        low, high = wilson_interval(self.score.correct, self.score.samples)
        return {
            **fields,
            "accuracy": self.score.correct / self.score.samples,
            "accuracy_low": low,
            "accuracy_high": high,
            "accuracy_samples": self.score.samples,
            "accuracy_isa": self.score.isa,
        }


def measure(box: Sandbox, request: dict[str, Any], *, watch: Watch | None = None) -> Measured:
    """Let the sandbox check and measure a model. Raises Refused or Cancelled."""
    answer = box.ask(request, watch=watch)
    try:
        return Measured.model_validate(answer)
    except ValidationError as error:
        raise Refused(f"the program that reads models gave an odd answer: {error.errors()[0]['msg']}") from None


def wilson_interval(correct: int, samples: int, z: float = Z_95) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): honest near 0 and 1 and for few samples, where the normal one is not."""
    share, square = correct / samples, z * z
    centre = (share + square / (2 * samples)) / (1 + square / samples)
    half = z / (1 + square / samples) * math.sqrt(share * (1 - share) / samples + square / (4 * samples * samples))
    # the bounds of a share that is 0 or 1 are exact on paper, not in floating point
    low, high = (0.0 if correct == 0 else centre - half), (1.0 if correct == samples else centre + half)
    return low, high


def record(variant: Variant, measured: Measured) -> None:
    """Write what was measured into an existing variant."""
    fields = measured.as_fields()
    for name, value in fields.items():
        setattr(variant, name, value)
    variant.save(update_fields=list(fields))
