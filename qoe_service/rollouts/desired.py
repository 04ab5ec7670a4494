"""What a device should run, as one signed document. Reading it decides nothing."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

from django.conf import settings
from django.core.cache import cache

from device_agents.wire import (
    DesiredApplication,
    DesiredState,
    HealthGate,
    ProfilingJob,
    ServingConfiguration,
    SignedDesired,
    VariantReference,
)
from qoe_service.catalogue import profiling
from qoe_service.catalogue.models import Application, Artifact, Variant
from qoe_service.decisions.models import Decision
from qoe_service.fleet import keys
from qoe_service.fleet.models import Device
from qoe_service.rollouts.models import Assignment, DesiredVersion

# What was read within the present second is forgotten after so long.
REMEMBERED_S = 2.0
Variants = Mapping[tuple[str, str], VariantReference]
# What a document needs. A decision also holds all its candidates, which a look has no use for.
_READ = (
    *("device_id", "last_good_digest", "decision__variant_digest", "decision__configuration", "decision__trace_id"),
    *("application__baseline_digest", "application__health_gate", "application__lease_s", "application__slo_p95_ms"),
)


def version_of(*, device_id: str) -> int:
    """The version of the device's desired document; 0 before anything was decided."""
    try:
        return DesiredVersion.objects.values_list("version", flat=True).get(device=device_id)
    except DesiredVersion.DoesNotExist:
        return 0


def etag_of(version: int) -> str:
    """The entity tag of a version: equal versions say the same."""
    return f'"{version}"'


def check_in_interval_s(rng: random.Random) -> float:
    """When a device should come again: jittered, so that a fleet that restarts together does not stay together."""
    share = min(settings.CHECK_IN_JITTER_SHARE, 1.0)
    return settings.CHECK_IN_INTERVAL_S * rng.uniform(1 - share, 1 + share)


def signed(*, device: Device, version: int, now: datetime) -> SignedDesired:
    """The document as the text that is signed, with a signature by every key in use."""
    text = document(device=device, version=version, now=now).model_dump_json()
    return SignedDesired(document=text, signatures=keys.sign(text=text, now=now))


def document(*, device: Device, version: int, now: datetime) -> DesiredState:
    """Everything that the device should run.

    ``version`` was read before: a change since then shows under the old version, and comes once more.
    """
    assignments = Assignment.objects.filter(device=device).select_related("decision", "application").only(*_READ)
    assignments = assignments.order_by("application_id")  # by default a device's name comes first: one join more
    decided = [(each, each.decision) for each in assignments if each.decision is not None]
    variants = _variants((each for each, _ in decided), now)
    return DesiredState(
        version=version,
        device_id=device.pk,
        issued_at=now,
        expires_at=now + timedelta(seconds=settings.DESIRED_TTL_S),
        check_in_interval_s=settings.CHECK_IN_INTERVAL_S,
        applications=tuple(
            _application(each, decision, variants)
            for each, decision in decided
            if (each.application_id, decision.variant_digest) in variants
        ),
        profiling=_profiling(device),
    )


def _application(assignment: Assignment, decision: Decision, variants: Variants) -> DesiredApplication:
    application = assignment.application
    return DesiredApplication(
        application=application.name,
        model_name=application.name,
        decision_id=decision.pk,
        variant=variants[application.pk, decision.variant_digest],
        serving=ServingConfiguration.model_validate(decision.configuration),
        health_gate=HealthGate.model_validate(application.health_gate),
        fallback=_fallback(assignment, application, decision, variants),
        lease_s=application.lease_s,
        slo_p95_ms=application.slo_p95_ms,
        trace_id=decision.trace_id or None,
    )


def _fallback(
    assignment: Assignment, application: Application, decision: Decision, variants: Variants
) -> VariantReference | None:
    """The last variant that did well on this device, else the safe baseline; never the one that is being tried."""
    for digest in (assignment.last_good_digest, application.baseline_digest):
        variant = variants.get((application.pk, digest))
        if variant is not None and digest != decision.variant_digest:
            return variant
    return None


def _profiling(device: Device) -> ProfilingJob | None:
    job = profiling.offered_to(device)
    samples = Artifact.objects.filter(pk=job.samples_digest).first() if job else None
    if job is None or samples is None:
        return None
    name = f"samples of {job.variant.application_id}"
    return ProfilingJob(job_id=job.offer_id, variant=_reference(job.variant), samples=_placed(samples, name))


def _reference(variant: Variant) -> VariantReference:
    return _placed(variant.artifact, variant.name)


def _placed(artifact: Artifact, name: str) -> VariantReference:
    digest = artifact.digest
    return VariantReference(digest=digest, name=name, size_bytes=artifact.size_bytes, url=f"/artifacts/sha256/{digest}")


def _variants(assignments: Iterable[Assignment], now: datetime) -> Variants:
    """By application and digest. Each is read once a second: a fleet that looks at once asks for a few."""
    wanted: set[tuple[str, str]] = set()
    for each in assignments:
        chosen = each.decision.variant_digest if each.decision else ""
        digests = {chosen, each.last_good_digest, each.application.baseline_digest} - {""}
        wanted |= {(each.application_id, digest) for digest in digests}
    places = {pair: f"variant:{int(now.timestamp())}:{':'.join(pair)}" for pair in wanted}
    remembered: dict[str, VariantReference] = cache.get_many(places.values())
    variants = {pair: remembered[place] for pair, place in places.items() if place in remembered}
    missing = wanted - variants.keys()
    if missing:
        rows = Variant.objects.filter(artifact__in={digest for _, digest in missing}).select_related("artifact")
        # A variant also holds all that was measured.
        rows = rows.only("application_id", "name", "artifact__size_bytes").order_by()
        found = {(row.application_id, row.artifact_id): _reference(row) for row in rows}
        found = {pair: found[pair] for pair in missing & found.keys()}
        cache.set_many({places[pair]: variant for pair, variant in found.items()}, REMEMBERED_S)
        variants |= found
    return variants
