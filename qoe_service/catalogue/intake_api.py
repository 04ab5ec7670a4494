"""REST for operators: uploads in parts, jobs, and which variants are in use."""

# ruff: noqa: ARG001 - ninja hands the request to every endpoint

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any

from django.conf import settings
from django.contrib.auth.models import AbstractBaseUser
from django.http import HttpRequest
from django.utils import timezone
from ninja import Header, Router, Schema, Status
from ninja.security import SessionAuth
from pydantic import Field

from device_agents.wire import Name
from qoe_service.catalogue import applications, jobs, retirement, roles, tasks, uploads
from qoe_service.catalogue.models import Job, Upload
from qoe_service.catalogue.passes import FAMILY, PASSES, WHOLE_FAMILY, chains
from qoe_service.errors import Conflict, InvalidInput

router = Router(tags=["catalogue"], auth=SessionAuth())
_CONTENT_RANGE = re.compile(r"^bytes (\d{1,15})-(\d{1,15})/(\d{1,15})$")
MAX_LISTED = 200
Id = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
VariantName = Annotated[str, Field(pattern=r"^[^\x00/]{1,100}$")]


class UploadIn(Schema):
    """A file that is announced. Its name says what it is: .onnx, .zip, .npz or .ortpackage.zip."""

    file_name: Annotated[str, Field(min_length=1, max_length=200)]
    size_bytes: Annotated[int, Field(ge=1, le=2**42)]
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    options: dict[str, Any] = Field(default_factory=dict, description="name, precision, passes, base, *_key")


class UploadOut(Schema):
    """Where an upload stands. The next part begins at ``received_bytes`` and has at most ``part_bytes``."""

    id: str
    application: str
    kind: str
    file_name: str
    size_bytes: int
    sha256: str
    received_bytes: int
    part_bytes: int
    state: str
    progress: float
    error: str
    variant: str | None
    created_at: datetime
    finished_at: datetime | None

    @classmethod
    def of(cls, upload: Upload) -> UploadOut:
        """A row as the API shows it."""
        own = {name: getattr(upload, name) for name in cls.model_fields if hasattr(upload, name)}
        result = upload.result.name if upload.result else None
        own |= {"application": upload.application_id, "part_bytes": settings.MAX_BODY_BYTES, "variant": result}
        return cls(**own)


class JobOut(Schema):
    """Where a job stands."""

    id: int
    application: str
    base: str
    compression_pass: str
    parameters: dict[str, Any]
    after: int | None
    state: str
    progress: float
    attempts: int
    error: str
    result: str | None
    created_at: datetime
    finished_at: datetime | None

    @classmethod
    def of(cls, job: Job) -> JobOut:
        """A row as the API shows it."""
        own = {name: getattr(job, name) for name in cls.model_fields}
        own |= {"application": job.application_id, "base": job.base.name, "after": job.after_id}
        return cls(**{**own, "result": job.result.name if job.result else None})


class PassOut(Schema):
    """What can be asked for by name."""

    name: str
    precision: str
    parameters: dict[str, Any]
    made_for: str


class PassesIn(Schema):
    """Passes, chains of them (``first+second``), or ``family`` for all."""

    passes: Annotated[list[str], Field(min_length=1, max_length=64)]


class PassesOut(Schema):
    """What there is to ask for."""

    passes: list[PassOut]
    family: list[str]
    whole_family: str


@router.get("/passes", response=PassesOut)
def list_passes(request: HttpRequest) -> PassesOut:
    """Every compression pass, and what ``family`` stands for."""
    rows = [
        PassOut(name=each.name, precision=each.precision, parameters=dict(each.parameters), made_for=each.made_for)
        for each in PASSES.values()
    ]
    return PassesOut(passes=rows, family=list(FAMILY), whole_family=WHOLE_FAMILY)


@router.post("/applications/{name}/uploads", response={201: UploadOut})
def begin_upload(request: HttpRequest, name: Name, body: UploadIn) -> Status[UploadOut]:
    """Announce a file; its parts follow by PUT."""
    roles.require(request.user, roles.UPLOAD)
    upload = uploads.begin(
        application=applications.get(name), actor=_actor(request), now=timezone.now(), **body.model_dump()
    )
    return Status(201, UploadOut.of(upload))


@router.get("/applications/{name}/uploads", response=list[UploadOut])
def list_uploads(request: HttpRequest, name: Name) -> list[UploadOut]:
    """The application's uploads, newest first."""
    rows = applications.get(name).uploads.select_related("result")[:MAX_LISTED]
    return [UploadOut.of(row) for row in rows]


@router.get("/uploads/{upload_id}", response=UploadOut)
def read_upload(request: HttpRequest, upload_id: Id) -> UploadOut:
    """Where an upload stands, and from which byte to go on."""
    return UploadOut.of(uploads.get(upload_id))


@router.put("/uploads/{upload_id}", response=UploadOut)
def continue_upload(
    request: HttpRequest, upload_id: Id, content_range: Annotated[str, Header(alias="Content-Range")]
) -> UploadOut:
    """The next part as the raw body; ``Content-Range: bytes FIRST-LAST/TOTAL`` says which."""
    roles.require(request.user, roles.UPLOAD)
    first, total = _range(content_range, len(request.body))
    upload = uploads.append(
        upload=uploads.get(upload_id), offset=first, total_bytes=total, part=request.body, now=timezone.now()
    )
    if upload.state == Upload.State.QUEUED:
        tasks.wake_workers()
    return UploadOut.of(upload)


@router.delete("/uploads/{upload_id}", response=UploadOut)
def cancel_upload(request: HttpRequest, upload_id: Id) -> UploadOut:
    """Stop sending, or stop the import. What was sent goes away."""
    roles.require(request.user, roles.UPLOAD)
    if not uploads.cancel(upload_id=upload_id, now=timezone.now()):
        raise Conflict("the upload has ended already", field="upload")
    return UploadOut.of(uploads.get(upload_id))


@router.get("/applications/{name}/jobs", response=list[JobOut])
def list_jobs(request: HttpRequest, name: Name) -> list[JobOut]:
    """The application's newest jobs, newest first."""
    rows = applications.get(name).jobs.select_related("base", "result").order_by("-id")[:MAX_LISTED]
    return [JobOut.of(row) for row in rows]


@router.get("/jobs/{job_id}", response=JobOut)
def read_job(request: HttpRequest, job_id: int) -> JobOut:
    """Where a job stands."""
    return JobOut.of(jobs.get(job_id))


@router.post("/jobs/{job_id}/cancel", response=JobOut)
def cancel_job(request: HttpRequest, job_id: int) -> JobOut:
    """Stop a job, and those that wait for it; a running one ends within two seconds."""
    roles.require(request.user, roles.UPLOAD)
    if not jobs.cancel(job_id=job_id, now=timezone.now(), actor=_actor(request)):
        raise Conflict(f"job {job_id} has ended already", field="job")
    return JobOut.of(jobs.get(job_id))


@router.post("/jobs/{job_id}/run-again", response=JobOut)
def run_job_again(request: HttpRequest, job_id: int) -> JobOut:
    """Queue a job that ended without a result once more; the answer has a new id."""
    roles.require(request.user, roles.UPLOAD)
    job = jobs.run_again(job_id=job_id, now=timezone.now())
    tasks.wake_workers()
    return JobOut.of(job)


@router.post("/applications/{name}/variants/{variant}/passes", response=list[JobOut])
def ask_for_passes(request: HttpRequest, name: Name, variant: VariantName, body: PassesIn) -> list[JobOut]:
    """Queue passes over a variant. Asking for what is there, or under way, changes nothing."""
    roles.require(request.user, roles.UPLOAD)
    base = retirement.get(applications.get(name), variant)
    queued = jobs.queue_chains(base=base, chains=chains(body.passes), now=timezone.now())
    tasks.wake_workers()
    return [JobOut.of(each) for each in queued]


@router.post("/applications/{name}/variants/{variant}/retire", response={204: None})
def retire_variant(request: HttpRequest, name: Name, variant: VariantName) -> Status[None]:
    """Choose a variant no more."""
    roles.require(request.user, roles.RETIRE)
    found = retirement.get(applications.get(name), variant)
    retirement.retire(variant=found, actor=_actor(request), now=timezone.now())
    return Status(204, None)


@router.post("/applications/{name}/variants/{variant}/restore", response={204: None})
def restore_variant(request: HttpRequest, name: Name, variant: VariantName) -> Status[None]:
    """Let a retired variant be chosen again."""
    roles.require(request.user, roles.RETIRE)
    found = retirement.get(applications.get(name), variant)
    retirement.restore(variant=found, actor=_actor(request), now=timezone.now())
    return Status(204, None)


def _range(header: str, body_bytes: int) -> tuple[int, int]:
    """First byte and total of a Content-Range that fits the body. Raises InvalidInput."""
    match = _CONTENT_RANGE.match(header)
    if match is None:
        raise InvalidInput("must be 'bytes FIRST-LAST/TOTAL'", field="Content-Range")
    first, last, total = (int(each) for each in match.groups())
    if not first <= last < total or last - first + 1 != body_bytes:
        raise InvalidInput(f"{header!r} does not fit a body of {body_bytes} bytes", field="Content-Range")
    return first, total


def _actor(request: HttpRequest) -> str:
    user: AbstractBaseUser | Any = request.user
    return str(user.get_username())
