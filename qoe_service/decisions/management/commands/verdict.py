"""Prints whether the bandit is worth it."""

from __future__ import annotations

import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils import timezone

from qoe_service.catalogue.models import Application
from qoe_service.decisions.evaluation import ApplicationVerdict, verdict

ROWS = (
    ("mean QoE now", "qoe"),
    ("uniform choice", "uniform"),
    ("best fixed action", "best_fixed"),
    ("lift over uniform", "lift_over_uniform"),
    ("lift over best fixed", "lift_over_best_fixed"),
)


class Command(BaseCommand):
    """``manage.py verdict APP [--json]``."""

    help = "Mean QoE of an application against uniform choice and against the best fixed action."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("application")
        parser.add_argument("--json", action="store_true", help="one line of JSON")

    def handle(self, *_args: Any, **options: Any) -> None:
        application = Application.objects.filter(pk=options["application"]).first()
        if application is None:
            raise CommandError(f"no application {options['application']!r}")
        found = verdict(application=application, now=timezone.now())
        self.stdout.write(json.dumps(found.as_json()) if options["json"] else "\n".join(_lines(found)))


def _lines(found: ApplicationVerdict) -> list[str]:
    share = found.verdict.slo_violation_share
    missed = "unknown" if share is None else f"{share:.1%}"
    head = f"{found.application}: {found.verdict.decisions} decisions on {found.verdict.devices} devices"
    lines = [f"{head}, {found.feedback} feedback, SLO violated in {missed} of leases"]
    lines += [f"  {title:<22}{_estimate(found, name)}" for title, name in ROWS]
    if found.verdict.best_fixed_action:
        lines.append(f"  the best fixed action is {found.verdict.best_fixed_action}")
    return lines


def _estimate(found: ApplicationVerdict, name: str) -> str:
    estimate = found.estimate(name)
    if estimate is None:
        reason = found.verdict.reasons.get(name, "the interval is not bounded")
        return f"not enough evidence: {reason}"
    sign = "+" if name.startswith("lift") else ""
    interval = f"95 % {estimate.low:{sign}.3f} to {estimate.high:{sign}.3f} ({estimate.kind})"
    return f"{estimate.mean:{sign}.3f}  {interval}, effective sample {estimate.effective_sample_size:.0f}"
