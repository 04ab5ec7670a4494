"""Database connections of threads that outlive a request."""

from __future__ import annotations

import math
import threading
import time

from django.db import connection

IDLE_S = 1.0
_used = threading.local()


def keep_connection() -> None:
    """This thread's connection stays open for its next use too; one that lay idle is checked before it.

    The settings end a connection with its request, because under ASGI most requests have a thread of their own. Who
    finds a connection broken in use must close it.
    """
    connection.close_at = None
    now_s = time.monotonic()
    if now_s - getattr(_used, "at_s", -math.inf) > IDLE_S:
        connection.close_if_unusable_or_obsolete()
    _used.at_s = now_s
