"""Celery tasks: messages only say "look"; the rows of Job and Upload are the queue."""

from __future__ import annotations

import logging

from celery import shared_task
from django.utils import timezone
from kombu.exceptions import OperationalError

from qoe_service.catalogue import collection, compression, jobs, uploads

log = logging.getLogger(__name__)


@shared_task
def run_queued() -> None:
    """Start what may start. Beat calls it again and again, so that lost messages and dead runners do not matter."""
    for upload_id in uploads.runnable(now=timezone.now()):
        run_upload.delay(upload_id)
    for job_id in jobs.runnable(now=timezone.now()):
        run_job.delay(job_id)


@shared_task
def run_job(job_id: int) -> None:
    """Run one job to its end, then look for the next."""
    if compression.run(job_id=job_id, clock=timezone.now) is not None:
        wake_workers()


@shared_task
def run_upload(upload_id: str) -> None:
    """Take in one complete upload, then look for what it queued."""
    if uploads.run(upload_id=upload_id, clock=timezone.now) is not None:
        wake_workers()


@shared_task
def collect() -> None:
    """Remove stored bytes that nothing refers to any more."""
    collected = collection.collect(now=timezone.now())
    if collected:
        log.info("artifacts collected files=%d bytes=%d", len(collected), sum(each.size_bytes for each in collected))


def wake_workers() -> None:
    """Ask for a look now; when the broker is away, beat's rescan does the same a little later."""
    try:
        run_queued.delay()
    except OperationalError as error:
        log.warning("broker is away, queued jobs wait for the rescan error=%s", error)
