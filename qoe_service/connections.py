"""Database connections of threads that outlive a request."""

from __future__ import annotations

from django.db import connection


def keep_connection() -> None:
    """This thread's connection stays open for its next use too, unless that finds it broken.

    The settings end a connection with its request, because under ASGI most requests have a thread of their own.
    """
    connection.close_at = None
    connection.close_if_unusable_or_obsolete()
