"""REST view of applications, their variants and their exports, for operators and for apps with a key."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import datetime

from asgiref.sync import sync_to_async
from django.http import HttpRequest, StreamingHttpResponse
from ninja import Router, Schema
from ninja.security import SessionAuth

from device_agents.wire import Name
from qoe_service.catalogue import applications, packages
from qoe_service.catalogue.evaluation import Cut
from qoe_service.catalogue.intake_api import router as intake
from qoe_service.catalogue.models import Application, Variant
from qoe_service.catalogue.profiling_api import router as profiling
from qoe_service.errors import NotPermitted
from qoe_service.fleet.api import ApplicationAuth
from qoe_service.fleet.models import ApplicationKey


class ApplicationOut(Schema):
    """What an application asks of its variants, and what may be chosen for it."""

    name: str
    title: str
    slo_p95_ms: float
    minimum_accuracy: float
    configurations: list[dict[str, int | bool]]
    baseline_variant: str
    lease_s: float


class VariantOut(Schema):
    """One variant and what was measured about it; accuracy holds for the instruction sets named beside it.

    ``accuracy_kind`` says what it is a share of; ``is_judged_by_former_data`` that newer data are there to judge it by;
    ``cuts`` where the variant can be cut in two, or why it cannot.
    """

    name: str
    digest: str
    size_bytes: int
    precision: str
    compression_pass: str
    base: str | None
    accuracy: float | None
    accuracy_kind: str
    accuracy_low: float | None
    accuracy_high: float | None
    accuracy_samples: int
    accuracy_isa: str
    is_judged_by_former_data: bool
    memory_bytes: int
    is_selectable: bool
    cuts: list[Cut]
    no_cuts_because: str
    provenance: dict[str, object]
    created_at: datetime
    retired_at: datetime | None

    @classmethod
    def of(cls, variant: Variant) -> VariantOut:
        """A row as the API shows it."""
        elsewhere = {"digest", "size_bytes", "base", "cuts", "no_cuts_because"}
        own = {name: getattr(variant, name) for name in cls.model_fields if name not in elsewhere}
        own |= {"cuts": variant.details.get("cuts", []), "no_cuts_because": variant.details.get("no_cuts_because", "")}
        base = variant.base.name if variant.base else None
        return cls(digest=variant.artifact_id, size_bytes=variant.artifact.size_bytes, base=base, **own)


router = Router(tags=["catalogue"], auth=[SessionAuth(), ApplicationAuth()])
router.add_router("", intake)
router.add_router("", profiling)


@router.get("/applications", response=list[ApplicationOut])
def list_applications(request: HttpRequest) -> list[Application]:
    """All applications; for an application key, its own."""
    key = _key_of(request)
    rows = Application.objects.all() if key is None else Application.objects.filter(name=key.application)
    return list(rows)


@router.get("/applications/{name}/variants", response=list[VariantOut])
def list_variants(request: HttpRequest, name: Name) -> list[VariantOut]:
    """An application's variants, retired ones too."""
    key = _key_of(request)
    if key is not None and key.application != name:
        raise NotPermitted("this key belongs to another application", field="name")
    rows = applications.get(name).variants.select_related("artifact", "base")
    return [VariantOut.of(row) for row in rows]


@router.get("/applications/{name}/export")
def export(request: HttpRequest, name: Name, format: str = "zip") -> StreamingHttpResponse:  # noqa: A002 - a word of URLs
    """All variants in use as one zip with a manifest, or as an ONNX Runtime model package (``ortpackage``)."""
    key = _key_of(request)
    if key is not None and key.application != name:
        raise NotPermitted("this key belongs to another application", field="name")
    content = packages.export(applications.get(name), format)
    suffix = ".ortpackage.zip" if format == "ortpackage" else ".zip"
    headers = {"Content-Disposition": f'attachment; filename="{name}{suffix}"', "X-Content-Type-Options": "nosniff"}
    return StreamingHttpResponse(_unhurried(content), content_type="application/zip", headers=headers)


async def _unhurried(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    # given a plain iterator, Django would hold the whole of it in memory
    while chunk := await sync_to_async(lambda: next(chunks, b""))():
        yield chunk


def _key_of(request: HttpRequest) -> ApplicationKey | None:
    """The application key; None for a logged-in operator."""
    who = getattr(request, "auth", None)
    return who if isinstance(who, ApplicationKey) else None
