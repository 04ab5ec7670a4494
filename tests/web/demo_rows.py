"""A small fleet as rows: six devices, two applications, a log with true propensities. For tests and for pictures."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from qoe_service.catalogue.models import Application, Job, Variant
from qoe_service.decisions.models import Ban, Decision, Feedback, Learner
from qoe_service.fleet.models import Device
from qoe_service.rollouts.models import Assignment, AttemptOutcome
from selector.interactions import Action, Candidate, Configuration, Context, Measurement, Prediction
from selector.interactions import Variant as KnownVariant
from selector.records import as_record, candidates_record
from tests import builders
from tests.web.demo_catalogue import FORMULAS, SLO_MS, VARIANTS, fill_catalogue, make_application, make_variants

CONFIGURATIONS = (Configuration(1, 1, 1), Configuration(4, 1, 1), Configuration(4, 2, 1), Configuration(1, 1, 2))
DEVICES = (
    ("workstation", 1.0, "careful", ("digits", "parity")),
    ("laptop", 0.6, "impatient", ("digits", "parity")),
    ("tablet", 0.4, "careful", ("digits", "parity")),
    ("phone", 0.25, "impatient", ("digits",)),
    ("camera", 0.16, "careful", ("digits",)),
    ("sensor-hub", 0.1, "thrifty", ("digits",)),
)
X86 = {"architecture": "x86_64", "cpu_model": "Xeon Platinum 8375C", "isa": ["avx2", "avx512", "vnni"]}
ARM = {"architecture": "aarch64", "cpu_model": "Cortex-A76", "isa": ["neon", "neon-dot"]}


@dataclass(frozen=True)
class Fleet:
    """What was built."""

    devices: dict[str, Device]
    applications: dict[str, Application]
    variants: dict[str, Variant]


@dataclass(frozen=True)
class Run:
    """One application on one device of the fleet."""

    fleet: Fleet
    device: Device
    application: str
    quota: float


def seed_fleet(*, now: datetime, leases: int = 30, seed: int = 7) -> Fleet:
    """Six devices that have learnt for ``leases`` leases each."""
    rng = random.Random(seed)
    applications = {name: make_application(name, now) for name in VARIANTS}
    variants = {name: row for each in applications.values() for name, row in make_variants(each, now)}
    devices = {each[0]: _device(each, now, rng) for each in DEVICES}
    fleet = Fleet(devices, applications, variants)
    runs = [Run(fleet, devices[name], each, quota) for name, quota, _, names in DEVICES for each in names]
    for lease in range(leases):
        for place, run in enumerate(runs):
            at = now - timedelta(seconds=9.5 * (leases - lease) + place * 0.7)
            _closed_lease(run, at, progress=lease / leases, rng=rng)
    for run in runs:
        _running_lease(run, now, rng)
    _policies(fleet, now)
    _troubles(fleet, now)
    fill_catalogue(applications["digits"], variants, devices, now)
    return fleet


def _device(what: tuple[str, float, str, tuple[str, ...]], now: datetime, rng: random.Random) -> Device:
    name, quota, persona, applications = what
    return builders.make_device(
        name,
        device_class=name,
        labels={
            "cpu-limit": "real" if quota > 0.3 else "emulated",
            "cpu-quota": f"{quota:g} cores",
            "applications": ",".join(applications),
            "persona": persona,
            "users": "simulated",
        },
        hardware={
            **(ARM if name in {"tablet", "phone"} else X86),
            "cores": 2,
            "memory_bytes": 8 * 2**30,
            "runtime_version": "onnxruntime 1.31.1",
        },
        telemetry={
            "cpu_load_share": round(rng.uniform(0.05, 0.4), 3),
            "memory_free_bytes": int(rng.uniform(2, 6) * 2**30),
            "network": "ethernet",
            "throttled": False,
        },
        agent_version="0.1.0",
        serving_url=f"http://127.0.0.1:{9000 + len(name)}",
        enrolled_at=now - timedelta(minutes=6),
        last_seen_at=now - timedelta(seconds=rng.uniform(0.3, 4)),
        next_check_in_due_at=now + timedelta(seconds=5),
    )


def candidates_of(
    fleet: Fleet, application: str, quota: float, *, has_policy: bool, banned: str = ""
) -> list[Candidate]:
    """Every action with an invented but consistent prediction, and probabilities that sum to one."""
    actions = [
        (_known(fleet.variants[name], accuracy), configuration, service_ms)
        for name, _, _, accuracy, service_ms in VARIANTS[application]
        for configuration in CONFIGURATIONS
    ]
    rows = [
        (Action(variant, each), _prediction(application, variant, each, ms, quota)) for variant, each, ms in actions
    ]
    masks = [_masks(action, banned) for action, _ in rows]
    open_rows = [index for index, mask in enumerate(masks) if not mask]
    best = sorted(open_rows, key=lambda index: -rows[index][1].qoe)[:8]
    weights = {index: math.exp(14 * rows[index][1].qoe) for index in best}
    return [
        Candidate(
            action=action,
            prediction=prediction,
            hard_masks=masks[index],
            soft_masks=("slo_violation_likely",) if prediction.slo_violation_probability > 0.5 else (),
            shortlisted=has_policy and index in weights,
            probability=_probability(index, open_rows, weights, has_policy),
        )
        for index, (action, prediction) in enumerate(rows)
    ]


def _known(variant: Variant, accuracy: float) -> KnownVariant:
    return KnownVariant(
        variant.artifact_id,
        variant.name,
        variant.artifact.size_bytes,
        accuracy,
        variant.precision,
        variant.memory_bytes,
    )


def _masks(action: Action, banned: str) -> tuple[str, ...]:
    masks = ("threads_above_cores",) if action.configuration.threads > 1 and "wide" in action.variant.name else ()
    return (*masks, "banned:rolled back") if action.variant.name == banned else masks


def _probability(index: int, open_rows: Sequence[int], weights: dict[int, float], has_policy: bool) -> float:
    if index not in open_rows:
        return 0.0
    uniform = 1 / len(open_rows)
    if not has_policy:
        return uniform
    return 0.15 * uniform + 0.85 * weights.get(index, 0.0) / sum(weights.values())


def _prediction(application: str, variant: KnownVariant, each: Configuration, ms: float, quota: float) -> Prediction:
    service = ms / quota * (1 + 0.35 * (each.max_batch > 1)) / (1.4 if each.threads > 1 else 1)
    p95 = service * 2.1 + 1.2
    slo = SLO_MS[application]
    hit = 1 / (1 + math.exp(6 * (p95 / slo - 1)))
    cpu = ms * (0.8 if each.max_batch > 1 else 1.0) * 1.15
    qoe = float(FORMULAS[application].predicted(variant.accuracy, hit, cpu, 0))
    return Prediction(p95 * 0.55, p95, 0.2, cpu, 1 - hit, qoe, service, slo_hit_share=hit, source="device")


def _context(device: Device, application: str, incumbent: str | None) -> Context:
    return Context(
        device=device.pk,
        device_class=device.device_class,
        application=application,
        arrival_rate_rps=6.0,
        slo_p95_ms=SLO_MS[application],
        minimum_accuracy=0.84,
        cores=2,
        memory_free_bytes=int(device.telemetry["memory_free_bytes"]),
        cpu_load_share=float(device.telemetry["cpu_load_share"]),
        incumbent=incumbent,
        features={"architecture": "x86_64", "network": "ethernet", "preference": str(device.labels["persona"])},
    )


def _decision(run: Run, at: datetime, policy: int, rng: random.Random, **fields: Any) -> tuple[Decision, Candidate]:
    fleet, name, application = run.fleet, run.device.name, run.application
    banned = "digits-wide" if name == "sensor-hub" else ""
    candidates = candidates_of(fleet, application, run.quota, has_policy=policy > 0, banned=banned)
    chosen = rng.choices(range(len(candidates)), weights=[each.probability for each in candidates])[0]
    taken = candidates[chosen]
    kind = "uniform" if not policy else rng.choices(("exploit", "uniform", "holdout_uniform"), (88, 6, 6))[0]
    row = builders.make_decision(
        fleet.devices[name],
        fleet.applications[application],
        fleet.variants[taken.action.variant.name],
        configuration=as_record(taken.action.configuration),
        id=f"{rng.getrandbits(128):032x}",
        context=as_record(_context(fleet.devices[name], application, taken.action.key)),
        candidates=candidates_record(candidates),
        chosen=chosen,
        propensity=taken.probability,
        kind=kind if taken.shortlisted or not policy else "uniform",
        seed=str(rng.getrandbits(62)),
        trace_id=f"{rng.getrandbits(128):032x}",
        policy_number=policy,
        calibration_revisions={"fleet": 40 + policy, f"device:{fleet.devices[name].pk}": 3 + policy},
        reason="lease_over",
        decided_at=at,
        **fields,
    )
    return row, taken


def _closed_lease(run: Run, at: datetime, *, progress: float, rng: random.Random) -> None:
    application = run.application
    policy = 0 if progress < 0.15 else int(progress * 20)
    row, taken = _decision(
        run,
        at,
        policy,
        rng,
        state=Decision.State.JOINED,
        active_at=at + timedelta(seconds=0.6),
        closed_at=at + timedelta(seconds=8.6),
    )
    expected = taken.prediction
    hit = min(1.0, max(0.0, expected.slo_hit_share + rng.gauss(0, 0.02)))
    rating = min(1.0, max(0.0, expected.qoe + rng.gauss(0.02, 0.08)))
    measured = Measurement(
        requests=rng.randint(28, 70),
        errors=0,
        p50_ms=expected.p50_ms * rng.uniform(0.9, 1.15),
        p95_ms=expected.p95_ms * rng.uniform(0.88, 1.2),
        slo_hit_share=hit,
        cpu_ms_per_request=expected.cpu_ms_per_request * rng.uniform(0.95, 1.08),
        accuracy=min(1.0, taken.action.variant.accuracy + rng.gauss(0, 0.02)),
        service_ms=expected.service_ms * rng.uniform(0.95, 1.08),
        batch_mean=1.2,
        rating=rating,
        ratings=3,
    )
    reward = FORMULAS[application].reward(measured, taken.action.variant.accuracy)
    builders.make_joined_event(
        row, reward=reward, measurement=as_record(measured), joined_at=at + timedelta(seconds=9.4)
    )
    received = at + timedelta(seconds=8.7)
    device_part = {"requests": measured.requests, "p95_ms": measured.p95_ms}
    Feedback.objects.bulk_create(
        [
            Feedback(feedback_id="lease", decision=row, source="device", components=device_part, received_at=received),
            Feedback(feedback_id="r-1", decision=row, source="app", rating=rating, received_at=received),
        ]
    )


def _running_lease(run: Run, now: datetime, rng: random.Random) -> Assignment:
    age = rng.uniform(1.5, 7.5)
    at = now - timedelta(seconds=age)
    row, _ = _decision(run, at, 19, rng, active_at=at + timedelta(seconds=0.6))
    return builders.make_assignment(
        run.device,
        run.fleet.applications[run.application],
        row,
        reported_active_s=age - 0.6,
        reported_rps=rng.uniform(2.5, 9),
        reported_at=now,
        desired_at=at,
        cached_digests=[row.variant_digest],
    )


def _policies(fleet: Fleet, now: datetime) -> None:
    for application in fleet.applications.values():
        learner = Learner.objects.get(application=application)
        learner.learnt_through = learner.last_event_number
        learner.save()
        builders.make_policy_version(
            application, 19, trained_through=learner.learnt_through, created_at=now - timedelta(seconds=4)
        )


def _troubles(fleet: Fleet, now: datetime) -> None:
    """One update under way, one rollback with its ban, one running and one failed job, profiles on one device."""
    tablet = Assignment.objects.get(device=fleet.devices["tablet"], application="digits")
    running = next(
        each
        for each in fleet.variants.values()
        if each.application_id == "digits" and each.artifact_id != tablet.reported_digest
    )
    Assignment.objects.filter(pk=tablet.pk).update(
        reported_digest=running.artifact_id, reported_decision_id="", reported_state="warming", reported_active_s=0
    )
    hub = fleet.devices["sensor-hub"]
    wide = fleet.variants["digits-wide"]
    failed = Decision.objects.filter(device=hub).order_by("decided_at")[0]
    for each in Decision.objects.filter(device=hub).order_by("-decided_at")[:4]:
        AttemptOutcome.objects.create(
            device=hub,
            application=each.application,
            decision_id=each.pk,
            outcome="committed",
            evidence="traffic",
            download_bytes=0,
            swap_ms=212.0,
            at=each.decided_at + timedelta(seconds=3),
        )
    AttemptOutcome.objects.create(
        device=hub,
        application=failed.application,
        decision_id=failed.pk,
        outcome="rolled_back",
        reason="p95 of 214 ms in the soak is above the gate of 100 ms",
        evidence="traffic",
        download_bytes=2_140_000,
        swap_ms=1840.0,
        at=failed.decided_at + timedelta(seconds=6),
    )
    Ban.objects.create(
        application=wide.application,
        device=hub,
        variant_digest=wide.artifact_id,
        reason="rolled back",
        created_at=failed.decided_at + timedelta(seconds=6),
        expires_at=now + timedelta(minutes=54),
    )
    for state, base, fields in (
        (Job.State.RUNNING, "digits-narrow", {"progress": 0.62}),
        (
            Job.State.FAILED,
            "digits-medium",
            {"error": "The model uses the operator Einsum, which this pass cannot quantise."},
        ),
    ):
        Job.objects.create(
            application=fleet.applications["digits"],
            base=fleet.variants[base],
            compression_pass="dynamic_int8",
            state=state,
            created_at=now - timedelta(seconds=40),
            **fields,
        )
    for place, (name, *_, service_ms) in enumerate(VARIANTS["digits"]):
        for device in (fleet.devices["sensor-hub"], fleet.devices["workstation"]):
            builders.make_profile(
                fleet.variants[name], device, a_ms=service_ms * 9, b_ms=0.4 + place * 0.1, measured_at=now
            )
