"""Cuts a variant in two at one of its recorded cut points, and keeps both halves as artifacts."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from pydantic import BaseModel, Field, ValidationError

from qoe_service.catalogue import artifacts, datasets, sandbox
from qoe_service.catalogue.evaluation import Weights
from qoe_service.catalogue.models import Artifact, Variant
from qoe_service.errors import InvalidInput

MODEL, HEAD, TAIL = "model.onnx", "head.onnx", "tail.onnx"


class Answer(BaseModel):
    """What the sandbox says about the halves."""

    head_weights: Weights = Field(max_length=256)
    tail_weights: Weights = Field(max_length=256)


class Halves(NamedTuple):
    """``head`` turns the input into the cut's tensor, ``tail`` the tensor into the answer."""

    head: Artifact
    tail: Artifact


def split(*, variant: Variant, tensor: str, now: datetime) -> Halves:
    """Extract both halves in the sandbox, which checks that together they are the whole. Raises InvalidInput."""
    known = [cut["tensor"] for cut in variant.details.get("cuts", [])]
    if tensor not in known:
        raise InvalidInput(f"is no cut of {variant.name}; there are {', '.join(known)[:500] or 'none'}", field="tensor")
    with sandbox.opened() as box:
        box.add(MODEL, artifacts.open_for_reading(variant.artifact_id))
        datasets.add_to(box, variant.application)
        try:
            answer = Answer.model_validate(box.ask({"command": "split", "tensor": tensor}))
            with box.open(HEAD) as head, box.open(TAIL) as tail:
                return Halves(
                    artifacts.store(head, now=now, weights=answer.head_weights),
                    artifacts.store(tail, now=now, weights=answer.tail_weights),
                )
        except ValidationError as error:
            raise InvalidInput(
                f"the halves came with an odd answer: {error.errors()[0]['msg']}", field="tensor"
            ) from None
        except sandbox.Refused as refusal:
            raise InvalidInput(str(refusal), field="tensor") from None
