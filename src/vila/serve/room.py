"""Room for requests, shared fairly between clients."""

from __future__ import annotations

import time
from collections import Counter

from vila.serve.errors import busy

_RECENT_S = 30.0
"""A client that asked this lately has a claim to its share."""


class Room:
    """Requests of one model that run or wait, counted once their body has arrived and is valid.

    A client alone may fill the room. As soon as others ask, each has an equal share of it; and a client that holds
    nothing gets one request in beyond the room, so that whoever filled it does not lock the others out.

    capacity: requests, each answer of `n` counted.
    reserve:  requests beyond, for clients that hold none.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.reserve = reserve_of(capacity)
        self._held: Counter[str] = Counter()
        self._asked: dict[str, float] = {}

    @property
    def held(self) -> int:
        """Requests that are in."""
        return self._held.total()

    @property
    def is_full(self) -> bool:
        """Whether nobody at all would be let in."""
        return self.held >= self.capacity + self.reserve

    def enter(self, client: str, count: int = 1) -> None:
        """Take room for `count` answers; `leave` gives it back. Raises ApiError, 429."""
        now = time.monotonic()
        self._asked[client] = now
        self._asked = {one: at for one, at in self._asked.items() if now - at < _RECENT_S or self._held[one]}
        own, share = self._held[client], max(1, self.capacity // len(self._asked))
        within = own == 0 or len(self._asked) == 1 or own + count <= share
        limit = self.capacity if own else self.capacity + self.reserve
        if self.held + count > limit or not within:
            others = "" if len(self._asked) == 1 else f", {own} of them yours, which is your share"
            raise busy(f"{self.held} requests are open already{others if not within else ''}; ask again in a moment", 1)
        self._held[client] += count

    def leave(self, client: str, count: int = 1) -> None:
        """Give back the room of a request that has ended."""
        self._held[client] -= count
        if self._held[client] <= 0:
            del self._held[client]


def reserve_of(capacity: int) -> int:
    """Requests beyond the capacity that are kept for clients that hold none."""
    return max(1, capacity // 8)
