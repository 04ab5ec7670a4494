"""Reads what the Catalogue page shows: the family of an application, what is measured where, uploads and jobs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from django.db.models import Q

from qoe_service.catalogue import pareto
from qoe_service.catalogue.accuracies import Accuracies, Accuracy
from qoe_service.catalogue.models import Application, Job, Upload, Variant
from qoe_service.catalogue.passes import FAMILY, WHOLE_FAMILY
from qoe_service.catalogue.places import Place
from qoe_service.decisions.models import Ban
from qoe_service.rollouts.models import Assignment
from web.measurement_rows import Measurement, Measurements, Speed

_JOBS, _UPLOADS = 12, 4


class Cut(NamedTuple):
    """A place where a variant can be cut in two: what passes for one row, and the share of the work before it."""

    tensor: str
    bytes: int
    dtype: str
    work_before: float


@dataclass(frozen=True, slots=True)
class FamilyRow:
    """One variant in the light of one device class."""

    variant: Variant
    here: Measurement
    everywhere: Sequence[Measurement]
    standing: str
    reason: str
    ban: Ban | None
    devices_running: int
    is_baseline: bool
    size_ratio: float | None

    @property
    def speed(self) -> Speed | None:
        """One request at the place that is looked at."""
        return self.here.speed

    @property
    def accuracy(self) -> Accuracy | None:
        """What was measured on the instruction sets of that place, and on no others."""
        return self.here.accuracy

    @property
    def made_by(self) -> str:
        """How it came to be, in words."""
        if self.variant.compression_pass:
            return self.variant.compression_pass.replace("_", " ")
        return "trained elsewhere" if self.variant.base_id else "imported"

    @property
    def accuracy_kind(self) -> str:
        """What the accuracy is a share of; empty for right answers, which go without saying."""
        words = {"agreement": "agreement with the base model", "regression": "variance explained"}
        return words.get(self.variant.accuracy_kind, "")

    @property
    def is_of_former_data(self) -> bool:
        """Whether the accuracy shown is the server's, on data that were replaced."""
        is_servers = self.accuracy is not None and self.accuracy.device is None
        return is_servers and self.variant.is_judged_by_former_data

    @property
    def cuts(self) -> list[Cut]:
        """In the order of the model."""
        return [
            Cut(
                each["tensor"],
                each["bytes"],
                each["dtype"],
                each["flops_before"] / (each["flops_before"] + each["flops_after"]),
            )
            for each in self.variant.details.get("cuts", [])
        ]

    @property
    def provenance(self) -> str:
        """All that is needed to build it again, as text."""
        return json.dumps(self.variant.provenance, indent=2, sort_keys=True)


@dataclass(frozen=True, slots=True)
class Family:
    """The live parts of the page."""

    device_class: str
    classes: Sequence[str]
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

    measurements: Measurements
    place: Place
    standings: Mapping[str, tuple[str, str]]
    bans: Mapping[str, Ban]
    running: Counter[str]


def family(*, application: Application, device_class: str, now: datetime) -> Family:
    """The family as one device class sees it (the server, where there is none of that name), in a fixed number of
    queries."""
    variants = list(application.variants.select_related("artifact", "base__artifact"))
    measurements = Measurements(application)
    place = measurements.place(device_class)
    live_bans = Ban.objects.filter(Q(expires_at=None) | Q(expires_at__gt=now), application=application, device=None)
    seen = _Seen(
        measurements=measurements,
        place=place,
        standings=_standings(application, place, measurements.accuracies),
        bans={ban.variant_digest: ban for ban in live_bans},
        running=Counter(Assignment.objects.filter(application=application).values_list("reported_digest", flat=True)),
    )
    rows = [_row(each, application, seen) for each in variants]
    jobs = application.jobs.select_related("base", "result")
    return Family(
        device_class=measurements.labels[place],
        classes=list(measurements.labels.values()),
        rows=sorted((row for row in rows if row.variant.retired_at is None), key=_order),
        retired=[row for row in rows if row.variant.retired_at is not None],
        jobs=sorted(jobs.order_by("-id")[:_JOBS], key=lambda job: (not job.is_open, -job.pk)),
        waiting_jobs=jobs.filter(state=Job.State.QUEUED).count(),
        uploads=list(application.uploads.select_related("result")[:_UPLOADS]),
    )


def _row(variant: Variant, application: Application, seen: _Seen) -> FamilyRow:
    here = seen.measurements.at(seen.place, variant)
    standing, reason = seen.standings.get(variant.artifact_id, ("unmeasured", _why_unmeasured(here)))
    base_bytes = variant.base.artifact.size_bytes if variant.base else None
    return FamilyRow(
        variant=variant,
        here=here,
        everywhere=seen.measurements.of(variant),
        standing="retired" if variant.retired_at else standing,
        reason=reason,
        ban=seen.bans.get(variant.artifact_id),
        devices_running=seen.running[variant.artifact_id],
        is_baseline=variant.artifact_id == application.baseline_digest,
        size_ratio=variant.artifact.size_bytes / base_bytes if base_bytes else None,
    )


def _why_unmeasured(here: Measurement) -> str:
    if here.speed is not None:
        return f"accuracy not measured on {here.place.isa or 'its instruction sets'}"
    return f"not measured on {here.label}"


def _standings(application: Application, place: Place, known: Accuracies) -> dict[str, tuple[str, str]]:
    """By digest, for what was measured at this place."""
    measured = pareto.fronts(application, known).get(place, [])
    return {each.point.digest: ("front" if each.is_on_front else "dominated", each.reason) for each in measured}


def _order(row: FamilyRow) -> tuple[int, float]:
    places = {"front": 0, "dominated": 1}
    return places.get(row.standing, 2), row.speed.latency_ms if row.speed else float(row.variant.artifact.size_bytes)


def passes() -> list[str]:
    """What the upload form offers."""
    return [WHOLE_FAMILY, *FAMILY]
