"""Reads what the Catalogue page shows: the family of an application, what is measured where, uploads and jobs."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from django.db.models import Q

from qoe_service.catalogue import pareto
from qoe_service.catalogue.models import Application, Job, Profile, Upload, Variant
from qoe_service.catalogue.passes import FAMILY, WHOLE_FAMILY
from qoe_service.decisions.models import Ban
from qoe_service.fleet.models import Device
from qoe_service.rollouts.models import Assignment

_JOBS, _UPLOADS = 12, 4


@dataclass(frozen=True, slots=True)
class Speed:
    """One request of a variant on one device class: the median of its devices, with one thread."""

    device_class: str
    latency_ms: float
    cpu_ms: float | None
    devices: int


@dataclass(frozen=True, slots=True)
class FamilyRow:
    """One variant in the light of one device class."""

    variant: Variant
    speed: Speed | None
    speeds: Sequence[Speed | str]
    standing: str
    reason: str
    ban: Ban | None
    devices_running: int
    is_baseline: bool
    size_ratio: float | None

    @property
    def made_by(self) -> str:
        """How it came to be, in words."""
        if self.variant.compression_pass:
            return self.variant.compression_pass.replace("_", " ")
        return "trained elsewhere" if self.variant.base_id else "imported"

    @property
    def accuracy_kind(self) -> str:
        """What the accuracy is a share of; empty for right answers, which go without saying."""
        kind = str(self.variant.details.get("accuracy", {}).get("kind", ""))
        return {"agreement": "agreement with the base model", "regression": "variance explained"}.get(kind, "")

    @property
    def provenance(self) -> str:
        """All that is needed to build it again, as text."""
        return json.dumps(self.variant.provenance, indent=2, sort_keys=True)


@dataclass(frozen=True, slots=True)
class Family:
    """The live parts of the page."""

    device_class: str
    rows: Sequence[FamilyRow]
    retired: Sequence[FamilyRow]
    jobs: Sequence[Job]
    waiting_jobs: int
    uploads: Sequence[Upload]

    @property
    def on_front(self) -> int:
        """How many variants nothing beats."""
        return sum(row.standing == "front" for row in self.rows)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What all rows are built from."""

    classes: Sequence[str]
    speeds: Mapping[int, Mapping[str, Speed]]
    standings: Mapping[str, tuple[str, str]]
    bans: Mapping[str, Ban]
    running: Counter[str]


def device_classes(application: Application) -> list[str]:
    """The server, then every class of devices that may run the application."""
    known = Device.objects.filter(revoked_at=None).filter(
        Q(assignments__application=application) | Q(profiles__variant__application=application)
    )
    return [pareto.SERVER, *known.order_by("device_class").values_list("device_class", flat=True).distinct()]


def family(*, application: Application, device_class: str, now: datetime) -> Family:
    """The family as one device class sees it, in a fixed number of queries."""
    variants = list(application.variants.select_related("artifact", "base__artifact"))
    speeds = _speeds(application)
    live_bans = Ban.objects.filter(Q(expires_at=None) | Q(expires_at__gt=now), application=application, device=None)
    seen = _Seen(
        classes=device_classes(application),
        speeds=speeds,
        standings=_standings(application, device_class),
        bans={ban.variant_digest: ban for ban in live_bans},
        running=Counter(Assignment.objects.filter(application=application).values_list("reported_digest", flat=True)),
    )
    rows = [_row(each, application, seen, device_class) for each in variants]
    jobs = application.jobs.select_related("base", "result")
    return Family(
        device_class=device_class,
        rows=sorted((row for row in rows if row.variant.retired_at is None), key=_order),
        retired=[row for row in rows if row.variant.retired_at is not None],
        jobs=sorted(jobs.order_by("-id")[:_JOBS], key=lambda job: (not job.is_open, -job.pk)),
        waiting_jobs=jobs.filter(state=Job.State.QUEUED).count(),
        uploads=list(application.uploads.select_related("result")[:_UPLOADS]),
    )


def _row(
    variant: Variant,
    application: Application,
    seen: _Seen,
    device_class: str,
) -> FamilyRow:
    own = seen.speeds.get(variant.pk, {})
    standing, reason = seen.standings.get(variant.artifact_id, ("unmeasured", f"not measured on {device_class}"))
    base_bytes = variant.base.artifact.size_bytes if variant.base else None
    return FamilyRow(
        variant=variant,
        speed=own.get(device_class),
        speeds=[own.get(each, each) for each in seen.classes],
        standing="retired" if variant.retired_at else standing,
        reason=reason,
        ban=seen.bans.get(variant.artifact_id),
        devices_running=seen.running[variant.artifact_id],
        is_baseline=variant.artifact_id == application.baseline_digest,
        size_ratio=variant.artifact.size_bytes / base_bytes if base_bytes else None,
    )


def _speeds(application: Application) -> dict[int, dict[str, Speed]]:
    """By variant and device class: what a request takes with one thread, the median over devices."""
    found: dict[tuple[int, str], list[Profile]] = defaultdict(list)
    rows = Profile.objects.filter(variant__application=application, threads=1).select_related("device")
    for row in rows:
        found[row.variant_id, row.device.device_class if row.device else pareto.SERVER].append(row)
    speeds: dict[int, dict[str, Speed]] = defaultdict(dict)
    for (variant, device_class), group in found.items():
        cpu = [row.cpu_ms_per_row for row in group if row.cpu_ms_per_row is not None]
        speeds[variant][device_class] = Speed(
            device_class=device_class,
            latency_ms=statistics.median(row.a_ms + row.b_ms for row in group),
            cpu_ms=statistics.median(cpu) if cpu else None,
            devices=len(group),
        )
    return speeds


def _standings(application: Application, device_class: str) -> dict[str, tuple[str, str]]:
    """By digest, for what was measured on this class."""
    measured = pareto.fronts(application).get(device_class, [])
    return {each.point.digest: ("front" if each.is_on_front else "dominated", each.reason) for each in measured}


def _order(row: FamilyRow) -> tuple[int, float]:
    places = {"front": 0, "dominated": 1}
    return places.get(row.standing, 2), row.speed.latency_ms if row.speed else float(row.variant.artifact.size_bytes)


def passes() -> list[str]:
    """What the upload form offers."""
    return [WHOLE_FAMILY, *FAMILY]
