"""The context of a decision as lines for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from web import formatting

_HIDDEN = {"device", "device_class", "application", "features", "supported_operators", "cached_digests"}
_KNOWN: dict[str, tuple[str, Callable[[Any], str]]] = {
    "arrival_rate_rps": ("requests arrive", formatting.rate),
    "slo_p95_ms": ("SLO, p95", formatting.bound),
    "minimum_accuracy": ("least accuracy", lambda value: formatting.share(value, 0)),
    "memory_free_bytes": ("memory free", formatting.size),
    "cpu_load_share": ("CPU used by others", lambda value: formatting.share(value, 0)),
}
_ACTIONS = {"incumbent": "running before", "baseline": "safe baseline"}


def context_lines(context: Mapping[str, Any], names: Mapping[str, str]) -> list[tuple[str, str]]:
    """Lines of name and value. ``names`` gives the words for action keys; digests stand for variants."""
    lines = [_line(key, value, names) for key, value in context.items() if key not in _HIDDEN and _is_known(value)]
    cached = len(context.get("cached_digests", ()))
    features = context.get("features") or {}
    told = [(_words(key), _plain(value)) for key, value in features.items() if _is_known(value)]
    return [*lines, ("variants on the device", str(cached)), *told]


def _line(key: str, value: Any, names: Mapping[str, str]) -> tuple[str, str]:
    if key in _ACTIONS:
        return _ACTIONS[key], names.get(str(value), str(value))
    words, shown = _KNOWN.get(key, (_words(key), _plain))
    return words, shown(value)


def _is_known(value: Any) -> bool:
    return value not in (None, "", [], {})


def _words(key: str) -> str:
    return formatting.words(key.replace("-", " "))


def _plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
