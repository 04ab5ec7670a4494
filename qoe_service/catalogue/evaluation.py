"""What a model is and how accurate it is, as the sandbox found it; and how sure of that one can be."""

from __future__ import annotations

import contextlib
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from qoe_service.catalogue import artifacts
from qoe_service.catalogue.models import Application, Variant
from qoe_service.catalogue.sandbox import Refused, Sandbox, Watch
from qoe_service.errors import NotFound

Z_95 = 1.959964
FIRST_LOOK_SAMPLES = 300  # enough to choose by; the rest is measured when workers have time
PATIENCE_S = 8.0  # of CPU time: a rest that takes no longer is measured at once, which saves a program its start
REFERENCE = "reference.onnx"
Text = Annotated[str, Field(max_length=256)]
Share = Annotated[float, Field(ge=0, le=1)]
Weights = list[tuple[int, int]]  # spans (start, stop) of the model's file that other files may hold too


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
    """How good a model is on held-out data, by what, and the instruction sets it was computed with.

    Counts of right (or agreeing) answers, or for regressions the share of variance explained with its interval.
    """

    kind: Literal["top-1", "regression", "agreement"] = "top-1"
    correct: int | None = Field(default=None, ge=0)
    value: Share = 0.0
    low: Share = 0.0
    high: Share = 1.0
    mean_absolute_error: float | None = Field(default=None, ge=0)
    root_mean_square_error: float | None = Field(default=None, ge=0)
    samples: int = Field(gt=0)
    available: int = Field(gt=0)
    isa: Annotated[str, Field(max_length=100)]

    def as_seen(self) -> dict[str, Any]:
        """What a later look at the rest needs to go on from here; nothing where answers were not counted."""
        return {} if self.correct is None else self.model_dump(include={"samples", "correct", "isa"})

    def interval(self) -> tuple[float, float, float]:
        """The value and its 95 % interval."""
        if self.correct is None:
            return self.value, self.low, self.high
        return self.correct / self.samples, *wilson_interval(self.correct, self.samples)


class Cut(BaseModel):
    """A place where one tensor carries everything over; sizes per row."""

    tensor: Text
    dtype: Literal["float32", "uint8", "int8"]
    shape: list[int] = Field(max_length=32)
    bytes: int = Field(gt=0)
    flops_before: float = Field(ge=0)
    flops_after: float = Field(ge=0)


class Measured(BaseModel):
    """The sandbox's answer about one model. It comes from a program that read hostile bytes, so it is validated."""

    facts: Facts
    score: Score | None
    cuts: list[Cut] = Field(default_factory=list, max_length=64)
    no_cuts_because: Annotated[str, Field(max_length=400)] = ""
    weights: Weights = Field(default_factory=list, max_length=256)
    provenance: dict[str, Any] = Field(default_factory=dict)

    @property
    def is_first_look(self) -> bool:
        """Whether there is more held-out data than was measured on."""
        return self.score is not None and self.score.samples < self.score.available

    def as_fields(self, dataset: str | None) -> dict[str, Any]:
        """The columns of Variant that it fills; ``dataset`` is the digest of what it was measured on."""
        fields = self.facts.model_dump(include={"inputs", "outputs", "operators"})
        details: dict[str, Any] = {"cuts": [cut.model_dump() for cut in self.cuts]}
        if self.no_cuts_because:
            details["no_cuts_because"] = self.no_cuts_because
        if self.score is None:
            return {**fields, "details": details}
        value, low, high = self.score.interval()
        errors = self.score.model_dump(include={"mean_absolute_error", "root_mean_square_error"}, exclude_none=True)
        return {
            **fields,
            "accuracy": value,
            "accuracy_low": low,
            "accuracy_high": high,
            "accuracy_samples": self.score.samples,
            "accuracy_isa": self.score.isa,
            "details": {**details, "accuracy": {"kind": self.score.kind, "dataset": dataset, **errors}},
        }


def add_reference(box: Sandbox, application: Application) -> None:
    """Put the model to agree with into a sandbox, the application's first: whether the data has labels is known there.

    What was found of that model tells nothing: it may have been measured on other data.
    """
    first = Variant.objects.filter(application=application, base=None).order_by("pk").first()
    if first is not None:
        with contextlib.suppress(NotFound):  # a model that lost its bytes can keep no other from being judged by labels
            box.add(REFERENCE, artifacts.open_for_reading(first.artifact_id))


def measure(box: Sandbox, request: dict[str, Any], *, watch: Watch | None = None) -> Measured:
    """Let the sandbox check and measure a model. Raises Refused or Cancelled."""
    answer = box.ask(request, watch=watch)
    try:
        return Measured.model_validate(answer)
    except ValidationError as error:
        raise Refused(f"the program that reads models gave an odd answer: {error.errors()[0]['msg']}") from None


def first_look() -> dict[str, Any]:
    """How much of the held-out data is looked at first, as the sandbox is asked for it."""
    return {"samples": FIRST_LOOK_SAMPLES, "patience_s": PATIENCE_S}


def wilson_interval(correct: int, samples: int, z: float = Z_95) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): honest near 0 and 1 and for few samples, where the normal one is not."""
    share, square = correct / samples, z * z
    centre = (share + square / (2 * samples)) / (1 + square / samples)
    half = z / (1 + square / samples) * math.sqrt(share * (1 - share) / samples + square / (4 * samples * samples))
    # the bounds of a share that is 0 or 1 are exact on paper, not in floating point
    low, high = (0.0 if correct == 0 else centre - half), (1.0 if correct == samples else centre + half)
    return low, high


def record(variant: Variant, measured: Measured, *, dataset: str | None) -> None:
    """Write what was measured, on the data set of this digest, into an existing variant."""
    fields = measured.as_fields(dataset)
    for name, value in fields.items():
        setattr(variant, name, value)
    variant.save(update_fields=list(fields))
