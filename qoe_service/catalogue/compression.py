"""Derives variants from variants: which passes there are, and what running one of their jobs means."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any

from django.db import transaction

from qoe_service.catalogue import artifacts, datasets, evaluation, jobs, profiles, sandbox
from qoe_service.catalogue.models import Artifact, Job, Variant

log = logging.getLogger(__name__)

MODEL, DERIVED = "model.onnx", "derived.onnx"


@dataclass(frozen=True, slots=True)
class CompressionPass:
    """What can be asked for. How it is done, and when it cannot help, stands in ``sandboxed/passes.py``."""

    name: str
    precision: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


PASSES: Mapping[str, CompressionPass] = MappingProxyType(
    {
        each.name: each
        for each in (
            CompressionPass(
                "static-int8", "int8", {"calibration_samples": 128, "per_channel": True, "reduce_range": False}
            ),
            CompressionPass("dynamic-int8", "int8", {"per_channel": True, "reduce_range": False}),
        )
    }
)


def run(*, job_id: int, clock: Callable[[], datetime]) -> Job | None:
    """Claim a job and bring it to its end; None when somebody else has it. Safe to call any number of times.

    An unforeseen error leaves the job running without a heartbeat: it is claimed again, a bounded number of times.
    """
    job = jobs.claim(job_id=job_id, now=clock())
    if job is None:
        return None

    def watch(progress: float) -> bool:
        return jobs.beat(job=job, progress=progress, now=clock())

    try:
        if job.compression_pass == jobs.ACCURACY:
            variant = refine_accuracy(job=job, watch=watch)
        else:
            variant = derive(job=job, watch=watch, clock=clock)
            profiles.measure_on_server(variant=variant, watch=watch, now=clock())
        jobs.finish(job=job, state=Job.State.DONE, result=variant, now=clock())
    except sandbox.Refused as refusal:
        jobs.finish(job=job, state=Job.State.REFUSED, error=str(refusal), now=clock())
    except sandbox.Cancelled:
        log.info("job stopped job=%s", job.pk)
    job.refresh_from_db()
    log.info("job ended job=%s state=%s variant=%s error=%s", job.pk, job.state, job.result_id, job.error)
    return job


def derive(*, job: Job, watch: sandbox.Watch, clock: Callable[[], datetime]) -> Variant:
    """Run a job's pass in the sandbox and keep what comes out. Raises sandbox.Refused or sandbox.Cancelled."""
    chosen, base = PASSES[job.compression_pass], job.base
    request = {"command": "compress", "pass": chosen.name, "parameters": job.parameters}
    request["samples"] = evaluation.FIRST_LOOK_SAMPLES
    with sandbox.opened() as box:
        box.add(MODEL, artifacts.open_for_reading(base.artifact_id))
        datasets.add_to(box, job.application)
        measured = evaluation.measure(box, request, watch=watch)
        with box.open(DERIVED) as derived:
            artifact = artifacts.store(derived, now=clock())
    with transaction.atomic():
        if not jobs.beat(job=job, progress=0.8, now=clock()):
            raise sandbox.Cancelled
        return _keep(job, artifact, measured, clock())


def refine_accuracy(*, job: Job, watch: sandbox.Watch) -> Variant:
    """Measure a variant on all held-out data. Raises sandbox.Refused or sandbox.Cancelled."""
    with sandbox.opened() as box:
        box.add(MODEL, artifacts.open_for_reading(job.base.artifact_id))
        datasets.add_to(box, job.application)
        measured = evaluation.measure(box, {"command": "measure", "samples": None}, watch=watch)
    evaluation.record(job.base, measured)
    return job.base


def _keep(job: Job, artifact: Artifact, measured: evaluation.Measured, now: datetime) -> Variant:
    base = job.base
    if artifact.digest == base.artifact_id:
        raise sandbox.Refused("the pass left the model as it was")
    variant, is_new = Variant.objects.get_or_create(
        application=job.application,
        artifact=artifact,
        defaults={
            **measured.as_fields(),
            "base": base,
            "name": _free_name(base, job.compression_pass, artifact.digest),
            "precision": PASSES[job.compression_pass].precision,
            "compression_pass": job.compression_pass,
            "provenance": {
                **measured.provenance,
                "base_digest": base.artifact_id,
                "pass": job.compression_pass,
                "parameters": job.parameters,
            },
            "created_at": now,
        },
    )
    if is_new:
        jobs.queue_accuracy(variant=variant, measured=measured, now=now)
    return variant


def _free_name(base: Variant, pass_name: str, digest: str) -> str:
    name = f"{base.name}-{pass_name}"[:80]
    taken = Variant.objects.filter(application=base.application_id, name=name).exists()
    return f"{name}-{digest[:8]}" if taken else name
