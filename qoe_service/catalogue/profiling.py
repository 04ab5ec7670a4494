"""Profiling jobs: which variant an idle device measures next, and what becomes of what it reports.

A job is offered to one device at a time, in its desired document. A device that has not measured it after ``LEASE``
loses it; after trouble it rests for ``RETRY_AFTER``, and after trouble ``MAX_FAILURES`` times it ends, with the reason.
Numbers are kept only from the device that the job was offered to, and for its own instruction sets.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from datetime import datetime, timedelta
from typing import NamedTuple

from django.db import transaction
from django.db.models import F, Q, QuerySet

from device_agents.wire import AccuracyReport, ProfileReport, ProfilingResult, ProfilingState
from qoe_service.catalogue import profiles, samples
from qoe_service.catalogue.evaluation import wilson_interval
from qoe_service.catalogue.exploration import place_of
from qoe_service.catalogue.models import IsaAccuracy, ProfilingJob, Variant
from qoe_service.catalogue.places import Place, isa_of
from qoe_service.errors import Conflict, InvalidInput, NotFound
from qoe_service.fleet import audit
from qoe_service.fleet.models import Device

log = logging.getLogger(__name__)

LEASE = timedelta(minutes=15)
RETRY_AFTER = timedelta(minutes=5)
MAX_FAILURES = 3
THREADS = 1
State = ProfilingJob.State


class _Numbers(NamedTuple):
    """A share with its interval."""

    value: float
    low: float
    high: float


def attend(*, device: Device, report: ProfilingState | None, applications: Collection[str], now: datetime) -> bool:
    """Take in what a check-in says of profiling, and find the device something to measure if it is idle.

    ``applications`` are those that the device runs. Whether the device's desired document is another now. Raises
    InvalidInput for a result that makes no sense.
    """
    if report is None:
        return False
    with transaction.atomic():
        ended = [_take(device, result, f"profiling.results.{n}", now) for n, result in enumerate(report.results)]
        job = offered_to(device)
        if job is not None:
            return _release_if_overdue(job, now)
        # A job that was cancelled, or went to another device, must leave the document.
        is_stale = report.job_id is not None
        return (report.is_idle and _offer(device, applications, now)) or is_stale or any(ended)


def offered_to(device: Device) -> ProfilingJob | None:
    """The job that the device's desired document names."""
    rows = ProfilingJob.objects.filter(device=device, state=State.RUNNING)
    # Asked at every look, and nearly always there is none: then the joins would cost most of the answer.
    if not rows.exists():
        return None
    return rows.select_related("variant__artifact", "variant__application").first()


def get(job_id: int) -> ProfilingJob:
    """The profiling job of this number. Raises NotFound."""
    job = ProfilingJob.objects.select_related("variant", "device").filter(pk=job_id).first()
    if job is None:
        raise NotFound(f"no profiling job {job_id}", field="job")
    return job


def cancel(*, job_id: int, actor: str, now: datetime) -> bool:
    """Stop a job; its device hears of it at its next check-in. False when it has ended already."""
    with transaction.atomic():
        rows = ProfilingJob.objects.filter(pk=get(job_id).pk, state__in=ProfilingJob.OPEN_STATES)
        if not rows.update(state=State.CANCELLED, finished_at=now):
            return False
        audit.record(actor=actor, verb="cancel_profiling", subject=f"profiling-job:{job_id}", now=now)
    return True


def run_again(*, job_id: int, actor: str, now: datetime) -> ProfilingJob:
    """Let an ended job be offered once more: measured or not, it is measured anew. Raises NotFound, Conflict."""
    with transaction.atomic():
        job = get(job_id)
        ended = ProfilingJob.objects.filter(pk=job.pk).exclude(state__in=ProfilingJob.OPEN_STATES)
        if not ended.update(state=State.QUEUED, failures=0, error="", finished_at=None, heartbeat_at=None, device=None):
            raise Conflict(f"profiling job {job_id} is {job.state}; it runs again once it has ended", field="job")
        audit.record(actor=actor, verb="measure_again", subject=f"profiling-job:{job_id}", now=now)
    return get(job_id)


# -- offers ------------------------------------------------------------------------------------------------------------


def _release_if_overdue(job: ProfilingJob, now: datetime) -> bool:
    """A device that did not come to measuring in time loses the job; it may be offered it again. Whether it lost it."""
    overdue = ProfilingJob.objects.filter(pk=job.pk, attempts=job.attempts, heartbeat_at__lt=now - LEASE)
    return bool(overdue.filter(state=State.RUNNING).update(state=State.QUEUED, device=None))


def _offer(device: Device, applications: Collection[str], now: datetime) -> bool:
    place = place_of(device)
    if not place.isa:
        return False
    samples.queue_missing(applications=applications, now=now)
    for variant in _waiting(place, applications):
        key = {"variant": variant, "device_class": place.device_class, "isa": place.isa}
        job, _ = ProfilingJob.objects.get_or_create(**key, defaults={"created_at": now})
        claimed = ProfilingJob.objects.filter(_free(now), pk=job.pk).update(
            state=State.RUNNING,
            device=device,
            attempts=F("attempts") + 1,
            heartbeat_at=now,
            samples_digest=variant.application.samples_id,
        )
        if claimed:
            log.info("profiling offered device=%s variant=%s job=%s", device.pk, variant.artifact_id, job.pk)
            return True
    return False


def _waiting(place: Place, applications: Collection[str]) -> Iterator[Variant]:
    """What may be chosen, has samples, and was not measured at this place; or is to be measured again."""
    rows = Variant.objects.filter(application__in=applications, accuracy__isnull=False, retired_at=None)
    rows = rows.exclude(application__samples=None).filter(application__samples_from=F("application__dataset"))
    asked = ProfilingJob.objects.filter(device_class=place.device_class, isa=place.isa)
    again = set(asked.filter(state=State.QUEUED).values_list("variant_id", flat=True))
    timed = set(profiles.at(place).filter(threads=THREADS).values_list("variant_id", flat=True))
    known = IsaAccuracy.objects.filter(isa=place.isa, samples_digest=F("variant__application__samples"))
    judged = set(known.values_list("variant_id", flat=True))
    for row in rows.select_related("application").order_by("application", "pk"):
        if row.pk in again or row.pk not in timed or (row.accuracy_isa != place.isa and row.pk not in judged):
            yield row


def _free(now: datetime) -> Q:
    """Jobs that a device may be given: new, rested after a failure, lost by their device, or needed once more."""
    rested = Q(failures=0) | Q(heartbeat_at=None) | Q(heartbeat_at__lt=now - RETRY_AFTER)
    lost = Q(state=State.RUNNING) & (Q(heartbeat_at__lt=now - LEASE) | Q(device=None))
    return (Q(state=State.QUEUED) & rested) | lost | Q(state=State.DONE)


# -- results -----------------------------------------------------------------------------------------------------------


def _take(device: Device, result: ProfilingResult, field: str, now: datetime) -> bool:
    """Whether this ended the job. What belongs to no job of this device is passed over: it may have come too late."""
    job = offered_to(device)
    if job is None or job.offer_id != result.job_id:
        return False
    mine = ProfilingJob.objects.filter(pk=job.pk, state=State.RUNNING, attempts=job.attempts)
    measured_with = isa_of({"architecture": result.architecture, "isa": result.isa})
    if result.profile is None:
        return _fail(mine, job, result.error or "the device gave no reason", now)
    _check(result.profile, job, f"{field}.profile")
    if measured_with != job.isa:
        return _fail(mine, job, f"measured with {measured_with or 'unknown instruction sets'}, not {job.isa}", now)
    if result.accuracy is None:
        raise InvalidInput("is missing", field=f"{field}.accuracy")
    if job.samples_digest != job.variant.application.samples_id:
        return _fail(mine, job, "the samples changed meanwhile", now)
    numbers = _numbers(result.accuracy, job, f"{field}.accuracy")
    profiles.record_reports(device=device, reports=[result.profile], now=now)
    _keep_accuracy(job, device, result.accuracy, numbers, now)
    mine.update(state=State.DONE, progress=1, failures=0, error="", finished_at=now)
    log.info("profiled device=%s variant=%s isa=%r", device.pk, job.variant.artifact_id, job.isa)
    return True


def _fail(mine: QuerySet[ProfilingJob], job: ProfilingJob, why: str, now: datetime) -> bool:
    is_over = job.failures + 1 >= MAX_FAILURES
    mine.update(
        state=State.FAILED if is_over else State.QUEUED,
        failures=job.failures + 1,
        error=why,
        heartbeat_at=now,
        finished_at=now if is_over else None,
    )
    log.warning("not profiled job=%s device=%s reason=%r", job.pk, job.device_id, why)
    return True


def _check(profile: ProfileReport, job: ProfilingJob, field: str) -> None:
    if profile.digest != job.variant.artifact_id:
        raise InvalidInput("is not the variant that was to be measured", field=f"{field}.digest")
    if profile.threads != THREADS:
        raise InvalidInput(f"must be {THREADS}, as the job asked", field=f"{field}.threads")
    if profile.a_ms + profile.b_ms <= 0:
        raise InvalidInput("and b_ms are both 0; no model runs in no time", field=f"{field}.a_ms")


def _numbers(report: AccuracyReport, job: ProfilingJob, field: str) -> _Numbers:
    application = job.variant.application
    if report.kind != application.samples_kind:
        raise InvalidInput(f"must be {application.samples_kind}, as the samples are", field=f"{field}.kind")
    if report.samples != application.samples_count:
        raise InvalidInput(f"must be {application.samples_count}, as many as were sent", field=f"{field}.samples")
    if report.correct is not None:
        if report.correct > report.samples:
            raise InvalidInput(f"must be at most {report.samples}, the number of samples", field=f"{field}.correct")
        return _Numbers(report.correct / report.samples, *wilson_interval(report.correct, report.samples))
    if report.kind == "top-1":
        raise InvalidInput("is missing", field=f"{field}.correct")
    if not report.low <= report.value <= report.high:
        raise InvalidInput("must lie between low and high", field=f"{field}.value")
    return _Numbers(report.value, report.low, report.high)


def _keep_accuracy(job: ProfilingJob, device: Device, report: AccuracyReport, numbers: _Numbers, now: datetime) -> None:
    measured = {
        **numbers._asdict(),
        "kind": report.kind,
        "samples": report.samples,
        "samples_digest": job.samples_digest,
        "device": device,
        "device_class": job.device_class,
        "measured_at": now,
    }
    IsaAccuracy.objects.update_or_create(variant=job.variant, isa=job.isa, defaults=measured)
