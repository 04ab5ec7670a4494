"""Celery tasks: messages only say "look"; closed leases and the log are rows."""

from __future__ import annotations

import logging
import os
import socket
import uuid

from celery import shared_task
from django.db.models import F
from django.utils import timezone
from kombu.exceptions import OperationalError

from qoe_service.catalogue.models import Application
from qoe_service.decisions import feedback, learning
from qoe_service.observability import adopt_trace_id, new_trace_id

logger = logging.getLogger(__name__)
# Tells processes on one host apart even when a process id is used again.
_BORN = uuid.uuid4().hex[:8]
# A version takes at most learning.EVENTS_AT_ONCE events; one call catches up with a long log.
VERSIONS_AT_ONCE = 20


@shared_task
def close_due() -> None:
    """Join leases whose waiting time is over, and wake the learner if a log grew."""
    adopt_trace_id(new_trace_id())
    if feedback.close_due(now=timezone.now()):
        wake_learner()


@shared_task
def learn() -> None:
    """Learn what joined, for every application."""
    adopt_trace_id(new_trace_id())
    behind = Application.objects.filter(learner__last_event_number__gt=F("learner__learnt_through"))
    for application in behind:
        try:
            _catch_up(application)
        except Exception:
            logger.exception("learning failed application=%s", application.pk)


def wake_learner() -> None:
    """Ask for a look now; when the broker is away, beat's rescan does the same a little later."""
    try:
        learn.apply_async(retry=False)
    except (OperationalError, OSError) as error:
        logger.warning("learner not woken: the next scan finds it error=%s", error)


def _catch_up(application: Application) -> None:
    owner = f"{socket.gethostname()}:{os.getpid()}:{_BORN}"
    for _ in range(VERSIONS_AT_ONCE):
        if learning.learn(application=application, owner=owner[-100:], now=timezone.now()) is None:
            return
