"""Requests per minute and caller, counted in fixed windows: in Redis for all web processes, without it in each.

Every request is counted before it is answered, so Redis is asked once, not by Django's cache, which asks thrice.
"""

from __future__ import annotations

import functools
import logging
import math
from datetime import datetime
from typing import cast

from django.conf import settings
from django.core.cache import cache
from redis import Redis
from redis.exceptions import RedisError

from qoe_service.errors import TooManyRequests

logger = logging.getLogger(__name__)
WINDOW_S = 60
_away: set[str] = set()  # the Redis that did not answer last time: an outage is logged once


def take(*, caller: str, limit: int, now: datetime) -> None:
    """Count one request of ``caller``; refuse it once ``limit`` requests of this minute are used up."""
    window, elapsed_s = divmod(now.timestamp(), WINDOW_S)
    if _count(f"limit:{caller}:{int(window)}") > limit:
        raise TooManyRequests(
            f"more than {limit} requests in a minute", retry_after_s=max(1, math.ceil(WINDOW_S - elapsed_s))
        )


def _count(key: str) -> int:
    if not settings.REDIS_URL:
        return _count_here(key)
    try:
        count = _count_in_redis(_redis(settings.REDIS_URL), key)
    except RedisError as error:
        # A Redis that is away must not keep devices out: feedback matters more than fairness.
        if settings.REDIS_URL not in _away:
            logger.warning("rate limits are off: Redis is away error=%s", error)
        _away.add(settings.REDIS_URL)
        return 0
    _away.discard(settings.REDIS_URL)
    return count


def _count_here(key: str) -> int:
    try:
        return 1 if cache.add(key, 1, timeout=2 * WINDOW_S) else cache.incr(key)
    except ValueError:  # the entry went between the two calls
        return 1


@functools.cache
def _redis(url: str) -> Redis:
    return Redis.from_url(url, **settings.REDIS_TIMEOUTS_S)


def _count_in_redis(redis: Redis, key: str) -> int:
    count = cast(int, redis.incr(key))
    if count == 1:
        redis.expire(key, 2 * WINDOW_S)
    return count
