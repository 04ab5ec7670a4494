"""One number of threads for all runs on the device, whichever model they belong to: nothing is oversubscribed.

A run takes as many threads as its session has. Where they are not free, the most urgent run gets them first.
"""

from __future__ import annotations

import heapq
import itertools
import os
import threading


class ThreadBudget:
    """``threads`` for all runs together. A run that wants more than there are in all takes all."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or len(os.sched_getaffinity(0))
        self._free = self.threads
        self._lock = threading.Lock()
        self._waiting: list[tuple[float, int, int, threading.Event]] = []
        self._numbers = itertools.count()

    def runs_at_once(self, threads: int) -> int:
        """How many runs of ``threads`` threads there is room for; at least one.

        >>> ThreadBudget(4).runs_at_once(2), ThreadBudget(2).runs_at_once(4)
        (2, 1)
        """
        return max(1, self.threads // threads)

    def try_take(self, threads: int) -> bool:
        """Takes threads if they are free and nobody waits for them."""
        wanted = min(threads, self.threads)
        with self._lock:
            if self._waiting or self._free < wanted:
                return False
            self._free -= wanted
            return True

    def take(self, threads: int, *, deadline_s: float) -> None:
        """Waits for threads; the earliest deadline goes first."""
        wanted = min(threads, self.threads)
        with self._lock:
            if not self._waiting and self._free >= wanted:
                self._free -= wanted
                return
            turn = threading.Event()
            heapq.heappush(self._waiting, (deadline_s, next(self._numbers), wanted, turn))
        turn.wait()

    def give_back(self, threads: int) -> None:
        """Ends a run; whoever waited and fits now begins."""
        with self._lock:
            self._free += min(threads, self.threads)
            while self._waiting and self._waiting[0][2] <= self._free:
                _, _, wanted, turn = heapq.heappop(self._waiting)
                self._free -= wanted
                turn.set()
