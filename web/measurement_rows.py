"""Reads what was measured of a family, and where: by class of devices and instruction sets, with device and date."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from django.db.models import Q

from qoe_service.catalogue import accuracies, pareto
from qoe_service.catalogue.accuracies import Accuracy
from qoe_service.catalogue.exploration import place_of
from qoe_service.catalogue.models import Application, Profile, ProfilingJob, Variant
from qoe_service.catalogue.places import SERVER, Place
from qoe_service.fleet.models import Device


@dataclass(frozen=True, slots=True)
class Speed:
    """One request with one thread: the median of the devices of one place, and which of them measured last."""

    latency_ms: float
    cpu_ms: float | None
    load_ms: float
    memory_bytes: float
    devices: int
    device: Device | None
    measured_at: datetime


@dataclass(frozen=True, slots=True)
class Measurement:
    """What is known of one variant at one place, or what is under way there."""

    label: str
    place: Place
    speed: Speed | None
    accuracy: Accuracy | None
    job: ProfilingJob | None

    @property
    def measuring_on(self) -> Device | None:
        """The device that has the job now."""
        return self.job.device if self.job is not None and self.job.state == ProfilingJob.State.RUNNING else None


class Measurements:
    """All of an application, in a fixed number of queries."""

    def __init__(self, application: Application) -> None:
        self.labels = _labels(application)
        self._speeds = _speeds(application)
        self.accuracies = accuracies.of(application)
        jobs = ProfilingJob.objects.filter(variant__application=application).select_related("device")
        self._jobs = {(job.variant_id, Place(job.device_class, job.isa)): job for job in jobs}

    def of(self, variant: Variant) -> Sequence[Measurement]:
        """One per place, the server first."""
        return [self.at(place, variant) for place in self.labels]

    def at(self, place: Place, variant: Variant) -> Measurement:
        """What is known of a variant at one place."""
        return Measurement(
            label=self.labels[place],
            place=place,
            speed=self._speeds.get((variant.pk, place)),
            accuracy=pareto.accuracy_at(place, variant, self.accuracies),
            job=self._jobs.get((variant.pk, place)),
        )

    def place(self, label: str) -> Place:
        """The place of this name; the server where there is none."""
        return next((place for place, known in self.labels.items() if known == label), SERVER)


def _labels(application: Application) -> Mapping[Place, str]:
    """The server, then every place with devices that may run the application, under the shortest name that tells it."""
    devices = Device.objects.filter(revoked_at=None).filter(
        Q(assignments__application=application) | Q(profiles__variant__application=application)
    )
    places = sorted({place_of(device) for device in devices.only("device_class", "hardware").distinct()})
    kinds = Counter(place.device_class for place in places)
    named = {place: f"{place.device_class} · {place.isa or 'unknown'}" for place in places}
    return {SERVER: "server"} | {
        place: place.device_class if kinds[place.device_class] == 1 else named[place] for place in places
    }


def _speeds(application: Application) -> Mapping[tuple[int, Place], Speed]:
    rows = Profile.objects.filter(variant__application=application, threads=1).select_related("device")
    found: dict[tuple[int, Place], list[Profile]] = defaultdict(list)
    for row in rows:
        found[row.variant_id, pareto.place_of(row)].append(row)
    return {key: _speed(group) for key, group in found.items()}


def _speed(group: Sequence[Profile]) -> Speed:
    cpu = [row.cpu_ms_per_row for row in group if row.cpu_ms_per_row is not None]
    newest = max(group, key=lambda row: row.measured_at)
    return Speed(
        latency_ms=statistics.median(row.a_ms + row.b_ms for row in group),
        cpu_ms=statistics.median(cpu) if cpu else None,
        load_ms=statistics.median(row.load_ms for row in group),
        memory_bytes=statistics.median(row.memory_bytes for row in group),
        devices=len(group),
        device=newest.device,
        measured_at=newest.measured_at,
    )
