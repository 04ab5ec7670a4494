"""Small server-drawn SVG: sparklines, bars, intervals. Widths are attributes, so a strict style policy holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString, mark_safe

from web import formatting

_WIDTH, _HEIGHT, _PAD = 96.0, 28.0, 3.0


def sparkline(values: Sequence[float], what: str) -> SafeString:
    """A line from 0 (bottom) to 1 (top), oldest left; the same scale everywhere, so that rows compare."""
    if not values:
        return mark_safe('<span class="faint">no leases yet</span>')
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in _places(values))
    last_x, last_y = _places(values)[-1]
    label = f"{what} of the last {len(values)} leases: {min(values):.2f} to {max(values):.2f}, last {values[-1]:.2f}"
    return format_html(
        '<svg class="spark" viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title>'
        '<line x1="0" x2="{}" y1="{}" y2="{}" class="spark-floor"/><polyline points="{}"/>'
        '<circle cx="{}" cy="{}" r="2.2"/></svg>',
        *(int(_WIDTH), int(_HEIGHT), label, label, int(_WIDTH), _HEIGHT - 0.5, _HEIGHT - 0.5, points),
        *(f"{last_x:.1f}", f"{last_y:.1f}"),
    )


def _places(values: Sequence[float]) -> list[tuple[float, float]]:
    step = (_WIDTH - 2 * _PAD) / max(len(values) - 1, 1)
    height = _HEIGHT - 2 * _PAD
    start = _WIDTH - _PAD - step * (len(values) - 1)
    return [(start + index * step, _PAD + height * (1 - _clip(value))) for index, value in enumerate(values)]


def _clip(value: float) -> float:
    return min(1.0, max(0.0, value))


def bar(value: float | None, kind: str = "accent") -> SafeString:
    """A share of the whole width; the number beside it says the same."""
    return format_html(
        '<svg class="bar bar-{}" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="bar-track" width="100" height="6"/><rect class="bar-fill" width="{}" height="6"/></svg>',
        kind,
        f"{100 * _clip(value or 0):.1f}",
    )


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a stacked bar."""

    label: str
    share: float
    colour: int


def stacked_bar(parts: Sequence[Part], what: str) -> SafeString:
    """Shares of a whole side by side; the table below says the same in words."""
    label = f"{what}: " + ", ".join(f"{part.label} {formatting.share(part.share, 0)}" for part in parts)
    starts = [sum(part.share for part in parts[:index]) for index in range(len(parts))]
    rects = format_html_join(
        "",
        '<rect class="swatch-{}" x="{}" width="{}" height="10"><title>{}</title></rect>',
        (
            (part.colour, f"{100 * start + 0.15:.2f}", f"{max(100 * part.share - 0.3, 0.2):.2f}", part.label)
            for start, part in zip(starts, parts, strict=True)
        ),
    )
    return format_html(
        '<svg class="stack" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>',
        label,
        rects,
    )


def interval(mean: float, low: float, high: float, *, reach: float) -> SafeString:
    """A mean with its interval on an axis from -reach to +reach with zero in the middle."""
    label = f"{formatting.signed(mean)}, interval {formatting.signed(low)} to {formatting.signed(high)}"
    left, middle, right = (100 + 96 * max(-1.0, min(1.0, each / reach)) for each in (low, mean, high))
    verdict = "up" if low > 0 else "down" if high < 0 else "open"
    return format_html(
        '<svg class="interval interval-{}" viewBox="0 0 200 20" role="img" aria-label="{}"><title>{}</title>'
        '<line class="interval-axis" x1="0" x2="200" y1="10" y2="10"/>'
        '<line class="interval-zero" x1="100" x2="100" y1="1" y2="19"/>'
        '<line class="interval-whisker" x1="{}" x2="{}" y1="10" y2="10"/><circle cx="{}" cy="10" r="4"/></svg>',
        *(verdict, label, label, f"{left:.1f}", f"{right:.1f}", f"{middle:.1f}"),
    )
