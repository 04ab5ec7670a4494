"""How attempts to follow a decision ended, and what follows from it: a reward, a ban, a new last good variant."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from device_agents.wire import Outcome, OutcomeReport
from qoe_service.decisions import feedback, policies
from qoe_service.decisions.models import Decision
from qoe_service.fleet.models import Device
from qoe_service.rollouts.models import Assignment, AttemptOutcome

# The attempt failed, which is an outcome with its own reward.
FAILURES = frozenset(
    {
        Outcome.ROLLED_BACK,
        Outcome.NO_SPACE,
        Outcome.VERIFY_FAILED,
        Outcome.DOWNLOAD_FAILED,
        Outcome.INCOMPATIBLE,
    }
)
# Otherwise the variant is to blame and not tried again for BAN_TTL_S. A broken download blames the network: a short ban
# only keeps a device from asking for the same bytes again and again.
DOWNLOAD_BAN_S = 60.0
GOOD = frozenset({Outcome.COMMITTED, Outcome.ALREADY_RUNNING})
PLAUSIBLE = timedelta(days=366)


def record_outcomes(
    *, device: Device, reports: Sequence[OutcomeReport], decisions: dict[str, Decision], now: datetime
) -> None:
    """Keep each outcome once and act on it. ``decisions`` holds the device's own; others are left out."""
    for report in reports:
        decision = decisions.get(report.decision_id)
        if decision is not None and _is_new(device, decision, report, now):
            _follow(device, decision, report, now)


def _is_new(device: Device, decision: Decision, report: OutcomeReport, now: datetime) -> bool:
    _, is_new = AttemptOutcome.objects.get_or_create(
        device=device,
        decision_id=decision.pk,
        outcome=report.outcome,
        defaults={
            "application_id": decision.application_id,
            "reason": report.reason,
            "evidence": report.evidence,
            "download_bytes": report.download_bytes,
            "swap_ms": report.swap_ms,
            "at": _plausible(report.at, now),
        },
    )
    return is_new


def _follow(device: Device, decision: Decision, report: OutcomeReport, now: datetime) -> None:
    if report.outcome in GOOD:
        mine = Assignment.objects.filter(device=device, application=decision.application_id)
        mine.update(last_good_digest=decision.variant_digest)
    if report.outcome in FAILURES:
        why = f"{report.outcome}: {report.reason}"[:200]
        feedback.report_failure(decision_id=decision.pk, device=device, reason=why, now=now)
        policies.ban(
            application=decision.application,
            device=device,
            variant_digest=decision.variant_digest,
            reason=why,
            now=now,
            ttl_s=DOWNLOAD_BAN_S if report.outcome == Outcome.DOWNLOAD_FAILED else None,
        )


def _plausible(at: datetime, now: datetime) -> datetime:
    """The device's time, unless its clock is nonsense."""
    aware = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return aware if abs(aware - now) < PLAUSIBLE else now
