"""The life of a compression job as a row: queued, claimed, kept alive, ended. What a job does is not known here."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import BooleanField, ExpressionWrapper, F, Q

from qoe_service.catalogue.evaluation import Measured
from qoe_service.catalogue.models import Job, Variant
from qoe_service.errors import NotFound

STALE_AFTER = timedelta(seconds=15)
MAX_ATTEMPTS = 3
ACCURACY = "accuracy"  # stands where other jobs name their pass
ENDED_WITHOUT_RESULT = (Job.State.FAILED, Job.State.CANCELLED, Job.State.REFUSED)


def queue(*, base: Variant, compression_pass: str, parameters: dict[str, Any], now: datetime) -> Job:
    """Ask for a pass. Asking again changes nothing while it waits, runs or is done, and starts over otherwise."""
    same = {"base": base, "compression_pass": compression_pass, "parameters": parameters}
    with transaction.atomic():
        # a new row, not a reset one: a runner that outlived its cancelled job must not recognise it
        Job.objects.filter(**same, state__in=ENDED_WITHOUT_RESULT).delete()
        job, _ = Job.objects.get_or_create(**same, defaults={"application": base.application, "created_at": now})
    return job


def queue_accuracy(*, variant: Variant, measured: Measured, now: datetime) -> None:
    """Ask for the accuracy on all held-out data, where only a part was looked at so far."""
    if measured.is_first_look:
        parameters = {"dataset": variant.application.dataset_id}
        queue(base=variant, compression_pass=ACCURACY, parameters=parameters, now=now)


def runnable(*, now: datetime) -> list[int]:
    """Ids of jobs that may start now, oldest first, refinements last. Gives up jobs whose runners died too often."""
    dead = Job.objects.filter(_is_stale(now), attempts__gte=MAX_ATTEMPTS)
    dead.update(
        state=Job.State.FAILED, finished_at=now, error=f"its runner died {MAX_ATTEMPTS} times; see the worker's log"
    )
    free = settings.COMPRESSION_JOBS - _running(now)
    waiting = Job.objects.filter(_is_claimable(now)).order_by(_is_refinement(), "id").values_list("id", flat=True)
    return list(waiting[:free]) if free > 0 else []


def claim(*, job_id: int, now: datetime) -> Job | None:
    """Become the one runner of a job; None when it is not to be had, or enough others run already.

    ``attempts`` is the fencing number: what a former runner still writes is ignored.
    """
    with transaction.atomic():
        if _running(now) >= settings.COMPRESSION_JOBS:
            return None
        claimed = Job.objects.filter(_is_claimable(now), pk=job_id).update(
            state=Job.State.RUNNING, attempts=F("attempts") + 1, heartbeat_at=now, progress=0
        )
        if not claimed:
            return None
        return Job.objects.select_related("application", "base").get(pk=job_id)


def beat(*, job: Job, progress: float, now: datetime) -> bool:
    """Report life and progress. False: the job was cancelled or taken over, so stop."""
    return bool(_mine(job).update(heartbeat_at=now, progress=progress))


def finish(*, job: Job, state: Job.State, now: datetime, error: str = "", result: Variant | None = None) -> bool:
    """End a job, unless it is no longer ours."""
    progress = 1.0 if state == Job.State.DONE else F("progress")
    ended = _mine(job).update(state=state, error=error, result=result, progress=progress, finished_at=now)
    return bool(ended)


def cancel(*, job_id: int, now: datetime) -> bool:
    """Stop a waiting or running job; its runner notices within a second. False when it has ended already."""
    if not Job.objects.filter(pk=job_id).exists():
        raise NotFound(f"no job {job_id}", field="job")
    open_states = (Job.State.QUEUED, Job.State.RUNNING)
    stopped = Job.objects.filter(pk=job_id, state__in=open_states)
    return bool(stopped.update(state=Job.State.CANCELLED, finished_at=now))


def _mine(job: Job) -> Any:
    return Job.objects.filter(pk=job.pk, state=Job.State.RUNNING, attempts=job.attempts)


def _is_stale(now: datetime) -> Q:
    return Q(state=Job.State.RUNNING, heartbeat_at__lt=now - STALE_AFTER)


def _is_claimable(now: datetime) -> Q:
    return Q(state=Job.State.QUEUED) | (_is_stale(now) & Q(attempts__lt=MAX_ATTEMPTS))


def _is_refinement() -> ExpressionWrapper[Q]:
    return ExpressionWrapper(Q(compression_pass=ACCURACY), output_field=BooleanField())


def _running(now: datetime) -> int:
    return Job.objects.filter(state=Job.State.RUNNING, heartbeat_at__gte=now - STALE_AFTER).count()
