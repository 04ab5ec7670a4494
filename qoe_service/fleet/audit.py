"""Writes down who did what to which thing."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from qoe_service.fleet.models import AuditEntry


def record(*, actor: str, verb: str, subject: str, now: datetime, detail: dict[str, Any] | None = None) -> AuditEntry:
    """One line of the audit log. ``actor`` is an operator's name, ``device:ID`` or ``command``."""
    return AuditEntry.objects.create(
        at=now, actor=actor[:150], verb=verb[:64], subject=subject[:150], detail=detail or {}
    )
