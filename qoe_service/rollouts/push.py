"""Wake-ups: server-sent events that say "look now". The desired document is the truth, so a lost one costs time only.

One watcher per process reads changes for all its listeners, on a thread and a database connection of its own. A
listener is an object in the event loop: no thread, no connection.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import Context
from typing import Protocol, TypeVar

from django.conf import settings
from django.db import Error as DatabaseError
from django.db import connection
from redis.asyncio import Redis
from redis.exceptions import RedisError

from device_agents.wire import WakeUp
from qoe_service.connections import keep_connection
from qoe_service.observability import WAKE_UP_CLIENTS
from qoe_service.rollouts import changes, desired

logger = logging.getLogger(__name__)
Value = TypeVar("Value")

HEART_BEAT_S = 15.0
RESCAN_S = 5.0
# A device needs one stream; a second may overlap while it reconnects. The oldest beyond that ends.
STREAMS_PER_DEVICE = 2
# Devices that are woken together are asked to come at this rate, which leaves room for everybody else.
LOOKS_PER_S = 150.0
FEW = 10


class Listener:
    """One wake-up stream, in the event loop only."""

    def __init__(self, device_id: str) -> None:
        self.device_id = device_id
        self.version = 0
        self.spread_s = 0.0
        self.is_ended = False
        self._woken = asyncio.Event()

    def notify(self, version: int, spread_s: float = 0.0) -> None:
        """Wake the stream unless it said this version already; the device may take ``spread_s`` to look."""
        if version > self.version:
            self.version, self.spread_s = version, spread_s
            self._woken.set()

    def end(self) -> None:
        """Let the stream come to its end."""
        self.is_ended = True
        self._woken.set()

    async def wait(self, timeout_s: float) -> bool:
        """Whether there is news within that time."""
        try:
            await asyncio.wait_for(self._woken.wait(), timeout_s)
        except TimeoutError:
            return False
        self._woken.clear()
        return True


class Signal(Protocol):
    """Says when to look for changes."""

    async def wait(self) -> None:
        """Return when it is time to look; never raise."""

    async def close(self) -> None:
        """Let go of what it holds."""


class Clock:
    """Looks every so often."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s

    async def wait(self) -> None:
        """Sleep one period."""
        await asyncio.sleep(self._period_s)

    async def close(self) -> None:
        """Nothing to let go of."""


class RedisSignal:
    """Looks when Redis says so, and now and then anyway; while Redis is away, every so often."""

    def __init__(self, url: str, period_s: float) -> None:
        self._redis = Redis.from_url(url)
        self._channel = self._redis.pubsub(ignore_subscribe_messages=True)
        self._period_s = period_s
        self._is_away = False

    async def wait(self) -> None:
        """Wait for a message, at most RESCAN_S."""
        try:
            if not self._channel.subscribed:
                await self._channel.subscribe(changes.CHANNEL)
            await self._channel.get_message(timeout=RESCAN_S)
            self._is_away = False
        except (RedisError, OSError) as error:
            if not self._is_away:
                logger.warning("wake-ups poll the database: Redis is away error=%s", error)
            self._is_away = True
            await asyncio.sleep(self._period_s)

    async def close(self) -> None:
        """Leave the channel."""
        await self._channel.aclose()
        await self._redis.aclose()


class Pace:
    """How long devices that are woken now may take to look, so that all who were woken come at LOOKS_PER_S."""

    def __init__(self) -> None:
        self._done_at_s = 0.0

    def spread_s(self, count: int, now_s: float) -> float:
        """For ``count`` devices more at ``now_s``; a few come at once.

        >>> pace = Pace()
        >>> pace.spread_s(1, 0.0), pace.spread_s(300, 10.0), pace.spread_s(300, 10.0)
        (0.0, 2.0, 4.0)
        """
        self._done_at_s = max(self._done_at_s, now_s) + count / LOOKS_PER_S
        left_s = self._done_at_s - now_s
        return left_s if left_s > FEW / LOOKS_PER_S else 0.0


class Watcher:
    """Reads changes while there are listeners, and wakes those whose device changed."""

    def __init__(self, signal: Callable[[], Signal]) -> None:
        self._signal = signal
        self._listeners: dict[str, list[Listener]] = {}
        self._task: asyncio.Task[None] | None = None
        self._is_away = False
        self._pace = Pace()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wake-up")

    @contextmanager
    def listen(self, device_id: str) -> Iterator[Listener]:
        """Be woken for this device while the context lasts."""
        listener = Listener(device_id)
        mine = self._listeners.setdefault(device_id, [])
        mine.append(listener)
        for surplus in mine[:-STREAMS_PER_DEVICE]:
            surplus.end()
        if self._task is None:
            # A context of its own: the watcher outlives the request that happens to start it.
            self._task = asyncio.get_running_loop().create_task(self._watch(), context=Context())
        WAKE_UP_CLIENTS.inc()
        try:
            yield listener
        finally:
            WAKE_UP_CLIENTS.dec()
            mine.remove(listener)
            if not mine:
                self._listeners.pop(device_id, None)

    async def read(self, query: Callable[[], Value]) -> Value:
        """Run a query on the watcher's own thread and connection."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, _query, query)

    async def _watch(self) -> None:
        signal = self._signal()
        last_id: int | None = None
        try:
            while self._listeners:
                last_id = await self._look(last_id)
                await signal.wait()
        finally:
            self._task = None
            await signal.close()
            await self.read(_hang_up)

    async def _look(self, last_id: int | None) -> int | None:
        try:
            rows = await self.read(lambda: changes.changes_after(last_id))
        except DatabaseError as error:
            if not self._is_away:
                logger.warning("wake-ups wait: the database is away error=%s", error)
            self._is_away = True
            return last_id
        self._is_away = False
        versions = {device_id: version for _, device_id, version in rows}
        woken = [
            (listener, version)
            for device_id, version in versions.items()
            for listener in self._listeners.get(device_id, ())
            if version > listener.version
        ]
        spread_s = self._pace.spread_s(len(woken), asyncio.get_running_loop().time())
        for listener, version in woken:
            listener.notify(version, spread_s)
        return max([last_id or 0, *(row_id for row_id, _, _ in rows)])


def _hang_up() -> None:
    connection.close()


def _query(query: Callable[[], Value]) -> Value:
    keep_connection()
    try:
        return query()
    except DatabaseError:
        connection.close()
        raise


_watchers: dict[asyncio.AbstractEventLoop, Watcher] = {}


def watcher() -> Watcher:
    """The watcher of this process (of its event loop, of which a web process has one)."""
    return _watchers.setdefault(asyncio.get_running_loop(), Watcher(_signal))


def _signal() -> Signal:
    period_s = settings.WAKE_UP_POLL_S
    return RedisSignal(settings.REDIS_URL, period_s) if settings.REDIS_URL else Clock(period_s)


def max_age_s(rng: random.Random) -> float:
    """When a stream ends: jittered, so that a fleet does not come back all at once."""
    return settings.WAKE_UP_MAX_AGE_S * rng.uniform(0.5, 1.0)


async def stream(*, device_id: str, age_s: float, heart_beat_s: float = HEART_BEAT_S) -> AsyncIterator[str]:
    """The events of one device: its current version at once, then each new one, and heart-beats between."""
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + age_s
    source = watcher()
    with source.listen(device_id) as listener:
        yield f"retry: {round(1000 * settings.WAKE_UP_POLL_S)}\n\n"
        # Read after listening began, so that no change falls between the two.
        listener.notify(await _current_version(source, device_id))
        while (left_s := ends_at - loop.time()) > 0 and not listener.is_ended:
            if not await listener.wait(min(heart_beat_s, left_s)):
                yield ": heart-beat\n\n"
            elif not listener.is_ended:
                yield f"event: wake\ndata: {_words(listener)}\n\n"


def _words(listener: Listener) -> str:
    message = WakeUp(version=listener.version, spread_s=round(listener.spread_s, 2))
    return json.dumps(message.model_dump(exclude_defaults=True))


async def _current_version(source: Watcher, device_id: str) -> int:
    try:
        return await source.read(lambda: desired.version_of(device_id=device_id))
    except DatabaseError:
        return 0  # the watcher reports it once the database is back
