"""A Celery broker without a server: messages are files in a folder.

Kombu's own filesystem transport lets a reader see half of a message or of a routing table, and a worker that does so
ends. Here a message appears under its name only once it is complete, is claimed by renaming, and goes to the queue
that its routing key names, so there is no table. Losing a message loses nothing: the database is the queue of record.
"""

from __future__ import annotations

import logging
import os
import re
import time
import uuid
from contextlib import suppress
from json import JSONDecodeError
from pathlib import Path
from queue import Empty
from typing import Any

from kombu.transport import TRANSPORT_ALIASES, filesystem
from kombu.utils.json import dumps, loads

logger = logging.getLogger(__name__)

SCHEME = "folder"
LEFTOVERS_KEPT_S = 3600.0
_SUFFIX = ".msg"
_STAMP = re.compile(r"\d{20}_[0-9a-f]{32}")


class Channel(filesystem.Channel):
    """Direct exchanges only: an exchange, its routing key and its queue have one name."""

    def get_table(self, exchange: str) -> list[Any]:
        """The one queue of an exchange, as (routing key, pattern, queue)."""
        return [filesystem.exchange_queue_t(exchange, "", exchange)]

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str | None, queue: str) -> None:
        """Names say everything already."""

    def _put(self, *arguments: Any, **_options: Any) -> None:
        queue, message = arguments
        name = f"{time.time_ns():020d}_{uuid.uuid4().hex}"
        hidden = self._folder / name
        hidden.write_text(dumps(message))
        hidden.rename(self._folder / f"{name}.{queue}{_SUFFIX}")

    def _get(self, queue: str, timeout: float | None = None) -> Any:  # noqa: ARG002 - kombu's signature
        for name in self._names(queue):
            claimed = self._folder / name.removesuffix(_SUFFIX)
            try:
                os.rename(self._folder / name, claimed)
                text = claimed.read_text()
                claimed.unlink()
            except FileNotFoundError:
                continue  # another worker was faster
            try:
                return loads(text)
            except JSONDecodeError:
                logger.warning("message dropped, not JSON queue=%s file=%s", queue, name)
        raise Empty

    def _names(self, queue: str) -> list[str]:
        """Waiting messages of a queue, oldest first."""
        return sorted(name for name in os.listdir(self._folder) if name.endswith(f".{queue}{_SUFFIX}"))

    def _size(self, queue: str) -> int:
        return len(self._names(queue))

    def _purge(self, queue: str) -> int:
        names = self._names(queue)
        for name in names:
            (self._folder / name).unlink(missing_ok=True)
        return len(names)

    def _delete(self, queue: str, *_binding: Any, **_options: Any) -> None:
        self._purge(queue)

    @property
    def _folder(self) -> Path:
        return Path(self.data_folder_in)


class Transport(filesystem.Transport):
    """Registered with kombu under SCHEME."""

    Channel = Channel


def sweep(folder: Path, *, now_s: float) -> int:
    """Remove what crashed senders and workers left, unfinished or claimed; how many files."""
    swept = 0
    for path in folder.iterdir():
        if _STAMP.match(path.name) and path.suffix != _SUFFIX:
            with suppress(FileNotFoundError):
                if now_s - path.stat().st_mtime > LEFTOVERS_KEPT_S:
                    path.unlink()
                    swept += 1
    return swept


def register() -> None:
    """Let broker URLs of this scheme find the transport."""
    TRANSPORT_ALIASES[SCHEME] = f"{__name__}:Transport"
