"""Is this process alive, and can it do its work? Both are for machines: load balancers and supervisors."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from django.conf import settings
from django.db import Error as DatabaseError
from django.http import HttpRequest, JsonResponse
from redis import Redis
from redis.exceptions import RedisError

from qoe_service.decisions import policies
from qoe_service.fleet.models import Device


class Check(NamedTuple):
    """One part the service needs."""

    ok: bool
    detail: str


def live(request: HttpRequest) -> JsonResponse:  # noqa: ARG001  (a Django view)
    """The process answers. Asks nobody else."""
    return JsonResponse({"status": "ok"})


def ready(request: HttpRequest) -> JsonResponse:  # noqa: ARG001  (a Django view)
    """200 when every part is well, 503 otherwise; each part named."""
    checks = {name: check() for name, check in CHECKS.items()}
    is_ready = all(check.ok for check in checks.values())
    return JsonResponse(
        {
            "status": "ok" if is_ready else "unavailable",
            "checks": {name: check._asdict() for name, check in checks.items()},
        },
        status=200 if is_ready else 503,
    )


def database() -> Check:
    """A query on a table of ours, so that missing migrations show too."""
    try:
        Device.objects.exists()
    except DatabaseError as error:
        return Check(False, str(error).splitlines()[0])
    return Check(True, settings.DATABASES["default"]["ENGINE"].rpartition(".")[2])


def broker() -> Check:
    """Can messages be sent? Redis answers, or the folder of the serverless broker takes files."""
    if not settings.REDIS_URL:
        folder = settings.BROKER_DIR
        is_writable = os.access(folder, os.W_OK | os.X_OK)
        return Check(is_writable, "folder" if is_writable else f"{folder} is missing or not writable")
    try:
        with Redis.from_url(settings.REDIS_URL, socket_timeout=1, socket_connect_timeout=1) as redis:
            redis.ping()
    except RedisError as error:
        return Check(False, str(error))
    return Check(True, "redis")


def policy() -> Check:
    """Can the newest policies be loaded and trusted? Before the first one there is nothing to distrust."""
    try:
        problems = policies.problems()
    except DatabaseError:
        return Check(False, "unknown while the database is away")
    return Check(not problems, "; ".join(problems) or "ok")


CHECKS: dict[str, Callable[[], Check]] = {"database": database, "broker": broker, "policy": policy}
