"""Samples for devices: a few held-out inputs and what is right for each, as one artifact per data set.

A worker makes them in the sandbox, as a job like any other, once a device is idle, and after all that makes variants.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime
from typing import Literal

from django.db.models import F
from pydantic import BaseModel, Field, ValidationError

from device_agents.wire import SAMPLES_LIMIT
from qoe_service.catalogue import artifacts, datasets, evaluation, jobs, sandbox
from qoe_service.catalogue.models import Application, Job, Variant

FILE_NAME = "samples.npz"
MAX_BYTES = 16 * 2**20  # unpacked: large inputs mean fewer samples


class Made(BaseModel):
    """What the sandbox says of the samples that it made."""

    kind: Literal["top-1", "regression", "agreement"]
    count: int = Field(ge=1, le=SAMPLES_LIMIT)


def queue_missing(*, applications: Collection[str], now: datetime) -> None:
    """Ask, once per data set, for the samples of those applications that have none yet."""
    named = Application.objects.filter(pk__in=applications)
    for application in named.exclude(dataset=None).exclude(samples_from=F("dataset")):
        base = application.variants.filter(base=None, accuracy__isnull=False).order_by("pk").first()
        parameters = {"dataset": application.dataset_id}
        asked = Job.objects.filter(application=application, compression_pass=jobs.SAMPLES, parameters=parameters)
        if base is not None and not asked.exists():
            jobs.queue(base=base, compression_pass=jobs.SAMPLES, parameters=parameters, now=now)


def make(*, job: Job, watch: sandbox.Watch, clock: Callable[[], datetime]) -> Variant:
    """Choose the samples of a job's data set and keep them. Raises sandbox.Refused or sandbox.Cancelled."""
    application = job.application
    with sandbox.opened() as box:
        datasets.add_to(box, application)
        evaluation.add_reference(box, application)
        request = {"command": "sample", "count": SAMPLES_LIMIT, "max_bytes": MAX_BYTES}
        made = _checked(box.ask(request, watch=watch))
        with box.open(FILE_NAME) as file:
            artifact = artifacts.store(file, now=clock())
    same = Application.objects.filter(pk=application.pk, dataset=job.parameters["dataset"])
    same.update(
        samples=artifact, samples_from=job.parameters["dataset"], samples_kind=made.kind, samples_count=made.count
    )
    return job.base


def _checked(answer: object) -> Made:
    try:
        return Made.model_validate(answer)
    except ValidationError as error:
        raise sandbox.Refused(f"the program that reads data gave an odd answer: {error.errors()[0]['msg']}") from None
