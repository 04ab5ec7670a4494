"""REST for operators: what was measured where, profiling jobs, and the gate before classes of devices."""

# ruff: noqa: ARG001 - ninja hands the request to every endpoint

from __future__ import annotations

from datetime import datetime

from django.http import HttpRequest
from django.utils import timezone
from ninja import Router, Schema, Status
from ninja.security import SessionAuth

from device_agents.wire import Name
from qoe_service.catalogue import applications, exploration, profiling, retirement, roles
from qoe_service.catalogue.intake_api import VariantName
from qoe_service.catalogue.models import IsaAccuracy, Profile, ProfilingJob
from qoe_service.errors import Conflict

router = Router(tags=["catalogue"], auth=SessionAuth())


class ProfileOut(Schema):
    """What one device (the server, where it is null) measured of a variant's speed: n rows take a_ms * n + b_ms."""

    variant: str
    device: str | None
    device_class: str | None
    isa: str
    threads: int
    a_ms: float
    b_ms: float
    load_ms: float
    memory_bytes: int
    cpu_ms_per_row: float | None
    measured_at: datetime

    @classmethod
    def of(cls, row: Profile) -> ProfileOut:
        """A row as the API shows it."""
        own = {name: getattr(row, name) for name in cls.model_fields if hasattr(row, name)}
        device_class = row.device.device_class if row.device else None
        return cls(**{**own, "variant": row.variant.name, "device": row.device_id, "device_class": device_class})


class AccuracyOut(Schema):
    """How accurate a variant is on a device's instruction sets, with its 95 % interval."""

    variant: str
    isa: str
    device: str | None
    device_class: str
    kind: str
    value: float
    low: float
    high: float
    samples: int
    measured_at: datetime

    @classmethod
    def of(cls, row: IsaAccuracy) -> AccuracyOut:
        """A row as the API shows it."""
        own = {name: getattr(row, name) for name in cls.model_fields}
        return cls(**{**own, "variant": row.variant.name, "device": row.device_id})


class MeasurementsOut(Schema):
    """All that was measured; what is in neither list was not measured."""

    profiles: list[ProfileOut]
    accuracies: list[AccuracyOut]


class ProfilingJobOut(Schema):
    """Where a profiling job stands, and which device has it."""

    id: int
    variant: str
    device_class: str
    isa: str
    device: str | None
    state: str
    failures: int
    error: str
    created_at: datetime
    finished_at: datetime | None

    @classmethod
    def of(cls, job: ProfilingJob) -> ProfilingJobOut:
        """A row as the API shows it."""
        own = {name: getattr(job, name) for name in cls.model_fields}
        return cls(**{**own, "variant": job.variant.name, "device": job.device_id})


@router.get("/applications/{name}/measurements", response=MeasurementsOut)
def list_measurements(request: HttpRequest, name: Name) -> MeasurementsOut:
    """What was measured of an application's variants, by which device, with which instruction sets."""
    application = applications.get(name)
    profiles = Profile.objects.filter(variant__application=application).select_related("variant", "device")
    known = IsaAccuracy.objects.filter(variant__application=application, samples_digest=application.samples_id or "")
    return MeasurementsOut(
        profiles=[ProfileOut.of(row) for row in profiles],
        accuracies=[AccuracyOut.of(row) for row in known.select_related("variant")],
    )


@router.get("/applications/{name}/profiling-jobs", response=list[ProfilingJobOut])
def list_profiling_jobs(request: HttpRequest, name: Name) -> list[ProfilingJobOut]:
    """What idle devices measure, measured, or could not measure."""
    jobs = ProfilingJob.objects.filter(variant__application=applications.get(name)).select_related("variant")
    return [ProfilingJobOut.of(job) for job in jobs]


@router.post("/profiling-jobs/{job_id}/cancel", response=ProfilingJobOut)
def cancel_profiling_job(request: HttpRequest, job_id: int) -> ProfilingJobOut:
    """Stop it; its device hears of it at its next check-in."""
    roles.require(request.user, roles.UPLOAD)
    if not profiling.cancel(job_id=job_id, actor=request.user.get_username(), now=timezone.now()):
        raise Conflict(f"profiling job {job_id} has ended already", field="job")
    return ProfilingJobOut.of(profiling.get(job_id))


@router.post("/profiling-jobs/{job_id}/run-again", response=ProfilingJobOut)
def run_profiling_job_again(request: HttpRequest, job_id: int) -> ProfilingJobOut:
    """Let the next idle device of its class measure anew."""
    roles.require(request.user, roles.UPLOAD)
    return ProfilingJobOut.of(profiling.run_again(job_id=job_id, actor=request.user.get_username(), now=timezone.now()))


@router.post("/applications/{name}/variants/{variant}/explore", response={204: None})
def explore_variant(request: HttpRequest, name: Name, variant: VariantName) -> Status[None]:
    """Let devices try a variant that nobody of their class has measured."""
    return _allow(request, name, variant, is_allowed=True)


@router.post("/applications/{name}/variants/{variant}/measure-first", response={204: None})
def measure_variant_first(request: HttpRequest, name: Name, variant: VariantName) -> Status[None]:
    """Give a variant only to classes of devices that have measured it, as is usual."""
    return _allow(request, name, variant, is_allowed=False)


def _allow(request: HttpRequest, name: str, variant: str, *, is_allowed: bool) -> Status[None]:
    roles.require(request.user, roles.BAN)
    found = retirement.get(applications.get(name), variant)
    exploration.allow(variant=found, is_allowed=is_allowed, actor=request.user.get_username(), now=timezone.now())
    return Status(204, None)
