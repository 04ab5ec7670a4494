"""Builds rows for tests: each builder makes one valid row, and takes what matters to the test as keywords."""

from __future__ import annotations

import hashlib
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

from qoe_service.catalogue.models import Application, Artifact, IsaAccuracy, Profile, QoeFormula, Variant
from qoe_service.catalogue.places import isa_of
from qoe_service.decisions.models import Decision, JoinedEvent, Learner, PolicyVersion
from qoe_service.fleet.models import ApplicationKey, Device
from qoe_service.rollouts.models import Assignment

NOW = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)
CREDENTIAL = "c" * 43
CONFIGURATIONS = (
    {"max_batch": 1, "max_concurrency": 1, "threads": 1},
    {"max_batch": 4, "max_concurrency": 1, "threads": 1},
)


def sha256_of(text: str) -> str:
    """The digest under which the service stores a secret or an artifact."""
    return hashlib.sha256(text.encode()).hexdigest()


def make_device(name: str = "kitchen-tablet", *, credential: str | None = None, **fields: Any) -> Device:
    """An enrolled device; its credential is CREDENTIAL unless given."""
    fields.setdefault("id", f"d-{name}")
    fields.setdefault("device_class", "tablet")
    fields.setdefault("hardware", {"cores": 2, "memory_bytes": 2 * 2**30, "isa": ["avx2"], "architecture": "x86_64"})
    fields.setdefault("telemetry", {"memory_free_bytes": 2**30, "network": "wifi", "cpu_load_share": 0.1})
    fields.setdefault("enrolled_at", NOW)
    fields.setdefault("last_seen_at", NOW)
    secret = (
        credential if credential is not None else (CREDENTIAL if name == "kitchen-tablet" else f"credential-{name}")
    )
    return Device.objects.create(name=name, credential_sha256=sha256_of(secret), **fields)


def make_application(name: str = "digits", **fields: Any) -> Application:
    """An application with one version of a QoE formula and its learner row."""
    fields.setdefault("title", name.capitalize())
    fields.setdefault("slo_p95_ms", 50.0)
    fields.setdefault("configurations", list(CONFIGURATIONS))
    fields.setdefault("lease_s", 8.0)
    fields.setdefault("feedback_wait_s", 1.0)
    fields.setdefault("created_at", NOW)
    fields.setdefault("explore_unmeasured", True)
    definition = fields.pop("formula", None)
    application = Application.objects.create(name=name, **fields)
    if definition is not None:
        QoeFormula.objects.create(application=application, version=1, definition=definition, created_at=NOW)
    Learner.objects.create(application=application)
    return application


def make_variant(application: Application, name: str = "digits-small", **fields: Any) -> Variant:
    """A measured variant whose digest follows from its name."""
    digest = fields.pop("digest", sha256_of(f"{application.name}/{name}"))
    size_bytes = fields.pop("size_bytes", 100_000)
    artifact, _ = Artifact.objects.get_or_create(digest=digest, defaults={"size_bytes": size_bytes, "created_at": NOW})
    fields.setdefault("precision", "int8" if name.endswith("int8") else "fp32")
    fields.setdefault("accuracy", 0.9)
    fields.setdefault("accuracy_low", 0.88)
    fields.setdefault("accuracy_high", 0.92)
    fields.setdefault("accuracy_samples", 1000)
    fields.setdefault("accuracy_isa", "x86_64 avx2")
    fields.setdefault("created_at", NOW)
    return Variant.objects.create(application=application, artifact=artifact, name=name, **fields)


def make_profile(variant: Variant, device: Device | None = None, **fields: Any) -> Profile:
    """A measured profile: one millisecond an item unless given."""
    isa = isa_of(device.hardware) if device else ""
    values = {"threads": 1, "a_ms": 1.0, "b_ms": 0.1, "isa": isa, "measured_at": NOW, **fields}
    return Profile.objects.create(variant=variant, device=device, **values)


def make_isa_accuracy(variant: Variant, device: Device, **fields: Any) -> IsaAccuracy:
    """What a device measured on the samples that its application has now."""
    values = {"value": 0.9, "low": 0.85, "high": 0.94, "kind": "top-1", "samples": 200, "measured_at": NOW, **fields}
    values.setdefault("samples_digest", variant.application.samples_id)
    isa, device_class = isa_of(device.hardware), device.device_class
    return IsaAccuracy.objects.create(variant=variant, device=device, isa=isa, device_class=device_class, **values)


def make_decision(device: Device, application: Application, variant: Variant, **fields: Any) -> Decision:
    """A decision with one candidate, taken with certainty, unless given otherwise."""
    configuration = fields.setdefault("configuration", dict(CONFIGURATIONS[0]))
    digest = variant.artifact_id
    key = "{}/b{max_batch}c{max_concurrency}t{threads}".format(digest[:12], **configuration)
    fields.setdefault("id", uuid.uuid4().hex)
    fields.setdefault("state", Decision.State.ACTIVE)
    fields.setdefault("reason", "enrolment")
    fields.setdefault("context", {})
    fields.setdefault("candidates", [])
    fields.setdefault("chosen", 0)
    fields.setdefault("propensity", 1.0)
    fields.setdefault("kind", "exploit")
    fields.setdefault("seed", "0")
    fields.setdefault("formula_version", 1)
    fields.setdefault("decided_at", NOW)
    fields.setdefault("active_at", NOW + timedelta(seconds=1))
    return Decision.objects.create(
        device=device, application=application, action_key=key, variant_digest=digest, **fields
    )


def make_joined_event(
    decision: Decision, *, reward: float = 0.8, number: int | None = None, **fields: Any
) -> JoinedEvent:
    """A closed decision with its reward, next in the log unless numbered."""
    learner, _ = Learner.objects.get_or_create(application=decision.application)
    learner.last_event_number = number if number is not None else learner.last_event_number + 1
    learner.save()
    fields.setdefault(
        "measurement", {"requests": 100, "slo_hit_share": 0.97, "p95_ms": 30.0, "ratings": 2, "rating": 0.8}
    )
    fields.setdefault("formula_version", 1)
    fields.setdefault("joined_at", NOW)
    return JoinedEvent.objects.create(
        application=decision.application, decision=decision, number=learner.last_event_number, reward=reward, **fields
    )


def make_policy_version(application: Application, number: int = 1, **fields: Any) -> PolicyVersion:
    """A policy version with placeholder bytes; only for pages and rows that never load them."""
    state = fields.setdefault("state", b"not a policy")
    fields.setdefault("sha256", hashlib.sha256(state or b"").hexdigest())
    fields.setdefault("arguments", "--cb_explore_adf")
    fields.setdefault("feature_schema", "1")
    fields.setdefault("trained_through", 12)
    fields.setdefault("fencing_number", 1)
    fields.setdefault("created_at", NOW)
    return PolicyVersion.objects.create(application=application, number=number, **fields)


def make_assignment(
    device: Device, application: Application, decision: Decision | None = None, **fields: Any
) -> Assignment:
    """What a device should run; the device reports that it does, unless given otherwise."""
    if decision is not None:
        fields.setdefault("reported_state", "committed")
        fields.setdefault("reported_digest", decision.variant_digest)
        fields.setdefault("reported_decision_id", decision.id)
        fields.setdefault("reported_at", NOW)
        fields.setdefault("desired_at", NOW)
    return Assignment.objects.create(device=device, application=application, decision=decision, **fields)


def make_application_key(application: str = "digits", *, key: str = "k" * 43, **fields: Any) -> ApplicationKey:
    """A key with which an app may rate one application's decisions."""
    fields.setdefault("label", "test app")
    fields.setdefault("created_at", NOW)
    return ApplicationKey.objects.create(application=application, secret_sha256=sha256_of(key), **fields)
