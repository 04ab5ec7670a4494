"""Where numbers hold: one class of devices on one set of instruction sets. No number is lent from place to place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

# Those that decide what integer arithmetic gives and how fast it is, in the order and words of the sandbox.
FAMILY = ("avx2", "avx512", "vnni", "amx", "neon-dot", "i8mm")


class Place(NamedTuple):
    """A class of devices, and their instruction sets as ``isa_of`` tells them."""

    device_class: str
    isa: str = ""


SERVER = Place("server")


def isa_of(hardware: Mapping[str, Any]) -> str:
    """The instruction sets of a device; empty before it has told its architecture.

    >>> isa_of({"architecture": "x86_64", "isa": ["vnni", "sse42", "avx2"]})
    'x86_64 avx2 vnni'
    """
    architecture, words = hardware.get("architecture", ""), hardware.get("isa", ())
    return " ".join([architecture, *(word for word in FAMILY if word in words)]) if architecture else ""
