"""Numbers, times and configurations as people read them. Pure functions; no HTML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

NOTHING = "–"
_MINUS = "\u2212"
_CONFIGURATION = re.compile(r"b(\d+)c(\d+)t(\d+)(a?)")
_SIZES = ((1e3, "B"), (1e6, "kB"), (1e9, "MB"))
_UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
_THIN = "\u202f"


def milliseconds(value: float | None) -> str:
    """Three significant digits, and seconds from 1000 ms on.

    >>> milliseconds(4.213), milliseconds(42.13), milliseconds(421.3), milliseconds(4213)
    ('4.21 ms', '42.1 ms', '421 ms', '4.21 s')
    """
    if value is None:
        return NOTHING
    if value >= 1000:
        return f"{_three_digits(value / 1000)} s"
    return f"{_three_digits(value)} ms"


def _three_digits(value: float) -> str:
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def seconds(value: float | None) -> str:
    """A duration.

    >>> seconds(0.25), seconds(8), seconds(600), seconds(7200)
    ('250 ms', '8 s', '10 min', '2 h')
    """
    if value is None:
        return NOTHING
    if 0 < value < 1:
        return f"{value * 1000:.0f} ms"
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if value < limit:
            return f"{_plain(value / size)} {unit}"
    return f"{_plain(value / 86_400)} days"


def _plain(value: float) -> str:
    return f"{value:.0f}" if value >= 10 or value == round(value) else f"{value:.1f}"


def size(value: float | None) -> str:
    """Bytes in decimal units.

    >>> size(812), size(81_200), size(1_420_000), size(8_200_000_000)
    ('812 B', '81.2 kB', '1.42 MB', '8.20 GB')
    """
    if value is None:
        return NOTHING
    unit = next((name for limit, name in _SIZES if value < limit), "GB")
    amount = value / _UNITS[unit]
    return f"{amount:.0f} B" if unit == "B" else f"{_three_digits(amount)} {unit}"


def share(value: float | None, digits: int = 1) -> str:
    """A share as percent.

    >>> share(0.0123), share(1)
    ('1.2 %', '100 %')
    """
    if value is None:
        return NOTHING
    text = f"{value * 100:.{digits}f}"
    return f"{text.removesuffix('.' + '0' * digits) if value in (0, 1) else text} %"


def decimal(value: float | None, digits: int = 2) -> str:
    """A number with a fixed count of digits and a true minus sign."""
    return NOTHING if value is None else f"{value:.{digits}f}".replace("-", _MINUS)


def signed(value: float | None, digits: int = 2) -> str:
    """A difference, always with its sign.

    >>> signed(0.1234), signed(-0.5) == "\u22120.50"
    ('+0.12', True)
    """
    return NOTHING if value is None else f"{value:+.{digits}f}".replace("-", _MINUS)


def count(value: float | None) -> str:
    """A whole number with thin spaces between thousands."""
    return NOTHING if value is None else f"{value:,.0f}".replace(",", _THIN)


def rate(value: float | None) -> str:
    """Requests per second.

    >>> rate(3.21), rate(32.1)
    ('3.2/s', '32/s')
    """
    return NOTHING if value is None else f"{value:.1f}/s" if value < 10 else f"{value:.0f}/s"


def since(moment: datetime, now: datetime) -> str:
    """How long ago ``moment`` was, or how far ahead it is."""
    distance = (now - moment).total_seconds()
    if abs(distance) < 1:
        return "just now"
    whole = _whole(abs(distance))
    return f"{whole} ago" if distance > 0 else f"in {whole}"


def _whole(distance_s: float) -> str:
    for limit, size_s, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if distance_s < limit:
            return f"{distance_s // size_s:.0f} {unit}"
    return f"{distance_s // 86_400:.0f} days"


def bound(value: float | None) -> str:
    """A bound in milliseconds, as exactly as it was set.

    >>> bound(50.0), bound(12.5)
    ('50 ms', '12.5 ms')
    """
    return NOTHING if value is None else f"{value:g} ms"


def configuration(value: Mapping[str, Any] | None) -> str:
    """The bounds of a serving configuration in words.

    >>> configuration({"max_batch": 4, "max_concurrency": 2, "threads": 1})
    'batch 4 · 2 at once · 1 thread'
    """
    if not value:
        return NOTHING
    threads = value.get("threads", 1)
    parts = [
        f"batch {value.get('max_batch', 1)}",
        f"{value.get('max_concurrency', 1)} at once",
        f"{threads} thread" + ("" if threads == 1 else "s"),
    ]
    return " · ".join([*parts, "controller on"] if value.get("controller") else parts)


def configuration_key(key: str) -> str:
    """The short name of a configuration in words.

    >>> configuration_key("b4c2t1")
    'batch 4 · 2 at once · 1 thread'
    """
    match = _CONFIGURATION.fullmatch(key)
    if match is None:
        return key
    batch, concurrency, threads, controller = match.groups()
    return configuration(
        {"max_batch": batch, "max_concurrency": concurrency, "threads": int(threads), "controller": controller}
    )


def words(value: str) -> str:
    """A code as words: ``rolled_back`` becomes "rolled back"."""
    return value.replace("_", " ")
