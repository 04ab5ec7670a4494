"""Which compression passes can be asked for, by name. How each is done stands in ``sandboxed/passes.py`` and beside it.

A pass is a method of the sandbox with parameters. A chain is passes one after another, written ``first+second``: each
is a job of its own, whose base is the variant that the job before it made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from qoe_service.errors import InvalidInput

ANY, X86, X86_VNNI, ARM = "any", "x86", "x86-vnni", "arm"
JOIN, WHOLE_FAMILY = "+", "family"
MAX_CHAIN = 4


@dataclass(frozen=True, slots=True)
class CompressionPass:
    """What can be asked for.

    An empty ``precision`` is the base's. ``made_for`` names the instruction sets whose devices it suits; elsewhere it
    runs, perhaps slower or less accurately. ``memory_factor`` estimates the sandbox's peak memory in bytes per byte of
    the model.
    """

    name: str
    method: str
    precision: str
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    made_for: str = ANY
    memory_factor: float = 8.0


_STATIC = {
    "calibration_samples": 128,
    "ranges": "minmax",
    "per_channel": True,
    "reduce_range": False,
    "activations": "uint8",
}
_SAMPLES = {"calibration_samples": 256}


def _static(name: str, made_for: str = X86_VNNI, method: str = "static-int8", **changed: Any) -> CompressionPass:
    return CompressionPass(name, method, "int8", {**_STATIC, **changed}, made_for, 12.0)


def _prune(name: str, **changed: Any) -> CompressionPass:
    parameters = {**_SAMPLES, "most_error": 1.0, **changed}
    return CompressionPass(name, "prune-channels", "", parameters, memory_factor=12.0)


PASSES: Mapping[str, CompressionPass] = MappingProxyType(
    {
        each.name: each
        for each in (
            CompressionPass("clean-up", "clean-up", ""),
            _static("static-int8"),
            _static("static-int8-per-tensor", per_channel=False),
            _static("static-int8-7bit", X86, reduce_range=True),
            _static("static-int8-arm", ARM, activations="int8"),
            _static("static-int8-entropy", ranges="entropy"),
            _static("static-int8-percentile", ranges="percentile"),
            _static("mixed-int8", method="mixed-int8", keep_share=0.25),
            CompressionPass("dynamic-int8", "dynamic-int8", "int8", {"per_channel": True, "reduce_range": False}),
            CompressionPass(
                "dynamic-int8-per-tensor", "dynamic-int8", "int8", {"per_channel": False, "reduce_range": False}
            ),
            CompressionPass("int4-weights", "int4-weights", "int4", {"block_size": 32, "accuracy_level": 4}),
            CompressionPass("float16", "float16", "fp16"),
            _prune("prune-careful", keep_cost=0.1, most_error=0.005),
            _prune("prune-light", keep_cost=0.75),
            _prune("prune", keep_cost=0.5),
            _prune("prune-hard", keep_cost=0.3),
            CompressionPass("low-rank", "low-rank", "", {**_SAMPLES, "keep_energy": 0.999}, memory_factor=12.0),
            CompressionPass("low-rank-hard", "low-rank", "", {**_SAMPLES, "keep_energy": 0.99}, memory_factor=12.0),
        )
    }
)

# What one model becomes unless somebody asks for less. A pass that cannot help a model refuses within a second.
FAMILY: Sequence[str] = (
    *PASSES,
    *(
        f"{first}{JOIN}{second}"
        for first in ("prune-careful", "prune-light", "prune", "prune-hard", "low-rank", "low-rank-hard")
        for second in ("static-int8", "dynamic-int8-per-tensor")
    ),
)


def chain(text: str, *, field_name: str = "passes") -> tuple[CompressionPass, ...]:
    """The passes of ``first+second``. Raises InvalidInput naming what there is."""
    names = [name.strip() for name in text.split(JOIN)]
    unknown = [name for name in names if name not in PASSES]
    if unknown:
        raise InvalidInput(f"{', '.join(unknown)}: no such pass; there are {', '.join(PASSES)}", field=field_name)
    if len(names) > MAX_CHAIN:
        raise InvalidInput(f"{text}: at most {MAX_CHAIN} passes one after another", field=field_name)
    return tuple(PASSES[name] for name in names)


def chains(names: Sequence[str], *, field_name: str = "passes") -> tuple[tuple[CompressionPass, ...], ...]:
    """What a list of passes, chains and ``family`` asks for, each once and in order. Raises InvalidInput."""
    wanted = [each for name in names for each in (FAMILY if name == WHOLE_FAMILY else (name,))]
    return tuple(dict.fromkeys(chain(each, field_name=field_name) for each in wanted))
