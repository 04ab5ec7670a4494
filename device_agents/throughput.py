"""What the network gave lately, told by downloads that were made anyway: nothing is sent or fetched to measure it."""

from __future__ import annotations

import time
from collections.abc import Callable

SMALLEST_BYTES = 256 * 1024
LONGEST_KNOWN_S = 3600.0
LARGEST_MBPS = 1e6


class Throughput:
    """The rate of the last download that was large enough to tell. ``clock`` is monotonic, in seconds.

    >>> found = Throughput(clock=lambda: 0.0)
    >>> found.mbps() is None
    True
    >>> found.received(1_000_000, took_s=2.0)
    >>> found.mbps()
    4.0
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: tuple[float, float] | None = None

    def received(self, size_bytes: int, *, took_s: float) -> None:
        """So many bytes came in so long; few bytes tell more of the latency than of the rate, and are left out."""
        if size_bytes >= SMALLEST_BYTES and took_s > 0:
            self._last = min(LARGEST_MBPS, size_bytes * 8 / 1e6 / took_s), self._clock()

    def mbps(self) -> float | None:
        """Megabits per second; None when no download told within the last hour: the device may be elsewhere by now."""
        last = self._last
        if last is None or self._clock() - last[1] > LONGEST_KNOWN_S:
            return None
        return round(last[0], 3)
