"""The accuracy–latency scatter of a family as a figure for plotly.js, with the front drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qoe_service.catalogue.accuracies import Accuracy
from web.catalogue_rows import Family, FamilyRow
from web.formatting import milliseconds, share, size

_KINDS = (
    ("front", "On the front", "accent", "circle"),
    ("dominated", "Dominated", "ink-faint", "circle-open"),
)
# names beside the whiskers, and neighbours on different sides
_NAMED = 8
_SIDES = ("bottom right", "top left")


def figure(family: Family) -> dict[str, Any]:
    """Points with their intervals; no data before a variant has both numbers on this device class."""
    rows = [row for row in family.rows if row.speed is not None and row.accuracy is not None]
    layout = {
        "margin": {"l": 56, "r": 16, "t": 8, "b": 44},
        "xaxis": {"type": "log", "title": {"text": f"One request on {family.device_class}, ms"}, "dtick": "D2"},
        "yaxis": {"title": {"text": "Accuracy"}, "tickformat": ".1%"},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hovermode": "closest",
    }
    return {"data": [_front(rows), *_points(rows)] if rows else [], "layout": layout}


def _front(rows: Sequence[FamilyRow]) -> dict[str, Any]:
    """A staircase: at each latency the best accuracy that can be had."""
    corners = sorted(_place(row) for row in rows if row.standing == "front")
    best, steps = 0.0, []
    for latency_ms, accuracy in corners:
        if accuracy > best:
            best = accuracy
            steps.append((latency_ms, accuracy))
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "Best accuracy for its time",
        "token": "accent",
        "x": [latency_ms for latency_ms, _ in steps],
        "y": [accuracy for _, accuracy in steps],
        "line": {"width": 1.5, "shape": "hv", "dash": "dot"},
        "hoverinfo": "skip",
    }


def _points(rows: Sequence[FamilyRow]) -> list[dict[str, Any]]:
    return [
        _group(sorted((row for row in rows if row.standing == standing), key=_place), name, token, symbol)
        for standing, name, token, symbol in _KINDS
        if any(row.standing == standing for row in rows)
    ]


def _group(rows: Sequence[FamilyRow], name: str, token: str, symbol: str) -> dict[str, Any]:
    places, known = [_place(row) for row in rows], [_accuracy(row) for row in rows]
    return {
        "type": "scatter",
        "mode": "markers+text" if symbol == "circle" and len(rows) <= _NAMED else "markers",
        "name": name,
        "token": token,
        "x": [latency_ms for latency_ms, _ in places],
        "y": [accuracy for _, accuracy in places],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [_gap(each.high, each.value) for each in known],
            "arrayminus": [_gap(each.value, each.low) for each in known],
            "thickness": 1,
            "width": 3,
        },
        "text": [row.variant.name for row in rows],
        "cliponaxis": False,
        "textposition": [_SIDES[place % len(_SIDES)] for place in range(len(rows))],
        "customdata": [_words(row) for row in rows],
        "hovertemplate": "<b>%{text}</b><br>%{customdata}<extra></extra>",
        "marker": {"size": 9, "symbol": symbol},
    }


def _place(row: FamilyRow) -> tuple[float, float]:
    assert row.speed is not None
    return round(row.speed.latency_ms, 4), round(_accuracy(row).value, 5)


def _accuracy(row: FamilyRow) -> Accuracy:
    assert row.accuracy is not None
    return row.accuracy


def _gap(high: float, low: float) -> float:
    return round(max(high - low, 0.0), 5)


def _words(row: FamilyRow) -> str:
    assert row.speed is not None
    facts = [milliseconds(row.speed.latency_ms), share(_accuracy(row).value), size(row.variant.artifact.size_bytes)]
    return " · ".join(facts) + (f"<br>{row.reason}" if row.standing == "dominated" else "")
