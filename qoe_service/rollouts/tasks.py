"""Background work of rollouts. Messages only say "look": every task finds its work in the database."""

from __future__ import annotations

import logging

from celery import shared_task
from django.conf import settings
from django.utils import timezone

from qoe_service import broker
from qoe_service.observability import adopt_trace_id, new_trace_id
from qoe_service.rollouts import changes, ranking_times, reconcile

logger = logging.getLogger(__name__)
DEVICES_AT_ONCE = 500


@shared_task
def reconcile_device(device_id: str, trace_id: str = "") -> None:
    """Make the decisions that are due for one device."""
    trace_id = trace_id.strip("-") or new_trace_id()
    adopt_trace_id(trace_id)
    reconcile.reconcile(device_id=device_id, trace_id=trace_id, now=timezone.now())
    ranking_times.store()


@shared_task
def reconcile_due() -> None:
    """Find devices with decisions due, whether or not somebody said so."""
    reconcile.assign_applications()
    devices = reconcile.ready(now=timezone.now()).values_list("device_id", flat=True)[:DEVICES_AT_ONCE]
    for device_id in dict.fromkeys(devices):
        try:
            reconcile_device(device_id)
        except Exception:  # one device's trouble must not stop the others
            logger.exception("reconcile failed device=%s", device_id)


@shared_task
def prune() -> None:
    """Forget old changes, and what crashes left of messages."""
    now = timezone.now()
    changes.prune(now=now)
    if not settings.REDIS_URL:
        broker.sweep(settings.BROKER_DIR, now_s=now.timestamp())
