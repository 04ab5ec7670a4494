"""Takes a model in: checked and measured in the sandbox, kept as a variant, passes queued."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from django.db import transaction

from qoe_service.catalogue import applications, artifacts, datasets, evaluation, jobs, profiles, sandbox
from qoe_service.catalogue.compression import MODEL, PASSES
from qoe_service.catalogue.models import Application, Artifact, Variant
from qoe_service.errors import Conflict, InvalidInput

MAX_MODEL_BYTES = 2 * 2**30 - 1  # the bound of one protobuf message
NAME = re.compile(r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$")
FIELD = "file"


def import_model(
    *,
    application: Application,
    path: Path,
    name: str,
    passes: Sequence[str] = (),
    precision: str = "fp32",
    now: datetime,
) -> Variant:
    """Keep the model at ``path`` as a variant that may be selected, and queue passes over it.

    Importing the same model under the same name again changes nothing. Raises InvalidInput, TooLarge, Conflict.
    """
    _check_names(name, passes)
    datasets.check_file(path, field=FIELD, max_bytes=MAX_MODEL_BYTES)
    variant = _imported_before(application, path, name) or _import(application, path, name, precision, now)
    applications.settle_baseline(variant=variant)
    for each in dict.fromkeys(passes):
        jobs.queue(base=variant, compression_pass=each, parameters=dict(PASSES[each].parameters), now=now)
    profiles.measure_on_server(variant=variant, now=now)
    return variant


def _check_names(name: str, passes: Sequence[str]) -> None:
    if not NAME.match(name):
        raise InvalidInput(
            "1 to 64 letters, digits, dots, dashes or underscores, starting with a letter or digit", field="name"
        )
    unknown = [each for each in passes if each not in PASSES]
    if unknown:
        raise InvalidInput(f"{', '.join(unknown)}: no such pass; there are {', '.join(PASSES)}", field="passes")


def _imported_before(application: Application, path: Path, name: str) -> Variant | None:
    """The finished variant of an earlier import of these very bytes under this name."""
    same = Variant.objects.filter(application=application, name=name).first()
    if same is None or (same.accuracy is None and application.dataset_id):
        return None
    return same if artifacts.digest_of(path) == same.artifact_id else None


def _import(application: Application, path: Path, name: str, precision: str, now: datetime) -> Variant:
    with sandbox.opened() as box:
        box.add(MODEL, path.open("rb"))
        datasets.add_to(box, application)
        try:
            measured = evaluation.measure(box, {"command": "measure", "samples": evaluation.FIRST_LOOK_SAMPLES})
            # stored from the private copy: what was checked is what is kept
            with box.open(MODEL) as checked:
                artifact = artifacts.store(checked, now=now)
        except sandbox.Refused as refusal:
            raise InvalidInput(f"{path.name} is refused: {refusal}", field=FIELD) from None
    return _keep(application, artifact, measured, name=name, precision=precision, now=now)


def _keep(
    application: Application,
    artifact: Artifact,
    measured: evaluation.Measured,
    *,
    name: str,
    precision: str,
    now: datetime,
) -> Variant:
    with transaction.atomic():
        variant = Variant.objects.filter(application=application, artifact=artifact).first()
        if variant is not None and variant.name != name:
            raise Conflict(f"the same model is there already, as {variant.name!r}", field="name")
        if variant is not None:
            evaluation.record(variant, measured)
            jobs.queue_accuracy(variant=variant, measured=measured, now=now)
            return variant
        if Variant.objects.filter(application=application, name=name).exists():
            raise Conflict(f"another model is there already as {name!r}", field="name")
        variant = Variant.objects.create(
            application=application,
            artifact=artifact,
            name=name,
            precision=precision,
            provenance={"opset": measured.facts.opset},
            created_at=now,
            **measured.as_fields(),
        )
        jobs.queue_accuracy(variant=variant, measured=measured, now=now)
        return variant
