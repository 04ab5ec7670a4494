"""Versions of desired documents, and the word that one changed. The rows are the truth; Redis only says "look"."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from functools import cache

from django.conf import settings
from django.db import transaction
from django.db.models import F
from redis import Redis
from redis.exceptions import RedisError

from qoe_service.rollouts.models import Change, DesiredVersion

logger = logging.getLogger(__name__)
CHANNEL = "qoe:changes"
KEPT = timedelta(hours=1)
# PostgreSQL may show row 7 before row 6, so a watcher reads this many rows again.
OVERLAP = 100


def announce(*, device_id: str, now: datetime) -> int:
    """Give the device's document its next version and wake the device once this transaction is committed."""
    row = DesiredVersion.objects.filter(device=device_id)
    if not row.update(version=F("version") + 1, changed_at=now):
        DesiredVersion.objects.bulk_create([DesiredVersion(device_id=device_id, changed_at=now)], ignore_conflicts=True)
        row.update(version=F("version") + 1, changed_at=now)
    version = row.values_list("version", flat=True).get()
    Change.objects.create(device_id=device_id, version=version, changed_at=now)
    if settings.REDIS_URL:
        transaction.on_commit(lambda: _publish(device_id))
    return version


def changes_after(last_id: int | None) -> list[tuple[int, str, int]]:
    """Rows (id, device, version) above ``last_id`` and a few before it; without it, the newest few."""
    if last_id is None:
        last_id = Change.objects.order_by("-pk").values_list("pk", flat=True).first() or 0
    rows = Change.objects.filter(pk__gt=last_id - OVERLAP).order_by("pk")
    return list(rows.values_list("pk", "device_id", "version"))


def prune(*, now: datetime) -> int:
    """Forget changes that every watcher has long seen; how many."""
    return Change.objects.filter(changed_at__lt=now - KEPT).delete()[0]


def _publish(device_id: str) -> None:
    try:
        _redis(settings.REDIS_URL).publish(CHANNEL, device_id)
    except RedisError as error:
        logger.warning("wake-up not published: watchers will find the row device=%s error=%s", device_id, error)


@cache
def _redis(url: str) -> Redis:
    return Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1)
