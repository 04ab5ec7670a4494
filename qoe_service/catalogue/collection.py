"""Which stored bytes nothing refers to any more, and their removal.

Every text column whose name ends in ``digest``, in any table, keeps the artifact that it names: variants, data sets,
decisions, what devices run, fall back to or are banned from. So an app above this one need not be asked, and a new
table is safe from its first row on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from django.apps import apps
from django.conf import settings
from django.db import models, transaction
from django.db.models.functions import Coalesce

from qoe_service.catalogue import artifacts, storages
from qoe_service.catalogue.models import Artifact, Upload, UploadPart

_ARTIFACT_NAME = re.compile(r"^sha256/[0-9a-f]{2}/([0-9a-f]{64})$")
BATCH = 500


class Collected(NamedTuple):
    """One file that went, or would go."""

    name: str
    size_bytes: int
    reason: str


def collect(*, now: datetime, is_dry_run: bool = False) -> list[Collected]:
    """Remove what nothing refers to, but nothing younger than ``ARTIFACT_KEEP_S``; a dry run only lists it."""
    before = now - timedelta(seconds=settings.ARTIFACT_KEEP_S)
    return [
        *_unreferenced_artifacts(before, is_dry_run),
        *([] if is_dry_run else _unreferenced_artifacts(before, is_dry_run)),  # pieces that only those held
        *_files_without_row(before, is_dry_run),
        *_leftover_parts(before, is_dry_run),
    ]


def references() -> Iterator[str]:
    """Every digest that some row names."""
    for model in apps.get_models():
        for field in model._meta.concrete_fields:
            if model is Artifact:
                continue
            is_reference = _is_reference(field)
            is_named = isinstance(field, models.CharField) and field.name.endswith("digest")
            if is_reference or is_named:
                found = model._default_manager.exclude(**{field.attname: None}).order_by().values_list(field.attname)
                yield from (digest for (digest,) in found.distinct().iterator(BATCH) if digest)
            elif isinstance(field, models.JSONField) and field.name.endswith("digests"):
                for (digests,) in model._default_manager.values_list(field.attname).iterator(BATCH):
                    yield from (each for each in digests or () if isinstance(each, str))


def _is_reference(field: models.Field[Any, Any]) -> bool:
    """Whether it keeps an artifact: a row that goes with its artifact, as the pieces of a whole do, does not."""
    if not isinstance(field, models.ForeignKey) or field.related_model is not Artifact:
        return False
    return field.remote_field.on_delete is not models.CASCADE


def _unreferenced_artifacts(before: datetime, is_dry_run: bool) -> Iterator[Collected]:
    old = Artifact.objects.alias(seen_at=Coalesce("stored_at", "created_at")).filter(seen_at__lt=before)
    candidates = dict(old.values_list("digest", "size_bytes"))
    for digest in references():
        candidates.pop(digest, None)
    for digest, size_bytes in candidates.items():
        if is_dry_run or _remove(digest, before):
            yield Collected(artifacts.name_of(digest), size_bytes, "no row names it")


def _remove(digest: str, before: datetime) -> bool:
    """The row and its bytes in one transaction: who stores the same bytes meanwhile waits, then finds them missing."""
    with transaction.atomic():
        old = Artifact.objects.alias(seen_at=Coalesce("stored_at", "created_at")).filter(seen_at__lt=before)
        try:
            # a savepoint: a variant that appeared meanwhile protects its artifact
            with transaction.atomic():
                removed, _ = Artifact.objects.filter(pk__in=old.filter(pk=digest).values("pk")).delete()
        except models.ProtectedError:
            return False
        if removed:
            storages.delete(artifacts.name_of(digest))
    return bool(removed)


def _files_without_row(before: datetime, is_dry_run: bool) -> Iterator[Collected]:
    """What a worker that was killed between the bytes and the row left behind."""
    for kept in storages.names("sha256"):
        match = _ARTIFACT_NAME.match(kept.name)
        if match is None or kept.changed_at >= before or Artifact.objects.filter(pk=match[1]).exists():
            continue
        if not is_dry_run:
            storages.delete(kept.name)
        yield Collected(kept.name, kept.size_bytes, "it is no artifact")


def _leftover_parts(before: datetime, is_dry_run: bool) -> Iterator[Collected]:
    """Parts that lost a race, and those of uploads that have ended or are gone."""
    for kept in storages.names("uploads"):
        parts = UploadPart.objects.filter(name=kept.name)
        if kept.changed_at >= before or parts.filter(upload__state__in=Upload.OPEN_STATES).exists():
            continue
        if not is_dry_run:
            storages.delete(kept.name)
            parts.delete()
        yield Collected(kept.name, kept.size_bytes, "its upload has ended")
