"""Which request stands in which row of the pool, and what earlier requests left there for those that begin alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vila.engine.kv_cache import KVCachePool
from vila.engine.vision_cache import Prompt

_WORTH = 16
"""Tokens in common below which nothing is copied or waited for."""


def content_keys(prompt: Prompt) -> list[int]:
    """What stands at each place of a prompt: equal numbers where the text or the picture is equal."""
    keys = list(prompt.ids)
    for (start, count), picture in zip(prompt.runs, prompt.pictures, strict=True):
        keys[start : start + count] = [-1 - int(picture.key, 16)] * count
    return keys


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many places two sequences have in common from their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(eq=False)
class KVRow:
    """A row of the pool.

    content:  what stands in its columns so far; whoever owns the row adds what is computed.
    expected: the whole prompt of the owner.
    reserved: columns that the owner may need, 0 when nobody owns the row.
    """

    row: int
    content: list[int] = field(default_factory=list)
    expected: Sequence[int] = ()
    reserved: int = 0
    used: int = 0


class KVRows:
    """Gives rows to requests. A row without an owner keeps its content until the room is wanted, oldest first."""

    def __init__(self, pool: KVCachePool, most: int) -> None:
        """most: rows that may have an owner at a time."""
        self.pool, self.most = pool, most
        self._clock = 0
        pool.divide(max(1, min(most, pool.rows_for(1))))
        self.slots = [KVRow(row) for row in range(pool.rows)]

    @property
    def tokens_owned(self) -> int:
        """Tokens in the rows of running requests."""
        return sum(len(slot.content) for slot in self.slots if slot.reserved)

    @property
    def tokens_kept(self) -> int:
        """Tokens of finished requests that still lie in their rows."""
        return sum(len(slot.content) for slot in self.slots if not slot.reserved)

    def fits_ever(self, columns: int) -> bool:
        """Whether a request of so many tokens has room when it is alone."""
        return self.pool.rows_for(columns) > 0

    def place(self, keys: Sequence[int], columns: int) -> KVRow | None:
        """A row for a request of `columns` tokens that begins with `keys`; None when it has to wait.

        The row's content is what need not be computed: what the prompt has in common with any row, but for its last
        token, whose logits are wanted. A request also waits for a neighbour that is about to compute what both
        begin with.
        """
        owned = [slot.reserved for slot in self.slots if slot.reserved]
        rows = min(self.most, self.pool.rows_for(max(columns, *owned, 1)))
        if len(owned) >= rows:
            return None
        begun = keys[: len(keys) - 1]
        source = max(self.slots, key=lambda slot: common_length(slot.content, begun))
        shared = common_length(source.content, begun)
        coming = max((common_length(slot.expected, begun) for slot in self.slots if slot.reserved), default=0)
        if coming >= shared + _WORTH:
            return None
        if columns > self.pool.columns or len(owned) == len(self.slots):
            self._divide(rows, source)
            shared = min(shared, len(source.content))
        shared = shared if shared >= _WORTH else 0
        target = self._choose(source, shared)
        if shared and target is not source:
            self.pool.copy(source.row, target.row, shared)
            source.used = self._tick()
        slot = KVRow(target.row, list(keys[:shared]), keys, columns, self._tick())
        self.slots[slot.row] = slot
        return slot

    def release(self, slot: KVRow) -> None:
        """The owner is done; what is in the row stays for others."""
        slot.reserved, slot.expected, slot.used = 0, (), self._tick()

    def forget(self, slot: KVRow) -> None:
        """The owner is done, and what is in the row is not to be trusted."""
        self.slots[slot.row] = KVRow(slot.row)
        self.pool.clear([slot.row])

    def forget_all(self) -> None:
        """Begin anew."""
        self.slots = [KVRow(row) for row in range(len(self.slots))]
        self.pool.clear()

    def _choose(self, source: KVRow, shared: int) -> KVRow:
        free = [slot for slot in self.slots if not slot.reserved]
        if shared and shared == len(source.content) and not source.reserved:
            return source
        empty = [slot for slot in free if not slot.content]
        others = [slot for slot in free if slot is not source or not shared]
        return (empty or [min(others or free, key=lambda slot: slot.used)])[0]

    def _divide(self, rows: int, source: KVRow) -> None:
        """Cut the pool into `rows` rows. What does not fit is lost: first what was used longest ago."""
        columns = self.pool.columns_of(rows)
        held = [slot for slot in self.slots if slot.content or slot.reserved]
        held.sort(key=lambda slot: (not slot.reserved, slot is not source, -slot.used))
        for slot in held[rows:]:
            slot.content.clear()
        going = held[:rows]
        for slot in going:
            del slot.content[columns:]
        self.pool.divide(rows, {slot.row: (new, len(slot.content)) for new, slot in enumerate(going)})
        for new, slot in enumerate(going):
            slot.row = new
        self.slots = [*going, *(KVRow(row) for row in range(len(going), rows))]

    def _tick(self) -> int:
        self._clock += 1
        return self._clock
