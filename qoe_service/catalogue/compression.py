"""Derives variants from variants: what running a job of a compression pass means."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime
from typing import Any

from django.db import transaction

from qoe_service.catalogue import artifacts, datasets, evaluation, jobs, profiles, samples, sandbox
from qoe_service.catalogue.models import Artifact, Job, Variant
from qoe_service.catalogue.passes import PASSES

__all__ = ["MODEL", "PASSES", "derive", "rebuilt", "refine_accuracy", "run"]

log = logging.getLogger(__name__)

MODEL, DERIVED = "model.onnx", "derived.onnx"


def _tell_nobody(share: float) -> None:
    """For callers who do not wait for progress."""
    del share


def run(*, job_id: int, clock: Callable[[], datetime], tell: Callable[[float], object] = _tell_nobody) -> Job | None:
    """Claim a job and bring it to its end; None when somebody else has it. Safe to call any number of times.
    ``tell`` hears how far it is, four times a second.

    An unforeseen error leaves the job running without a heartbeat: it is claimed again, a bounded number of times.
    """
    job = jobs.claim(job_id=job_id, now=clock())
    if job is None:
        return None

    def watch(progress: float) -> bool:
        tell(progress)
        return jobs.beat(job=job, progress=progress, now=clock())

    try:
        if job.compression_pass == jobs.ACCURACY:
            variant = refine_accuracy(job=job, watch=watch)
        elif job.compression_pass == jobs.SAMPLES:
            variant = samples.make(job=job, watch=watch, clock=clock)
        else:
            variant = derive(job=job, watch=watch, clock=clock)
            profiles.measure_on_server(variant=variant, watch=watch, now=clock())
        jobs.finish(job=job, state=Job.State.DONE, result=variant, now=clock())
        jobs.follow_data(variant=variant, now=clock())
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
    request: dict[str, Any] = {"command": "compress", "pass": chosen.method, "parameters": job.parameters}
    request |= evaluation.first_look()
    with sandbox.opened() as box:
        size_bytes, factor = base.artifact.size_bytes, chosen.memory_factor
        request["memory"] = sandbox.check_memory(box.limits, size_bytes, factor, what=chosen.name)
        box.add(MODEL, artifacts.open_for_reading(base.artifact_id))
        datasets.add_to(box, job.application)
        evaluation.add_reference(box, job.application)
        measured = evaluation.measure(box, request, watch=watch)
        with box.open(DERIVED) as derived:
            artifact = artifacts.store(derived, now=clock(), weights=measured.weights)
    with transaction.atomic():
        if not jobs.beat(job=job, progress=0.8, now=clock()):
            raise sandbox.Cancelled
        return _keep(job, artifact, measured, clock())


def rebuilt(*, variant: Variant) -> str:
    """The digest of what a variant's provenance makes today: the variant's own, unless libraries or processor differ.

    Raises sandbox.Refused where it was not made here, or the data it was calibrated on is not at hand.
    """
    made = variant.provenance
    if variant.base is None or "method" not in made:
        raise sandbox.Refused(f"{variant.name} was handed in, not derived")
    request: dict[str, Any] = {"command": "compress", "pass": made["method"], "parameters": made["parameters"]}
    with sandbox.opened() as box:
        size_bytes, factor = variant.base.artifact.size_bytes, PASSES[made["pass"]].memory_factor
        request["memory"] = sandbox.check_memory(box.limits, size_bytes, factor, what=made["pass"])
        box.add(MODEL, artifacts.open_for_reading(made["base_digest"]))
        datasets.add_to(box, variant.application)
        measured = evaluation.measure(box, {**request, "samples": 1})
        if measured.provenance["calibration_digest"] != made["calibration_digest"]:
            raise sandbox.Refused(f"{variant.name} was calibrated on other data than the application has now")
        with box.open(DERIVED) as derived:
            return artifacts.digest_of_stream(derived)


def refine_accuracy(*, job: Job, watch: sandbox.Watch) -> Variant:
    """Measure a variant on all held-out data that it was not measured on before. Raises sandbox.Refused or
    sandbox.Cancelled."""
    is_same_data = job.parameters["dataset"] == job.application.dataset_id
    seen = job.parameters.get("seen") if is_same_data else None
    with sandbox.opened() as box:
        box.add(MODEL, artifacts.open_for_reading(job.base.artifact_id))
        datasets.add_to(box, job.application)
        evaluation.add_reference(box, job.application)
        measured = evaluation.measure(box, {"command": "measure", "samples": None, "seen": seen}, watch=watch)
    evaluation.record(job.base, measured, dataset=job.application.dataset_id)
    return job.base


def _keep(job: Job, artifact: Artifact, measured: evaluation.Measured, now: datetime) -> Variant:
    base, chosen = job.base, PASSES[job.compression_pass]
    if artifact.digest == base.artifact_id:
        raise sandbox.Refused("the pass left the model as it was")
    variant, is_new = Variant.objects.get_or_create(
        application=job.application,
        artifact=artifact,
        defaults={
            **measured.as_fields(job.application.dataset_id),
            "base": base,
            "name": _free_name(base, job.compression_pass, artifact.digest),
            "precision": chosen.precision or base.precision,
            "compression_pass": job.compression_pass,
            "provenance": {
                **measured.provenance,
                "base_digest": base.artifact_id,
                "pass": job.compression_pass,
                "method": chosen.method,
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
