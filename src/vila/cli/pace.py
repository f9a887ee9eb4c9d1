"""How fast a task goes and how long it will still take, from a rate that forgets slowly."""

from __future__ import annotations

import time
from collections.abc import Callable

_KEPT = 0.95
"""What an earlier measurement counts when a new one comes in."""
_SHORTEST_S = 1.0
_SHORTEST_SHARE = 0.01
"""A measurement takes at least this long, and this share of the time so far: the rate is that of the last fifth."""


class Pace:
    """Counts what is done of `total`. The first amount tells no rate: it may be what an earlier session did.

    clock: seconds.
    """

    def __init__(self, total: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.clock = total, clock
        self.done = 0
        self._seconds = self._units = 0.0  # of all measurements, older ones counting less
        self._began: float | None = None
        self._since = 0.0
        self._waiting = 0

    def add(self, amount: int) -> None:
        """More is done."""
        self.done += amount
        now = self.clock()
        if self._began is None:
            self._began = self._since = now
            return
        self._waiting += amount
        seconds = now - self._since
        if self._waiting and seconds >= max(_SHORTEST_S, _SHORTEST_SHARE * (now - self._began)):
            self._seconds = _KEPT * self._seconds + seconds
            self._units = _KEPT * self._units + self._waiting
            self._since, self._waiting = now, 0

    def left(self) -> float | None:
        """Seconds until the end; None when the total is not known, or the rate is not known yet."""
        if self.total is None or not self._units:
            return None
        rest = self.total - self.done + self._waiting
        return max(0.0, rest * self._seconds / self._units - (self.clock() - self._since))
