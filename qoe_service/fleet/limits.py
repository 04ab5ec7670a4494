"""Requests per minute and caller, counted in fixed windows in the Django cache.

With Redis the cache is shared and so is the count; without, each web process counts for itself.
"""

from __future__ import annotations

import logging
import math
from datetime import datetime

from django.core.cache import cache
from redis.exceptions import RedisError

from qoe_service.errors import TooManyRequests

logger = logging.getLogger(__name__)
WINDOW_S = 60


def take(*, caller: str, limit: int, now: datetime) -> None:
    """Count one request of ``caller``; refuse it once ``limit`` requests of this minute are used up."""
    window, elapsed_s = divmod(now.timestamp(), WINDOW_S)
    if _count(f"limit:{caller}:{int(window)}") > limit:
        raise TooManyRequests(
            f"more than {limit} requests in a minute", retry_after_s=max(1, math.ceil(WINDOW_S - elapsed_s))
        )


class _Cache:
    """Whether the cache answered last time, so that an outage is logged once."""

    is_away = False


def _count(key: str) -> int:
    try:
        count = 1 if cache.add(key, 1, timeout=2 * WINDOW_S) else cache.incr(key)
    except ValueError:  # the entry went between the two calls
        return 1
    except RedisError as error:
        # A cache that is away must not keep devices out: feedback matters more than fairness.
        if not _Cache.is_away:
            logger.warning("rate limits are off: the cache is away error=%s", error)
        _Cache.is_away = True
        return 0
    _Cache.is_away = False
    return count
