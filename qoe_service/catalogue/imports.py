"""Takes a model in: checked and measured in the sandbox, kept as a variant, passes queued."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from django.db import transaction

from qoe_service.catalogue import applications, artifacts, datasets, evaluation, jobs, profiles, sandbox
from qoe_service.catalogue.compression import MODEL
from qoe_service.catalogue.models import Application, Artifact, Variant
from qoe_service.catalogue.passes import chains
from qoe_service.catalogue.sandboxed import footer
from qoe_service.errors import Conflict, InvalidInput, NotFound, TooLarge

MAX_MODEL_BYTES = 2 * 2**30 - 1  # the bound of one protobuf message
MAX_BUNDLE_BYTES = 4 * 2**30
BUNDLE, BUNDLE_SUFFIX = "bundle.zip", ".zip"
NAME = re.compile(r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$")
PRECISION = re.compile(r"^[a-z0-9-]{1,16}$")
FIELD = "file"
CHECKED = 0.8  # share of an import that is done before its speed is measured


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to become of a model: its name, and what is derived from it. ``base`` names the variant that an
    externally trained student stands in for."""

    name: str
    precision: str = "fp32"
    passes: Sequence[str] = ()
    base: str = ""
    provenance: dict[str, Any] | None = None


def check(wish: Wish, application: Application) -> None:
    """Raises InvalidInput naming the field, before anything is read."""
    if not NAME.match(wish.name):
        raise InvalidInput(
            "1 to 64 letters, digits, dots, dashes or underscores, starting with a letter or digit", field="name"
        )
    if not PRECISION.match(wish.precision):
        raise InvalidInput("1 to 16 lower-case letters, digits or dashes, for example fp32", field="precision")
    chains(wish.passes)
    _base_of(wish, application)


def import_model(
    *,
    application: Application,
    path: Path,
    name: str,
    passes: Sequence[str] = (),
    precision: str = "fp32",
    base: str = "",
    provenance: dict[str, Any] | None = None,
    now: datetime,
    watch: sandbox.Watch | None = None,
) -> Variant:
    """Keep the model at ``path`` as a variant that may be selected, and queue passes over it.

    ``path`` is an ONNX file, or a zip of one with its external data; with 2 GiB and more it becomes a container, which
    devices read like any other artifact. Importing the same model under the same name
    again changes nothing. Raises InvalidInput, TooLarge, Conflict, and sandbox.Cancelled when ``watch`` says so.
    """
    wish = Wish(name=name, precision=precision, passes=tuple(passes), base=base, provenance=provenance)
    check(wish, application)
    check_model_file(path)
    variant = _imported_before(application, path, name) or _import(application, path, wish, now, watch)
    applications.settle_baseline(variant=variant)
    jobs.queue_chains(base=variant, chains=chains(wish.passes), now=now)
    profiles.measure_on_server(variant=variant, watch=watch, now=now)
    return variant


def check_model_file(path: Path, *, size_bytes: int | None = None) -> None:
    """Raises InvalidInput or TooLarge before a byte is read; without ``size_bytes`` the file must be there."""
    may_be_large = path.suffix.lower() == BUNDLE_SUFFIX
    if size_bytes is None:
        datasets.check_file(path, field=FIELD, max_bytes=MAX_BUNDLE_BYTES)
        size_bytes = path.stat().st_size
        may_be_large |= _is_container(path, size_bytes)
    most = MAX_BUNDLE_BYTES if may_be_large else MAX_MODEL_BYTES
    if size_bytes > most:
        hint = "" if may_be_large else "; hand in a zip of the graph and its external data"
        raise TooLarge(f"{path.name} is larger than {most} bytes{hint}", field=FIELD)


def _is_container(path: Path, size_bytes: int) -> bool:
    with path.open("rb") as file:
        file.seek(max(size_bytes - footer.FOOTER.size, 0))
        return footer.span_of_graph(file.read(), size_bytes) is not None


def _base_of(wish: Wish, application: Application) -> Variant | None:
    if not wish.base:
        return None
    base = application.variants.filter(name=wish.base).first()
    if base is None:
        raise NotFound(f"{application.name} has no variant {wish.base[:64]!r}", field="base")
    return base


def _imported_before(application: Application, path: Path, name: str) -> Variant | None:
    """The finished variant of an earlier import of these very bytes under this name."""
    same = Variant.objects.filter(application=application, name=name).first()
    if same is None or (same.accuracy is None and application.dataset_id):
        return None
    return same if artifacts.digest_of(path) == same.artifact_id else None


def _import(application: Application, path: Path, wish: Wish, now: datetime, watch: sandbox.Watch | None) -> Variant:
    with sandbox.opened() as box:
        try:
            memory = _put_model(box, path, watch)
            datasets.add_to(box, application)
            evaluation.add_reference(box, application)
            request = {"command": "measure", "memory": memory, **evaluation.first_look()}
            measured = evaluation.measure(box, request, watch=watch)
            # stored from the private copy: what was checked is what is kept
            with box.open(MODEL) as checked:
                artifact = artifacts.store(checked, now=now, weights=measured.weights)
        except sandbox.Refused as refusal:
            raise InvalidInput(f"{path.name} is refused: {refusal}", field=FIELD) from None
    if watch is not None and not watch(CHECKED):
        raise sandbox.Cancelled
    with transaction.atomic():
        return _keep(application, artifact, measured, wish, now)


def _put_model(box: sandbox.Sandbox, path: Path, watch: sandbox.Watch | None) -> dict[str, Any]:
    """The model as one file in the sandbox, and what measuring it needs of memory beside what its layers hold."""
    size = path.stat().st_size
    factor = sandbox.MEASURING_FACTOR if size <= MAX_MODEL_BYTES else sandbox.CONTAINER_FACTOR
    memory = sandbox.check_memory(box.limits, size, factor, what="checking it")
    if path.suffix.lower() != BUNDLE_SUFFIX:
        box.add(MODEL, path.open("rb"))
        return memory
    box.add(BUNDLE, path.open("rb"))
    request = {"command": "join-model", "bundle": BUNDLE, "at_most": MAX_MODEL_BYTES}
    box.ask(request, program="sandboxed.intake", watch=watch)
    return memory


def _keep(
    application: Application, artifact: Artifact, measured: evaluation.Measured, wish: Wish, now: datetime
) -> Variant:
    variant = Variant.objects.filter(application=application, artifact=artifact).first()
    if variant is not None and variant.name != wish.name:
        raise Conflict(f"the same model is there already, as {variant.name!r}", field="name")
    if variant is None:
        if Variant.objects.filter(application=application, name=wish.name).exists():
            raise Conflict(f"another model is there already as {wish.name!r}", field="name")
        variant = Variant.objects.create(
            application=application,
            artifact=artifact,
            base=_base_of(wish, application),
            name=wish.name,
            precision=wish.precision,
            provenance={"opset": measured.facts.opset, **(wish.provenance or {})},
            created_at=now,
            **measured.as_fields(application.dataset_id),
        )
    else:
        evaluation.record(variant, measured, dataset=application.dataset_id)
    jobs.queue_accuracy(variant=variant, measured=measured, now=now)
    return variant
