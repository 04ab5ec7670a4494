"""Figures for plotly.js as plain dicts; the browser adds the theme. And the same charts in words."""

from __future__ import annotations

from typing import Any

from qoe_service.decisions.evaluation import QoeOverTime
from web.formatting import decimal

_REFERENCES = (
    ("best_fixed", "Best fixed action", "series-fixed", "dash"),
    ("uniform", "Uniform choice", "series-uniform", "dot"),
)


def qoe_figure(curve: QoeOverTime) -> dict[str, Any]:
    """QoE over time with both references as level lines; no data before the first closed lease."""
    layout = {
        "margin": {"l": 48, "r": 16, "t": 8, "b": 40},
        "yaxis": {"title": {"text": "QoE"}, "tickformat": ".2f"},
        "xaxis": {"type": "date", "title": {"text": "UTC"}},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hovermode": "x unified",
    }
    return {"data": [_stretches(curve), _curve(curve), *_references(curve)] if curve.points else [], "layout": layout}


def _stretches(curve: QoeOverTime) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "Each stretch of time",
        "legendrank": 2000,
        "token": "series-policy",
        "x": [point.at.isoformat() for point in curve.points],
        "y": [round(point.mean, 4) for point in curve.points],
        "customdata": [point.count for point in curve.points],
        "marker": {"size": 5, "opacity": 0.35},
        "hovertemplate": "%{y:.3f}, leases: %{customdata}",
    }


def _curve(curve: QoeOverTime) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "This system, running mean",
        "token": "series-policy",
        "x": [point.at.isoformat() for point in curve.points],
        "y": [round(value, 4) for value in running_mean(curve)],
        "line": {"width": 2.5},
        "hovertemplate": "%{y:.3f}",
    }


def running_mean(curve: QoeOverTime, stretches: int = 5) -> list[float]:
    """Mean reward of all leases in the last few stretches, up to each."""
    spans = [curve.points[max(0, end - stretches) : end] for end in range(1, len(curve.points) + 1)]
    return [sum(each.mean * each.count for each in span) / sum(each.count for each in span) for span in spans]


def _references(curve: QoeOverTime) -> list[dict[str, Any]]:
    ends = [curve.points[0].at.isoformat(), curve.points[-1].at.isoformat()]
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "token": token,
            "x": ends,
            "y": [round(getattr(curve, field), 4)] * 2,
            "line": {"width": 1.75, "dash": dash},
            "hovertemplate": "%{y:.3f}",
        }
        for field, name, token, dash in _REFERENCES
        if getattr(curve, field) is not None
    ]


def qoe_words(curve: QoeOverTime) -> str:
    """What the chart shows, in a sentence or two."""
    if not curve.points:
        return ""
    means = running_mean(curve)
    leases = sum(point.count for point in curve.points)
    words = f"The running mean of QoE went from {decimal(means[0])} to {decimal(means[-1])} over {leases} leases."
    references = [
        f"{name.lower()} would have earned {decimal(value)}"
        for field, name, _, _ in _REFERENCES
        if (value := getattr(curve, field)) is not None
    ]
    return f"{words} Over the whole log, {' and '.join(references)}." if references else words
