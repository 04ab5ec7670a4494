"""The verdict line as the console words and draws it; the numbers are those of ``decisions.evaluation``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from django.utils.safestring import SafeString

from qoe_service.catalogue.models import Application, Variant
from qoe_service.decisions.evaluation import ApplicationVerdict, verdict
from selector.estimators import Estimate
from web import drawings, formatting

_INTERVALS = {"fixed_n": "95 %, for one look", "anytime": "95 %, at every look"}
_LEAST_REACH = 0.1


@dataclass(frozen=True, slots=True)
class Comparison:
    """This system against one reference. Without a lift there is not enough evidence, and ``why_not`` says of what."""

    against: str
    detail: str
    lift: Estimate | None
    reach: float
    why_not: str

    @property
    def words(self) -> str:
        """Which way it points, for those who do not see the colour."""
        if self.lift is None:
            return ""
        if self.lift.low > 0:
            return "better"
        return "worse" if self.lift.high < 0 else "no clear difference yet"

    @property
    def tone(self) -> str:
        """ok, bad or open."""
        return {"better": "ok", "worse": "bad"}.get(self.words, "open")

    @property
    def drawing(self) -> SafeString:
        """The interval; both comparisons of a line have the same axis."""
        assert self.lift is not None
        return drawings.interval(self.lift.mean, self.lift.low, self.lift.high, reach=self.reach)


@dataclass(frozen=True, slots=True)
class VerdictLine:
    """Mean QoE now, and the comparisons."""

    mean: float | None
    interval: Estimate | None
    comparisons: Sequence[Comparison]
    slo_violation_share: float | None
    decisions: int
    devices: int
    feedback: int

    @property
    def interval_words(self) -> str:
        """What the intervals promise."""
        known = [each.lift for each in self.comparisons if each.lift] or [each for each in [self.interval] if each]
        return _INTERVALS.get(known[0].kind, known[0].kind) if known else ""


def verdict_line(*, application: Application, now: datetime) -> VerdictLine:
    """The line of one application."""
    found = verdict(application=application, now=now)
    lifts = [found.estimate("lift_over_best_fixed"), found.estimate("lift_over_uniform")]
    reach = max([_LEAST_REACH, *(max(abs(each.low), abs(each.high)) for each in lifts if each)])
    fixed = _action_name(application, found.verdict.best_fixed_action)
    details = [("the best fixed action", fixed, "best_fixed"), ("uniform choice", "", "uniform")]
    return VerdictLine(
        mean=found.verdict.qoe.mean if found.verdict.qoe else None,
        interval=found.estimate("qoe"),
        comparisons=[
            Comparison(against, detail, lift, reach, _why_not(found, f"lift_over_{reference}"))
            for (against, detail, reference), lift in zip(details, lifts, strict=True)
        ],
        slo_violation_share=found.verdict.slo_violation_share,
        decisions=found.verdict.decisions,
        devices=found.verdict.devices,
        feedback=found.feedback,
    )


def _why_not(found: ApplicationVerdict, field: str) -> str:
    return found.verdict.reasons.get(field) or found.verdict.reason or "the interval is not bounded yet"


def _action_name(application: Application, key: str | None) -> str:
    """The variant's name instead of its digest: "digits-wide-int8 b4c1t1"."""
    if key is None:
        return ""
    digest, _, configuration = key.partition("/")
    names = Variant.objects.filter(application=application, artifact__digest__startswith=digest).values_list(
        "name", flat=True
    )
    return f"{names.first() or digest}, {formatting.configuration_key(configuration)}"
