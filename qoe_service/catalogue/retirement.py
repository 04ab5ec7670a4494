"""Takes variants out of use and back: decisions choose from those in use; what runs goes on to its lease's end."""

from __future__ import annotations

from datetime import datetime

from django.db import transaction

from qoe_service.catalogue import jobs
from qoe_service.catalogue.models import Application, Variant
from qoe_service.errors import Conflict, NotFound
from qoe_service.fleet import audit


def get(application: Application, name: str) -> Variant:
    """The variant of this name. Raises NotFound."""
    variant = application.variants.select_related("application", "artifact", "base").filter(name=name).first()
    if variant is None:
        raise NotFound(f"{application.name} has no variant {name[:100]!r}", field="variant")
    return variant


def retire(*, variant: Variant, actor: str, now: datetime) -> bool:
    """Choose it no more; False when that is so already. Raises Conflict for the safe baseline."""
    if variant.artifact_id == variant.application.baseline_digest:
        raise Conflict(f"{variant.name} is the safe baseline; name another one first", field="variant")
    return _set(variant, retired_at=None, wanted=now, verb="retire_variant", actor=actor, now=now)


def restore(*, variant: Variant, actor: str, now: datetime) -> bool:
    """Let it be chosen again; False when it may be already. Data that came meanwhile is asked what it is worth."""
    if variant.retired_at is None:
        return False
    with transaction.atomic():
        is_new = _set(variant, retired_at=variant.retired_at, wanted=None, verb="restore_variant", actor=actor, now=now)
        if is_new and variant.application.dataset_id:
            jobs.queue_accuracy_anew(variant=variant, now=now)
    return is_new


def _set(
    variant: Variant, *, retired_at: datetime | None, wanted: datetime | None, verb: str, actor: str, now: datetime
) -> bool:
    with transaction.atomic():
        if not Variant.objects.filter(pk=variant.pk, retired_at=retired_at).update(retired_at=wanted):
            return False
        subject = f"variant:{variant.application_id}/{variant.name}"
        audit.record(actor=actor, verb=verb, subject=subject, now=now, detail={"digest": variant.artifact_id})
    variant.retired_at = wanted
    return True
