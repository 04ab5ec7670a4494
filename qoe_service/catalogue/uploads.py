"""Files on their way in over HTTP: received in parts of at most one request, resumed by offset, then taken in by a
worker. Parts lie in the artifact storage, so that any web process may receive any part and none holds a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path, PurePath
from typing import Any

from django.conf import settings
from django.core.files.base import ContentFile
from django.db import transaction
from django.db.models import F, Q
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qoe_service.catalogue import artifacts, claims, datasets, imports, jobs, packages, sandbox, storages
from qoe_service.catalogue.models import Application, Upload, UploadPart, Variant, Work
from qoe_service.errors import Conflict, InvalidInput, NotFound, ServiceError, TooLarge, Unavailable

log = logging.getLogger(__name__)

OPEN_AT_ONCE = 16
SPARE_BYTES = 2**28
FOLDER = "uploads"
KINDS = {".onnx": "model", ".npz": "data", ".ortpackage": "package", ".zip": "model"}
MAX_BYTES = {"data": datasets.MAX_BYTES, "package": imports.MAX_BUNDLE_BYTES}
OPEN = Q(state__in=Work.OPEN_STATES)


class Options(BaseModel):
    """What is to become of the file. Which fields count depends on its kind."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(default="", max_length=64)
    precision: str = Field(default="fp32", max_length=16)
    passes: list[str] = Field(default_factory=list, max_length=64)
    base: str = Field(default="", max_length=100, description="the variant that a student was trained to stand in for")
    inputs_key: str = Field(default="", max_length=100)
    labels_key: str = Field(default="", max_length=100)


def kind_of(file_name: str) -> str:
    """model, data or package, by the name alone. Raises InvalidInput.

    >>> kind_of("digits.ortpackage.zip")
    'package'
    """
    suffixes = PurePath(file_name).suffixes
    is_package = ".ortpackage" in suffixes[-2:]
    kind = "package" if is_package else KINDS.get(suffixes[-1].lower() if suffixes else "")
    if kind is None:
        raise InvalidInput(
            ".onnx, .zip (a model with external data), .npz (data) and .ortpackage.zip are taken", field="file_name"
        )
    return kind


def begin(
    *,
    application: Application,
    file_name: str,
    size_bytes: int,
    options: Mapping[str, Any],
    sha256: str = "",
    actor: str = "",
    now: datetime,
) -> Upload:
    """Announce a file; its parts may come then. Raises InvalidInput, TooLarge, Conflict, Unavailable."""
    plain = PurePath(file_name.replace("\\", "/")).name[:200]
    kind = kind_of(plain)
    given = _options(options)
    _check(application, kind, plain, size_bytes, given)
    with transaction.atomic():
        if Upload.objects.filter(OPEN, application=application).count() >= OPEN_AT_ONCE:
            raise Conflict(f"{application.name} has {OPEN_AT_ONCE} open uploads; finish or cancel one", field="upload")
        return Upload.objects.create(
            id=uuid.uuid4().hex,
            application=application,
            kind=kind,
            file_name=plain,
            size_bytes=size_bytes,
            sha256=sha256,
            options=given.model_dump(),
            actor=actor,
            state=Upload.State.RECEIVING,
            created_at=now,
            touched_at=now,
        )


def get(upload_id: str) -> Upload:
    """The upload of this id. Raises NotFound."""
    upload = Upload.objects.select_related("application", "result").filter(pk=upload_id).first()
    if upload is None:
        raise NotFound(f"no upload {upload_id[:64]!r}", field="upload")
    return upload


def append(*, upload: Upload, offset: int, total_bytes: int, part: bytes, now: datetime) -> Upload:
    """Take in the next part; with the last one the file waits for a worker.

    Raises Conflict, naming the offset to go on from, when this is not the next part.
    """
    if upload.state != Upload.State.RECEIVING:
        raise Conflict(f"the upload is {upload.state}", field="upload")
    if total_bytes != upload.size_bytes or offset + len(part) > upload.size_bytes:
        raise InvalidInput(f"the upload was announced with {upload.size_bytes} bytes", field="Content-Range")
    if offset != upload.received_bytes:
        raise Conflict(f"the next part begins at {upload.received_bytes}", field="Content-Range")
    # the name tells two senders of the same offset apart; only one of them gets its row
    name = f"{FOLDER}/{upload.pk}/{offset:013d}-{hashlib.sha256(part).hexdigest()[:16]}"
    storages.save(name, ContentFile(part))
    with transaction.atomic():
        is_next = Upload.objects.filter(pk=upload.pk, state=Upload.State.RECEIVING, received_bytes=offset)
        if not is_next.update(received_bytes=F("received_bytes") + len(part), touched_at=now):
            raise Conflict("another part came first; ask for the offset to go on from", field="Content-Range")
        UploadPart.objects.create(upload=upload, offset=offset, size_bytes=len(part), name=name)
        complete = Upload.objects.filter(pk=upload.pk, received_bytes=F("size_bytes"))
        complete.update(state=Upload.State.QUEUED)
    return get(upload.pk)


def cancel(*, upload_id: str, now: datetime) -> bool:
    """Stop an upload or its import; the importing worker notices within a second. False when it has ended already."""
    stopped = claims.cancel(Upload.objects.filter(pk=get(upload_id).pk), now)
    return bool(stopped)


def runnable(*, now: datetime) -> list[str]:
    """Ids of uploads that a worker may take in now. Ends those that nobody continues, and drops parts of ended ones."""
    claims.give_up(Upload.objects.all(), now)
    idle = Upload.objects.filter(
        state=Upload.State.RECEIVING, touched_at__lt=now - timedelta(seconds=settings.UPLOAD_TTL_S)
    )
    claims.cancel(idle, now, error="nobody sent the rest in time")
    for ended in Upload.objects.exclude(OPEN).filter(parts__isnull=False).distinct()[:10]:
        drop_parts(ended)
    free = settings.COMPRESSION_JOBS - claims.running(Upload.objects.all(), now)
    waiting = Upload.objects.filter(claims.claimable(now)).order_by("created_at")
    return list(waiting.values_list("id", flat=True)[: max(free, 0)])


def run(*, upload_id: str, clock: Callable[[], datetime]) -> Upload | None:
    """Take in a complete upload; None when somebody else does. Safe to call any number of times."""
    rows = Upload.objects.filter(pk=upload_id).select_related("application")
    upload = claims.claim(rows, clock(), at_once=settings.COMPRESSION_JOBS)
    if upload is None:
        return None

    def watch(progress: float) -> bool:
        return claims.beat(upload, progress=progress, now=clock())

    try:
        with _assembled(upload, watch) as path:
            variant, notes = _take_in(upload, path, watch, clock)
        claims.finish(upload, state=Upload.State.DONE, result=variant, error=notes, now=clock())
    except (ServiceError, sandbox.Refused) as refusal:
        claims.finish(upload, state=Upload.State.REFUSED, error=str(refusal), now=clock())
    except sandbox.Cancelled:
        log.info("upload stopped upload=%s", upload.pk)
    upload.refresh_from_db()
    if not upload.is_open:
        drop_parts(upload)
    log.info("upload ended upload=%s state=%s variant=%s", upload.pk, upload.state, upload.result_id)
    return upload


def drop_parts(upload: Upload) -> None:
    """Remove the bytes of an upload that has ended."""
    for part in upload.parts.all():
        storages.delete(part.name)
        part.delete()


def _take_in(
    upload: Upload, path: Path, watch: sandbox.Watch, clock: Callable[[], datetime]
) -> tuple[Variant | None, str]:
    """The variant that the file became, and what else an operator should know."""
    options, application = _options(upload.options), upload.application
    if upload.kind == Upload.Kind.DATA:
        keys = {"labels_key": options.labels_key, "inputs_key": options.inputs_key}
        dataset = datasets.import_dataset(path=path, now=clock(), watch=watch, **keys)
        if datasets.replace(application=application, dataset=dataset):
            jobs.queue_all_accuracies(application=application, now=clock())
        return None, ""
    if upload.kind == Upload.Kind.PACKAGE:
        found = packages.import_package(
            application=application, path=path, passes=options.passes, watch=watch, now=clock()
        )
        return found.variants[0], "; ".join(found.notes)
    variant = imports.import_model(
        application=application,
        path=path,
        name=options.name,
        passes=options.passes,
        precision=options.precision,
        base=options.base,
        now=clock(),
        watch=watch,
    )
    return variant, ""


def _options(given: Mapping[str, Any]) -> Options:
    try:
        return Options.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(first["msg"], field=".".join(["options", *(str(part) for part in first["loc"])])) from None


def _check(application: Application, kind: str, file_name: str, size_bytes: int, options: Options) -> None:
    """Raises before a byte is sent what would only be raised after all were."""
    if size_bytes < 1:
        raise InvalidInput("the file is empty", field="size_bytes")
    if kind == "model":
        options.name = options.name or PurePath(file_name).stem
        imports.check_model_file(Path(file_name), size_bytes=size_bytes)
        wish = imports.Wish(options.name, options.precision, tuple(options.passes), options.base)
        imports.check(wish, application)
    elif size_bytes > MAX_BYTES[kind]:
        raise TooLarge(f"{file_name} is larger than {MAX_BYTES[kind]} bytes", field="size_bytes")
    free = storages.free_bytes()
    if free is not None and size_bytes * 3 + SPARE_BYTES > free:
        raise Unavailable(f"the artifact folder has {free} bytes left, and this file needs three times its size")


@contextlib.contextmanager
def _assembled(upload: Upload, watch: sandbox.Watch) -> Iterator[Path]:
    """The whole file under its own name, in a folder that goes away with it. Raises InvalidInput when it is damaged."""
    with tempfile.TemporaryDirectory(dir=artifacts.incoming_folder()) as folder:
        path, sha256 = Path(folder) / upload.file_name, hashlib.sha256()
        with path.open("xb") as file:
            for part in upload.parts.all():
                with storages.read(part.name) as stream:
                    content = stream.read()
                sha256.update(content)
                file.write(content)
                if not watch(0.0):
                    raise sandbox.Cancelled
        if upload.sha256 and sha256.hexdigest() != upload.sha256:
            raise InvalidInput("it arrived damaged: its sha256 is not the one announced", field="sha256")
        yield path
