"""The life of compression jobs as rows: queued in order, run one by one, cancelled, run again. A job with ``after``
waits for that job and works on what it made. What a job does is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import BooleanField, ExpressionWrapper, Q

from qoe_service.catalogue import claims, datasets
from qoe_service.catalogue.evaluation import Measured
from qoe_service.catalogue.models import Application, Job, Variant
from qoe_service.catalogue.passes import CompressionPass
from qoe_service.errors import Conflict, NotFound
from qoe_service.fleet import audit

STALE_AFTER, MAX_ATTEMPTS = claims.STALE_AFTER, claims.MAX_ATTEMPTS
ACCURACY, SAMPLES = "accuracy", "samples"  # stand where other jobs name their pass
ENDED_WITHOUT_RESULT = (Job.State.FAILED, Job.State.CANCELLED, Job.State.REFUSED)
WHY_NOT = {
    Job.State.REFUSED: "the pass before it cannot help this model",
    Job.State.FAILED: "the pass before it failed",
    Job.State.CANCELLED: "the pass before it was cancelled",
}


def queue(
    *, base: Variant, compression_pass: str, parameters: dict[str, Any], now: datetime, after: Job | None = None
) -> Job:
    """Ask for a pass. Asking again changes nothing while it waits, runs or is done, and starts over otherwise."""
    same: dict[str, Any] = {"compression_pass": compression_pass, "parameters": parameters, "after": after}
    if after is None:
        same["base"] = base
    with transaction.atomic():
        ended = Job.objects.filter(**same, state__in=ENDED_WITHOUT_RESULT).first()
        if ended is not None:
            return _start_over(ended, now)
        defaults = {"base": base, "application": base.application, "created_at": now}
        job, _ = Job.objects.get_or_create(**same, defaults=defaults)
    return job


def queue_chains(*, base: Variant, chains: Iterable[Sequence[CompressionPass]], now: datetime) -> list[Job]:
    """Ask for passes one after another; chains that begin alike share their first jobs. The last job of each."""
    last = []
    with transaction.atomic():
        for chain in chains:
            job: Job | None = None
            for each in chain:
                job = queue(base=base, compression_pass=each.name, parameters=dict(each.parameters), after=job, now=now)
            last += [job] if job is not None else []
    return last


def queue_accuracy(*, variant: Variant, measured: Measured, now: datetime) -> None:
    """Ask for the accuracy on all held-out data, where a part was looked at so far or other data came meanwhile.

    ``variant.application`` is as it was when that was measured.
    """
    with transaction.atomic():
        dataset = datasets.in_use(variant.application)
        if dataset != variant.application.dataset_id:
            queue_accuracy_anew(variant=variant, now=now)
        elif measured.score is not None and measured.is_first_look:
            parameters = {"dataset": dataset, "seen": measured.score.as_seen()}
            queue(base=variant, compression_pass=ACCURACY, parameters=parameters, now=now)


def follow_data(*, variant: Variant, now: datetime) -> None:
    """Ask for the accuracy anew if the data set was replaced while a job measured: until it ended, asking changed
    nothing."""
    now_known = Variant.objects.select_related("application").get(pk=variant.pk)
    if now_known.is_judged_by_former_data and now_known.retired_at is None:
        queue_accuracy_anew(variant=now_known, now=now)


def queue_all_accuracies(*, application: Application, now: datetime) -> None:
    """Ask for the accuracy of every variant in use on the data set that the application has now."""
    for variant in application.variants.filter(retired_at=None):
        queue_accuracy_anew(variant=variant, now=now)


def queue_accuracy_anew(*, variant: Variant, now: datetime) -> None:
    """Ask for the accuracy on the data set that the application has now, unless it was measured on it last, or will be.

    A job that was done tells no more what the accuracy is of: other data may have come since, and gone again.
    """
    with transaction.atomic():
        parameters = {"dataset": datasets.in_use(variant.application)}
        if variant.accuracy_dataset != parameters["dataset"]:
            done = Job.objects.filter(base=variant, compression_pass=ACCURACY, after=None, state=Job.State.DONE)
            done.filter(parameters=parameters).delete()
        queue(base=variant, compression_pass=ACCURACY, parameters=parameters, now=now)


def runnable(*, now: datetime) -> list[int]:
    """Ids of jobs that may start now, oldest first, refinements last. Ends those that can come to nothing any more."""
    claims.give_up(Job.objects.all(), now)
    _end_followers(now)
    free = settings.COMPRESSION_JOBS - claims.running(Job.objects.all(), now)
    waiting = Job.objects.filter(claims.claimable(now), _is_due()).order_by(_is_refinement(), "id")
    return list(waiting.values_list("id", flat=True)[:free]) if free > 0 else []


def next_in_family(variant: Variant) -> Job | None:
    """The next job that may start of a variant and all that was derived from it."""
    family, found = {variant.pk}, {variant.pk}
    while found:
        found = set(Variant.objects.filter(base__in=found).values_list("pk", flat=True)) - family
        family |= found
    return Job.objects.filter(_is_due(), base__in=family, state=Job.State.QUEUED).order_by("id").first()


def claim(*, job_id: int, now: datetime) -> Job | None:
    """Become the one runner of a job; None when it is not to be had, or enough others run already."""
    with transaction.atomic():
        rows = Job.objects.filter(pk=job_id).filter(Q(pk__in=Job.objects.filter(_is_due()).values("pk")))
        job = claims.claim(rows.select_related("application", "base", "after__result"), now, at_once=_at_once())
        if job is not None and job.after is not None and job.after.result is not None:
            job.base = job.after.result
            job.save(update_fields=["base"])
    return job


def beat(*, job: Job, progress: float, now: datetime) -> bool:
    """Report life and progress. False: the job was cancelled or taken over, so stop."""
    return claims.beat(job, progress=progress, now=now)


def finish(*, job: Job, state: Job.State, now: datetime, error: str = "", result: Variant | None = None) -> bool:
    """End a job, unless it is no longer ours. What waited for it in vain ends too."""
    ended = claims.finish(job, state=state, now=now, error=error, result=result)
    _end_followers(now)
    return ended


def get(job_id: int) -> Job:
    """The job of this number. Raises NotFound."""
    job = Job.objects.select_related("application", "base", "result").filter(pk=job_id).first()
    if job is None:
        raise NotFound(f"no job {job_id}", field="job")
    return job


def cancel(*, job_id: int, now: datetime, actor: str = "") -> bool:
    """Stop a waiting or running job, and what waits for it. False when it has ended already."""
    with transaction.atomic():
        stopped = claims.cancel(Job.objects.filter(pk=get(job_id).pk), now)
        _end_followers(now)
        if stopped and actor:
            audit.record(actor=actor, verb="cancel_job", subject=f"job:{job_id}", now=now)
    return bool(stopped)


def run_again(*, job_id: int, now: datetime) -> Job:
    """Queue a job that ended without a result once more, and what ended with it. Raises NotFound, Conflict."""
    with transaction.atomic():
        job = get(job_id)
        if job.state not in ENDED_WITHOUT_RESULT:
            raise Conflict(f"job {job_id} is {job.state}; only jobs that ended without a result run again", field="job")
        return _start_over(job, now)


def _start_over(ended: Job, now: datetime) -> Job:
    # new rows, not reset ones: a runner that outlived its cancelled job must not recognise it
    top = ended
    while top.after is not None and top.after.state in ENDED_WITHOUT_RESULT:
        top = top.after
    tree = list(_with_followers(top))
    Job.objects.filter(pk=top.pk).delete()  # and what waited for it: none of that ever ran
    copies: dict[int, Job] = {}
    for job in tree:
        after = copies.get(job.after_id or 0, job.after)
        copies[job.pk] = Job.objects.create(
            application=job.application,
            base=job.base,
            after=after,
            compression_pass=job.compression_pass,
            parameters=job.parameters,
            created_at=now,
        )
    return copies[ended.pk]


def _with_followers(job: Job) -> Iterator[Job]:
    """A job, then all that waits for it, parents first."""
    yield job
    for follower in job.followers.all():
        yield from _with_followers(follower)


def _end_followers(now: datetime) -> None:
    """Jobs whose ``after`` came to nothing come to nothing too, down the chain."""
    for state, why in WHY_NOT.items():
        waiting = Job.objects.filter(state=Job.State.QUEUED, after__state=state)
        while waiting.update(state=state, finished_at=now, error=why):
            pass


def _at_once() -> int:
    return int(settings.COMPRESSION_JOBS)


def _is_due() -> Q:
    return Q(after=None) | Q(after__state=Job.State.DONE)


def _is_refinement() -> ExpressionWrapper[Q]:
    return ExpressionWrapper(Q(compression_pass__in=(ACCURACY, SAMPLES)), output_field=BooleanField())
