"""What a small fleet may run, as rows: two applications, their variants, and what the catalogue shows of them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from qoe_service.catalogue.models import Application, Artifact, Job, ProfilingJob, Upload, Variant
from qoe_service.fleet.models import Device
from selector.reward import QoeFormula
from tests import builders

VARIANTS = {
    "digits": (
        ("digits-wide", "fp32", 2_140_000, 0.941, 9.1),
        ("digits-wide-int8", "int8", 561_000, 0.937, 3.9),
        ("digits-medium", "fp32", 612_000, 0.902, 2.6),
        ("digits-medium-int8", "int8", 171_000, 0.897, 1.3),
        ("digits-narrow", "fp32", 118_000, 0.853, 0.71),
        ("digits-narrow-int8", "int8", 41_000, 0.846, 0.42),
    ),
    "parity": (
        ("parity-dense", "fp32", 1_310_000, 0.962, 1.4),
        ("parity-dense-int8", "int8", 334_000, 0.955, 0.9),
        ("parity-slim", "fp32", 204_000, 0.918, 0.31),
    ),
}
SLO_MS = {"digits": 50.0, "parity": 20.0}
FORMULAS = {
    name: QoeFormula(slo_p95_ms=slo, accuracy_floor=0.8, energy_reference_cpu_ms=8) for name, slo in SLO_MS.items()
}


def make_application(name: str, now: datetime) -> Application:
    """One of the two, with what it declares."""
    title = {"digits": "Digits", "parity": "Parity"}[name]
    return builders.make_application(
        name,
        title=title,
        slo_p95_ms=SLO_MS[name],
        minimum_accuracy=0.84,
        formula=FORMULAS[name].as_record(),
        epsilon=0.05,
        holdout=0.1,
        baseline_digest=builders.sha256_of(f"{name}/{VARIANTS[name][0][0]}"),
        created_at=now - timedelta(minutes=10),
    )


def make_variants(application: Application, now: datetime) -> list[tuple[str, Variant]]:
    """Its variants by name, profiled on the server; the 8-bit ones were made by jobs."""
    made: dict[str, Variant] = {}
    for name, precision, size, accuracy, service_ms in VARIANTS[application.name]:
        base = made.get(name.removesuffix("-int8")) if precision == "int8" else None
        made[name] = builders.make_variant(
            application,
            name,
            precision=precision,
            size_bytes=size,
            accuracy=accuracy,
            accuracy_low=accuracy - 0.011,
            accuracy_high=accuracy + 0.010,
            accuracy_samples=3594,
            accuracy_isa="x86_64 avx2 avx512 vnni",
            base=base,
            compression_pass="static_int8" if base else "",
            memory_bytes=size * 3,
        )
        builders.make_profile(made[name], a_ms=service_ms * 0.9, b_ms=service_ms * 0.1, measured_at=now)
        if base:
            Job.objects.create(
                application=application,
                base=base,
                compression_pass="static_int8",
                state=Job.State.DONE,
                progress=1,
                result=made[name],
                created_at=now - timedelta(minutes=9),
                finished_at=now - timedelta(minutes=8, seconds=20),
            )
    return list(made.items())


def fill_catalogue(
    application: Application, variants: Mapping[str, Variant], devices: Mapping[str, Device], now: datetime
) -> None:
    """Profiles on a second class, a variant that another beats, one that is retired, uploads, jobs in a chain."""
    tablet = devices["tablet"]
    application.explore_unmeasured = False
    application.samples, _ = Artifact.objects.get_or_create(
        digest=builders.sha256_of("samples"), defaults={"size_bytes": 52_000, "created_at": now}
    )
    application.save()
    for name, precision, _, accuracy, service_ms in VARIANTS["digits"]:
        if name != "digits-medium":
            # this class has no fast 8-bit instructions, so that 8 bits lose there
            slower = 3.4 if precision == "int8" and name != "digits-narrow-int8" else 1.6
            speed = {"a_ms": service_ms * slower, "b_ms": 0.2, "load_ms": 31.0, "memory_bytes": 6_400_000}
            builders.make_profile(variants[name], tablet, measured_at=now, cpu_ms_per_row=service_ms, **speed)
            value = round(accuracy * 200) / 200 - 0.01
            share = {"value": value, "low": value - 0.037, "high": value + 0.027, "measured_at": now}
            builders.make_isa_accuracy(variants[name], tablet, **share)
    for name, device, job_state, error in (
        ("digits-medium", tablet, ProfilingJob.State.RUNNING, ""),
        ("digits-wide", devices["phone"], ProfilingJob.State.FAILED, "no room for 2140000 bytes"),
    ):
        ProfilingJob.objects.create(
            variant=variants[name],
            device=device,
            device_class=device.device_class,
            isa="aarch64 neon-dot",
            state=job_state,
            error=error,
            created_at=now,
        )
    for name, row in variants.items():
        made = {"pass": row.compression_pass, "parameters": {"per_channel": True}} if row.base else {}
        row.provenance = {**made, "opset": 17, "versions": {"onnx": "1.23.2", "onnxruntime": "1.31.1"}}
        row.inputs = [{"name": "image", "type": "tensor(uint8)", "shape": ["batch", 1, 28, 28]}]
        row.outputs = [{"name": "logits", "type": "tensor(float)", "shape": ["batch", 10]}]
        row.save()
        assert name == row.name
    beaten = builders.make_variant(
        application,
        "digits-medium-7bit",
        base=variants["digits-medium"],
        compression_pass="static-int8-7bit",
        precision="int8",
        accuracy=0.889,
        accuracy_low=0.877,
        accuracy_high=0.9,
        accuracy_samples=3594,
        size_bytes=180_000,
    )
    builders.make_profile(beaten, tablet, a_ms=7.1, b_ms=0.3, measured_at=now)
    builders.make_isa_accuracy(beaten, tablet, value=0.88, low=0.83, high=0.92, measured_at=now)
    builders.make_variant(
        application,
        "digits-wide-pruned",
        base=variants["digits-wide"],
        compression_pass="prune-hard",
        accuracy=0.731,
        accuracy_low=0.716,
        accuracy_high=0.745,
        accuracy_samples=3594,
        size_bytes=902_000,
        retired_at=now - timedelta(minutes=3),
    )
    first = Job.objects.create(
        application=application,
        base=variants["digits-wide"],
        compression_pass="low-rank",
        state=Job.State.QUEUED,
        created_at=now,
    )
    Job.objects.create(
        application=application, base=first.base, after=first, compression_pass="static-int8", created_at=now
    )
    Job.objects.create(
        application=application,
        base=variants["digits-wide"],
        compression_pass="dynamic-int8",
        state=Job.State.REFUSED,
        error="dynamic-int8 does not help here: dense layers hold only 4 % of the weights, so there is little to win",
        created_at=now,
        finished_at=now,
    )
    uploads: list[tuple[str, str, dict[str, Any]]] = [
        ("digits-student.onnx", "receiving", {"received_bytes": 3_145_728}),
        (
            "digits-odd.onnx",
            "refused",
            {"error": "digits-odd.onnx is refused: it asks for opset 9; 11 to 23 are supported"},
        ),
        ("digits-wide.onnx", "done", {"result": variants["digits-wide"], "received_bytes": 2_140_000}),
    ]
    for age, (name, state, fields) in enumerate(uploads):
        Upload.objects.create(
            id=f"{age:032x}",
            application=application,
            kind="model",
            file_name=name,
            size_bytes=8_400_000,
            state=state,
            created_at=now - timedelta(minutes=age),
            touched_at=now,
            finished_at=None if state == "receiving" else now - timedelta(minutes=age),
            **fields,
        )
