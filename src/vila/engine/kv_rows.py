"""Allocation of KV cache rows to requests, with prefix caching: rows of finished requests serve later prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vila.engine.kv_cache_pool import KVCachePool
from vila.engine.vision_cache import Prompt

_MIN_SHARED = 16
"""Shortest common prefix in tokens that is reused."""


def content_keys(prompt: Prompt) -> list[int]:
    """Return a key per prompt position: the token id, or a negative hash at the placeholders of an image."""
    keys = list(prompt.ids)
    for (start, count), image in zip(prompt.runs, prompt.images, strict=True):
        keys[start : start + count] = [-1 - int(image.key, 16)] * count
    return keys


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences."""
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
    """A row of the KV cache pool.

    content:  content keys of the filled columns; the owner appends what it computes.
    expected: content keys of the owner's prompt during prefill.
    reserved: columns that the owner may need; 0 if the row has no owner.
    used:     time of the last use, for LRU eviction.
    """

    row: int
    content: list[int] = field(default_factory=list)
    expected: Sequence[int] = ()
    reserved: int = 0
    used: int = 0


class KVRows:
    """Allocates rows. A row without an owner keeps its content until it is evicted, least recently used first."""

    def __init__(self, pool: KVCachePool, max_rows: int) -> None:
        """max_rows: maximum number of rows with an owner."""
        self.pool, self.max_rows = pool, max_rows
        self._clock = 0
        pool.divide(max(1, min(max_rows, pool.rows_for(1))))
        self.rows = [KVRow(row) for row in range(pool.rows)]

    @property
    def tokens_owned(self) -> int:
        """Tokens in the rows of running requests."""
        return sum(len(row.content) for row in self.rows if row.reserved)

    @property
    def tokens_cached(self) -> int:
        """Tokens of finished requests that are still in their rows."""
        return sum(len(row.content) for row in self.rows if not row.reserved)

    def fits_ever(self, columns: int) -> bool:
        """Return whether a request of this many tokens fits when no other is running."""
        return self.pool.rows_for(columns) > 0

    def allocate(self, keys: Sequence[int], columns: int) -> KVRow | None:
        """Return a row for a request of `columns` tokens whose prompt has these content keys; None if it has to wait.

        The row's content is the longest prefix that any row has in common with the prompt, without the prompt's last
        token, whose logits are needed. A request also waits for another one that is about to compute a longer common
        prefix.
        """
        owned = [row.reserved for row in self.rows if row.reserved]
        rows = min(self.max_rows, self.pool.rows_for(max(columns, *owned, 1)))
        if len(owned) >= rows:
            return None
        begun = keys[: len(keys) - 1]
        source = max(self.rows, key=lambda row: common_length(row.content, begun))
        shared = common_length(source.content, begun)
        coming = max((common_length(row.expected, begun) for row in self.rows if row.reserved), default=0)
        if coming >= shared + _MIN_SHARED:
            return None
        if columns > self.pool.columns or len(owned) == len(self.rows):
            self._divide(rows, source)
            shared = min(shared, len(source.content))
        shared = shared if shared >= _MIN_SHARED else 0
        target = self._choose(source, shared)
        if shared and target is not source:
            self.pool.copy(source.row, target.row, shared)
            source.used = self._tick()
        row = KVRow(target.row, list(keys[:shared]), keys, columns, self._tick())
        self.rows[row.row] = row
        return row

    def release(self, row: KVRow) -> None:
        """Give up a row; its content stays available as prefix cache."""
        row.reserved, row.expected, row.used = 0, (), self._tick()

    def forget(self, row: KVRow) -> None:
        """Give up a row and clear its content."""
        self.rows[row.row] = KVRow(row.row)
        self.pool.clear([row.row])

    def forget_all(self) -> None:
        """Clear all rows."""
        self.rows = [KVRow(row) for row in range(len(self.rows))]
        self.pool.clear()

    def _choose(self, source: KVRow, shared: int) -> KVRow:
        free = [row for row in self.rows if not row.reserved]
        if shared and shared == len(source.content) and not source.reserved:
            return source
        empty = [row for row in free if not row.content]
        others = [row for row in free if row is not source or not shared]
        return (empty or [min(others or free, key=lambda row: row.used)])[0]

    def _divide(self, rows: int, source: KVRow) -> None:
        """Divide the pool into `rows` rows. Content that does not fit is evicted, least recently used first."""
        columns = self.pool.columns_of(rows)
        held = [row for row in self.rows if row.content or row.reserved]
        held.sort(key=lambda row: (not row.reserved, row is not source, -row.used))
        for row in held[rows:]:
            row.content.clear()
        going = held[:rows]
        for row in going:
            del row.content[columns:]
        self.pool.divide(rows, {row.row: (new, len(row.content)) for new, row in enumerate(going)})
        for new, row in enumerate(going):
            row.row = new
        self.rows = [*going, *(KVRow(row) for row in range(len(going), rows))]

    def _tick(self) -> int:
        self._clock += 1
        return self._clock
