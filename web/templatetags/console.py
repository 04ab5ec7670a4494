"""Template filters and tags of the console: formatting, icons, relative times and small drawings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import wraps
from typing import Any

from django import template
from django.utils.html import format_html
from django.utils.safestring import SafeString, mark_safe

from web import drawings, formatting

register = template.Library()


def _reads(function: Callable[..., str]) -> Callable[..., str]:
    """The filter of a number. Django passes "" for a key that a record lacks: that is nothing, not an error."""

    @wraps(function)
    def read(value: Any, *arguments: int) -> str:
        return function(None if value == "" else value, *arguments)

    return read


for _name in (
    "milliseconds",
    "bound",
    "seconds",
    "size",
    "share",
    "decimal",
    "signed",
    "count",
    "rate",
    "configuration",
):
    register.filter(_name, _reads(getattr(formatting, _name)))
register.filter("words", formatting.words)

_ICONS = {
    "ok": '<circle cx="8" cy="8" r="7" class="fill"/><path d="m5 8.2 2.1 2.1L11 6.2" class="cut"/>',
    "busy": '<circle cx="8" cy="8" r="6" class="line"/><path d="M8 2a6 6 0 0 1 0 12z" class="fill"/>',
    "idle": '<circle cx="8" cy="8" r="6" class="line"/>',
    "warn": '<path d="M8 1.5 15 14H1z" class="fill"/><path d="M8 6v4M8 11.6v.4" class="cut"/>',
    "bad": '<path d="M5 1h6l4 4v6l-4 4H5l-4-4V5z" class="fill"/><path d="m5.7 5.7 4.6 4.6m0-4.6-4.6 4.6" class="cut"/>',
    "chosen": '<path d="m8 1.2 2 4.5 4.9.5-3.7 3.3 1.1 4.8L8 11.8l-4.3 2.5 1.1-4.8L1.1 6.2 6 5.7z" class="fill"/>',
    "arrow": '<path d="M2.5 8h10m-4-4 4 4-4 4" class="line"/>',
    "chevron": '<path d="m6 3.5 4.5 4.5L6 12.5" class="line"/>',
}


@register.simple_tag
def icon(name: str) -> SafeString:
    """A decorative drawing; the words beside it carry the meaning."""
    svg = '<svg class="icon icon-{}" viewBox="0 0 16 16" aria-hidden="true" focusable="false">{}</svg>'
    return format_html(svg, name, mark_safe(_ICONS[name]))  # noqa: S308  # constants of this file


@register.simple_tag
def ago(moment: datetime | None, now: datetime) -> SafeString:
    """A relative time with the absolute one as its title; the browser lets it grow."""
    if moment is None:
        return mark_safe("never")
    utc = moment.astimezone(UTC)
    return format_html(
        '<time datetime="{}" title="{} UTC" data-ago>{}</time>',
        utc.isoformat(timespec="milliseconds"),
        utc.strftime("%Y-%m-%d %H:%M:%S"),
        formatting.since(moment, now),
    )


@register.simple_tag
def short(identifier: str, length: int = 8) -> SafeString:
    """The beginning of a digest or an id; the whole of it as its title."""
    if not identifier:
        return mark_safe("–")
    return format_html('<code title="{}">{}</code>', identifier, identifier[:length])


@register.simple_tag
def sparkline(values: Sequence[float], what: str = "QoE") -> SafeString:
    """A line without axes, from 0 to 1."""
    return drawings.sparkline(values, what)


@register.simple_tag
def bar(value: float | None, kind: str = "accent") -> SafeString:
    """A share as a bar."""
    return drawings.bar(value, kind)


@register.simple_tag
def stacked_bar(parts: Sequence[drawings.Part], what: str) -> SafeString:
    """Shares of a whole."""
    return drawings.stacked_bar(parts, what)


@register.simple_tag
def swatch(colour: int) -> SafeString:
    """The colour of one part beside its name."""
    svg = '<svg class="swatch" viewBox="0 0 10 10" aria-hidden="true"><rect class="swatch-{}" {}/></svg>'
    return format_html(svg, colour, mark_safe('width="10" height="10"'))
