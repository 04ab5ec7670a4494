"""The policy that decides: loaded once per process, checked, and replaced when a newer version appears. Also bans.

A version that cannot be trusted is passed over for the one before it. When none can be, the baseline decides; before
the first version, decisions are uniform.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.conf import settings
from django.db.models import Q

from qoe_service.catalogue.models import Application
from qoe_service.decisions.lifecycle import OPEN
from qoe_service.decisions.models import Ban, Decision, Learner, PolicyVersion
from qoe_service.errors import NotFound
from qoe_service.fleet.models import Device
from selector.baselines import BaselinePolicy
from selector.errors import CorruptPolicy
from selector.policy import Policy
from selector.vw import VowpalWabbitPolicy

logger = logging.getLogger(__name__)
VERSIONS_TRIED = 5

# A policy is not thread-safe: whoever asks one holds this.
in_use = threading.RLock()


@dataclass(frozen=True, slots=True)
class Champion:
    """The policy that decides. Number 0 without a learnt one: the baseline, or uniform choice before the first version.

    ``problem`` says what was passed over, and why.
    """

    number: int
    policy: Policy | None
    best_fixed: str | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Newest:
    number: int
    sha256: str


@dataclass(frozen=True, slots=True)
class FirstPolicy:
    """How far away the first policy of an application is."""

    missing_events: int
    seconds: float | None


_champions: dict[str, tuple[_Newest, Champion]] = {}
_problems: dict[str, str] = {}


def champion(application: Application) -> Champion:
    """The newest policy that can be trusted. Costs one small query while nothing changes."""
    row = (
        PolicyVersion.objects.filter(application=application)
        .order_by("-number")
        .values_list("number", "sha256")
        .first()
    )
    if row is None:
        return Champion(0, None, None)
    newest = _Newest(*row)
    with in_use:
        known = _champions.get(application.pk)
        if known is None or known[0] != newest:
            known = _champions[application.pk] = (newest, _load(application))
    return known[1]


def forget() -> None:
    """Drop what this process has loaded, as a restart would."""
    with in_use:
        _champions.clear()
        _problems.clear()


def baseline(problem: str) -> Champion:
    """What decides while no learnt policy can."""
    return Champion(0, BaselinePolicy(), None, problem)


def load(version: PolicyVersion) -> VowpalWabbitPolicy:
    """The policy of this version; raises CorruptPolicy unless bytes, digest and probes agree."""
    if version.state is None:
        raise CorruptPolicy("bytes were pruned")
    return VowpalWabbitPolicy.from_bytes(bytes(version.state), digest=version.sha256, probes=version.probes)


def _load(application: Application) -> Champion:
    problem = ""
    versions = PolicyVersion.objects.filter(application=application, state__isnull=False).order_by("-number")
    for version in versions[:VERSIONS_TRIED]:
        try:
            return Champion(version.number, load(version), version.best_fixed or None, problem)
        except CorruptPolicy as error:
            problem = problem or f"policy {application.pk} v{version.number} {error}"
            logger.error("policy refused application=%s number=%d reason=%s", application.pk, version.number, error)
    return baseline(problem or f"policy {application.pk} has no bytes")


def note_failure(application: Application, problem: str) -> None:
    """A policy that loaded, but gave no distribution: shown until its successor loads."""
    _problems[application.pk] = f"{champion(application).number}:{problem}"
    logger.error("policy failed application=%s reason=%s", application.pk, problem)


def problems() -> list[str]:
    """What is wrong with the policies, as this process sees it; empty when all is well. For readiness checks."""
    found = []
    for application in Application.objects.all():
        current = champion(application)
        failed_number, _, failure = _problems.get(application.pk, "").partition(":")
        if current.problem:
            found.append(current.problem)
        if failure and failed_number == str(current.number):
            found.append(f"policy {application.pk} v{current.number} {failure}")
    return found


def first_policy_expected(*, application: Application, now: datetime) -> FirstPolicy | None:
    """How many rewards are missing until the first policy, and a guess when; None once there is one.

    The guess: every running lease becomes one reward per round of lease, waiting time and rescan.
    """
    if PolicyVersion.objects.filter(application=application).exists():
        return None
    joined = Learner.objects.filter(application=application).values_list("last_event_number", flat=True).first() or 0
    missing = max(settings.FIRST_POLICY_AFTER - joined, 0)
    running = list(
        Decision.objects.filter(application=application, state__in=OPEN).values_list("device_id", "decided_at")
    )
    if not running:
        return FirstPolicy(missing, None)
    rounds = -(-missing // len({device for device, _ in running}))
    round_s = application.lease_s + application.feedback_wait_s + settings.RESCAN_S
    elapsed_s = (now - max(decided_at for _, decided_at in running)).total_seconds()
    return FirstPolicy(missing, max(rounds * round_s - min(elapsed_s, round_s), 1.0))


def ban(
    *,
    application: Application,
    device: Device | None,
    variant_digest: str,
    reason: str,
    now: datetime,
    ttl_s: float | None = None,
) -> Ban:
    """Forbid a variant on one device, or on all when there is none, for BAN_TTL_S unless given otherwise."""
    expires_at = now + timedelta(seconds=settings.BAN_TTL_S if ttl_s is None else ttl_s)
    return Ban.objects.create(
        application=application,
        device=device,
        variant_digest=variant_digest,
        reason=reason[:200],
        created_at=now,
        expires_at=expires_at,
    )


def lift_ban(*, ban_id: int, now: datetime) -> None:
    """Allow the variant again. Lifting twice changes nothing."""
    if (
        not Ban.objects.filter(_live_at(now), pk=ban_id).update(expires_at=now)
        and not Ban.objects.filter(pk=ban_id).exists()
    ):
        raise NotFound(f"no ban {ban_id}", field="ban_id")


def bans_of(*, application: Application, device: Device, now: datetime) -> dict[str, str]:
    """Reasons by digest of the variants that may not run on this device now."""
    live = Ban.objects.filter(_live_at(now), Q(device=device) | Q(device=None), application=application)
    return dict(live.order_by("pk").values_list("variant_digest", "reason"))


def _live_at(now: datetime) -> Q:
    return Q(expires_at=None) | Q(expires_at__gt=now)
