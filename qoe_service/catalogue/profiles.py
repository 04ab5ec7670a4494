"""How fast variants run: reported by devices, measured on the server, and lent to devices that know no better."""

from __future__ import annotations

import json
import logging
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import NamedTuple

from django.conf import settings
from django.db.models import Q, QuerySet
from prometheus_client import Counter
from pydantic import ValidationError

from device_agents.wire import ProfileReport
from qoe_service.catalogue import artifacts, sandbox
from qoe_service.catalogue.models import Application, Profile, Variant
from qoe_service.catalogue.places import Place, isa_of
from qoe_service.fleet.models import Device
from selector import interactions

log = logging.getLogger(__name__)

MEASURED = ("a_ms", "b_ms", "r2", "load_ms", "memory_bytes", "cpu_ms_per_row", "isa", "measured_at")
CLASS_ROWS = 500
IGNORED = Counter("qoe_profiles_ignored_total", "Profile reports about unknown digests, or of runs that took no time")
# No model runs in no time: the selector refuses such a profile, and with it every ranking that it is part of.
USABLE = Q(a_ms__gt=0) | Q(b_ms__gt=0)


class Recorded(NamedTuple):
    """What became of the reports of one check-in."""

    stored: int
    ignored: int


def record_reports(*, device: Device, reports: Sequence[ProfileReport], now: datetime) -> Recorded:
    """Keep what a device measured, the newest of each variant and thread count; what cannot be used is only counted."""
    usable = [report for report in reports if report.a_ms + report.b_ms > 0]
    newest = {(report.digest, report.threads): report for report in usable}
    variants: dict[str, list[int]] = defaultdict(list)
    digests = {report.digest for report in usable}
    for pk, digest in Variant.objects.filter(artifact__in=digests).values_list("pk", "artifact"):
        variants[digest].append(pk)
    rows = [_row(pk, device, report, now) for report in newest.values() for pk in variants.get(report.digest, ())]
    Profile.objects.bulk_create(
        rows, update_conflicts=True, unique_fields=("variant", "device", "threads"), update_fields=MEASURED
    )
    stored = sum(report.digest in variants for report in usable)
    ignored = len(reports) - stored
    IGNORED.inc(ignored)
    return Recorded(stored, ignored)


def at(place: Place) -> QuerySet[Profile]:
    """What devices of a class measured on these instruction sets."""
    return Profile.objects.filter(USABLE, device__device_class=place.device_class, isa=place.isa)


def measured_at_place(*, application: Application, place: Place) -> frozenset[str]:
    """Digests of the variants that some device of this place has measured."""
    rows = at(place).filter(variant__application=application)
    return frozenset(rows.values_list("variant__artifact_id", flat=True))


def profiles_for(*, device: Device, application: Application) -> tuple[interactions.Profile, ...]:
    """All that is known for a device: its own profiles, the medians of its class on its instruction sets, and the
    server's, which are no more than a first guess."""
    rows = Profile.objects.filter(USABLE, variant__application=application).select_related("variant")
    here = rows.filter(device__device_class=device.device_class, isa=isa_of(device.hardware))
    own, peers = [_value(row, "device") for row in here.filter(device=device)], here.exclude(device=device)
    lent = _medians([_value(row, "class") for row in peers.order_by("-measured_at")[:CLASS_ROWS]])
    server = [_value(row, "server") for row in rows.filter(device=None)]
    return (*own, *lent, *server)


def measure_on_server(*, variant: Variant, now: datetime, watch: sandbox.Watch | None = None) -> None:
    """Measure with one thread, in the sandbox, by the very command that devices run, unless it is measured already.

    A failure is only logged: devices measure for themselves, the server's numbers are a first guess.
    """
    if variant.profiles.filter(device=None).exists():
        return
    try:
        report = _run_profiler(variant.artifact_id, watch)
    except sandbox.Refused as refusal:
        log.warning("variant not measured on the server variant=%s reason=%s", variant.artifact_id, refusal)
        return
    values = {name: getattr(_row(variant.pk, None, report, now), name) for name in MEASURED}
    Profile.objects.update_or_create(variant=variant, device=None, threads=report.threads, defaults=values)
    Variant.objects.filter(pk=variant.pk).update(memory_bytes=report.memory_bytes)


def _run_profiler(digest: str, watch: sandbox.Watch | None) -> ProfileReport:
    with sandbox.opened() as box:
        box.add("model.onnx", artifacts.open_for_reading(digest))
        box.run(settings.BASE_DIR, "device_agents", "profile", "model.onnx", "--json", watch=watch)
        with box.open("stdout") as output:
            return _parsed(output.read(sandbox.MAX_RESULT_BYTES), digest)


def _parsed(output: bytes, digest: str) -> ProfileReport:
    try:
        return ProfileReport.model_validate({**json.loads(output), "digest": digest})
    except (ValueError, TypeError, ValidationError):
        raise sandbox.Refused("its speed could not be measured") from None


def _row(variant: int, device: Device | None, report: ProfileReport, now: datetime) -> Profile:
    return Profile(
        variant_id=variant,
        device=device,
        threads=report.threads,
        a_ms=report.a_ms,
        b_ms=report.b_ms,
        r2=report.r2,
        load_ms=report.load_ms,
        memory_bytes=report.memory_bytes,
        cpu_ms_per_row=report.cpu_ms_per_row,
        isa=isa_of(device.hardware) if device else "",
        measured_at=now,
    )


def _value(row: Profile, source: str) -> interactions.Profile:
    return interactions.Profile(
        digest=row.variant.artifact_id,
        threads=row.threads,
        a_ms=row.a_ms,
        b_ms=row.b_ms,
        memory_bytes=row.memory_bytes,
        source=source,
    )


def _medians(profiles: Iterable[interactions.Profile]) -> list[interactions.Profile]:
    groups: dict[tuple[str, int], list[interactions.Profile]] = defaultdict(list)
    for profile in profiles:
        groups[profile.digest, profile.threads].append(profile)
    return [
        interactions.Profile(
            digest=digest,
            threads=threads,
            a_ms=statistics.median(each.a_ms for each in group),
            b_ms=statistics.median(each.b_ms for each in group),
            memory_bytes=int(statistics.median(each.memory_bytes for each in group)),
            source="class",
        )
        for (digest, threads), group in sorted(groups.items())
    ]
