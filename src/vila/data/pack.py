"""Lanes: rows packed from whole samples, independent of the number of ranks.

Lane g of G packs the samples whose global position is g modulo G, from its own bounded look-ahead buffer. Its whole
state is the next position and the positions in the buffer, so it resumes anywhere and on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vila.chat.tokenize import TokenizedSample
from vila.core.errors import DataError

Fetch = Callable[[int], TokenizedSample]


@dataclass(frozen=True, slots=True)
class LaneState:
    """Where a lane stands: the next global position it will fetch, and the positions waiting in its buffer."""

    next_position: int
    waiting: tuple[int, ...]


class Lane:
    """Fills rows of at most `max_length` tokens. The oldest waiting sample opens each row, so none waits for ever."""

    def __init__(
        self,
        number: int,
        lanes: int,
        fetch: Fetch,
        *,
        max_length: int,
        look_ahead: int,
        overlong: str = "error",
        packed: bool = True,
        state: LaneState | None = None,
    ) -> None:
        """fetch: gives the tokenised sample at a global position. overlong: `error`, or `drop` with a count.

        packed: False puts one sample in each row, in order.
        """
        self.packed = packed
        self.lanes = lanes
        self.max_length = max_length
        self.look_ahead = look_ahead
        self.overlong = overlong
        self.dropped = 0
        self._fetch = fetch
        self._next = state.next_position if state else number
        self._buffer: list[tuple[int, TokenizedSample]] = [(p, fetch(p)) for p in state.waiting] if state else []

    @property
    def state(self) -> LaneState:
        """What a lane of the same data needs to go on from here."""
        return LaneState(self._next, tuple(position for position, _ in self._buffer))

    def row(self) -> list[TokenizedSample]:
        """The next row: the oldest waiting sample, then always the longest one that still fits."""
        self._fill()
        room = self.max_length
        chosen: list[TokenizedSample] = []
        index: int | None = 0
        while index is not None:
            _, sample = self._buffer.pop(index)
            chosen.append(sample)
            room -= len(sample)
            if not self.packed:
                break
            self._fill()
            fitting = [i for i, (_, waiting) in enumerate(self._buffer) if len(waiting) <= room]
            index = max(fitting, key=lambda i: (len(self._buffer[i][1]), -i), default=None)
        return chosen

    def _fill(self) -> None:
        refused = 0
        while len(self._buffer) < self.look_ahead:
            position = self._next
            sample = self._fetch(position)
            self._next += self.lanes
            if len(sample) <= self.max_length:
                self._buffer.append((position, sample))
                continue
            if self.overlong == "error":
                raise DataError(
                    f"sample {sample.id!r} has {len(sample)} tokens, rows hold {self.max_length}; "
                    "raise data.max_length or set data.overlong=drop"
                )
            self.dropped += 1
            refused += 1
            if refused > 10_000:
                raise DataError(f"10000 samples in a row are longer than data.max_length={self.max_length}")


class LaneSet:
    """All lanes of a run; one step takes one row from each."""

    def __init__(self, fetch: Fetch, count: int, *, states: Sequence[LaneState] | None = None, **options: Any) -> None:
        """options: max_length, look_ahead, overlong and packed of `Lane`."""
        self.lanes = [
            Lane(number, count, fetch, state=states[number] if states else None, **options) for number in range(count)
        ]

    def step(self) -> list[list[TokenizedSample]]:
        """One row from each lane."""
        return [lane.row() for lane in self.lanes]

    @property
    def states(self) -> list[LaneState]:
        """The state of every lane."""
        return [lane.state for lane in self.lanes]

    @property
    def dropped(self) -> int:
        """Over-long samples left out since this process started."""
        return sum(lane.dropped for lane in self.lanes)
