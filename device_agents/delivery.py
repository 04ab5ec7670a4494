"""Brings one variant onto this device: room for it, its bytes, and the proof that they are what was announced."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from device_agents.errors import AttemptFailed
from device_agents.store import Store
from device_agents.wire import Outcome, UpdateState, VariantReference


class Fetch(Protocol):
    """Completes a variant's part file and returns the bytes fetched for it; ``ServiceClient.download`` is one."""

    def __call__(
        self,
        variant: VariantReference,
        part: Path,
        *,
        is_cancelled: Callable[[], bool],
        wait: Callable[[float], object],
        trace_id: str | None = None,
    ) -> int: ...


class Delivery:
    """One variant on its way. ``reached`` is told each state before anything of it is done; it may raise to end it."""

    def __init__(
        self,
        store: Store,
        fetch: Fetch,
        *,
        in_use: Callable[[], set[str]],
        overtaken: threading.Event,
        reached: Callable[[UpdateState], None],
    ) -> None:
        self._store = store
        self._fetch = fetch
        self._in_use = in_use
        self._overtaken = overtaken
        self._reached = reached
        self.fetched_bytes = 0

    def bring(self, variant: VariantReference, *, trace_id: str | None = None) -> None:
        """downloading → verifying → staged. A variant that is on disk takes the same way, without the bytes.

        Raises AttemptFailed, or Superseded when something newer came.
        """
        with self._store.bringing(variant.digest, is_cancelled=self._overtaken.is_set):
            is_right = self._fetch_and_verify(variant, trace_id)
            if not is_right and self.fetched_bytes < variant.size_bytes:
                # What lay here from before may be what is damaged, rather than what the service offers.
                self._reached(UpdateState.DOWNLOADING)
                is_right = self._fetch_and_verify(variant, trace_id)
            if not is_right:
                raise AttemptFailed("size or sha256 differ from what was announced", outcome=Outcome.VERIFY_FAILED)
            self._reached(UpdateState.STAGED)

    def _fetch_and_verify(self, variant: VariantReference, trace_id: str | None) -> bool:
        if not self._store.has_artifact(variant.digest):
            self._store.make_room(digest=variant.digest, size_bytes=variant.size_bytes, keep=self._in_use())
            self.fetched_bytes = self._fetch(
                variant,
                self._store.part(variant.digest),
                is_cancelled=self._overtaken.is_set,
                wait=self._overtaken.wait,
                trace_id=trace_id,
            )
        self._reached(UpdateState.VERIFYING)
        return self._is_right(variant)

    def _is_right(self, variant: VariantReference) -> bool:
        """Whether the bytes are what was announced; they are the artifact then, and gone otherwise."""
        store = self._store
        if store.has_artifact(variant.digest):
            if store.is_intact(variant.digest):
                store.touch(variant.digest)
                return True
            store.artifact(variant.digest).unlink()
            return False
        part = store.part(variant.digest)
        if part.stat().st_size != variant.size_bytes or not store.is_intact(variant.digest, part):
            store.discard_part(variant.digest)
            return False
        store.accept_part(variant.digest)
        return True
