"""KV cache shared by all sequences of a scheduler: the memory of the rows, and their allocation with prefix caching."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vila.core.errors import ConfigError
from vila.engine.vision_cache import Prompt

# R rows  C columns of a row  H KV heads  E head width  T tokens

_ALIGNED = 16
"""Numbers of columns are multiples of this, as attention kernels prefer."""
_MIN_SHARED = 16
"""Shortest common prefix in tokens that is reused."""
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0


def aligned(columns: int) -> int:
    """Round a number of columns up to the alignment of rows."""
    return -(-columns // _ALIGNED) * _ALIGNED


class KVCache:
    """Keys and values of all layers in rows of equal length: `keys[layer]` and `values[layer]` are [R, H, C, E].

    On a CPU the rows are virtual memory: the system commits a page when a token is written to it, so every row may be
    as long as the context. On CUDA all rows are allocated. Values must stay finite, because masked values are still
    multiplied by zero: `clear` rows that may not be.
    """

    def __init__(
        self, layers: int, heads: int, width: int, rows: int, columns: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        """columns: capacity of a row in tokens. Raises ConfigError if the system refuses the address space."""
        # One more group of columns: a power of two would map all heads to the same cache sets, and steps at fixed
        # addresses write the tokens of unused rows there.
        shape = (2, rows, heads, aligned(columns) + _ALIGNED, width)
        self.rows, self.columns = rows, columns
        self.token_bytes = 2 * layers * heads * width * dtype.itemsize
        """Bytes of a token in all layers."""
        self._maps: list[mmap.mmap] = []
        if device.type == "cpu":
            try:
                self._maps = [_reserve(math.prod(shape) * dtype.itemsize) for _ in range(layers)]
            except (OSError, ValueError) as error:
                size = math.prod(shape) * dtype.itemsize * layers / 2**30
                raise ConfigError(
                    f"cannot reserve {size:.0f} GiB of address space for the KV cache ({error})",
                    hint="lower max_num_seqs, or raise `ulimit -v`",
                ) from error
            flat = [torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)) for memory in self._maps]
        else:
            flat = [torch.zeros(math.prod(shape), dtype=dtype, device=device) for _ in range(layers)]
        self.buffers = [buffer.view(shape) for buffer in flat]
        """Keys and values of each layer, [2, R, H, C, E]."""
        self.keys, self.values = [both[0] for both in self.buffers], [both[1] for both in self.buffers]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row to another row."""
        for both in self.buffers:
            both[:, target, :, :length] = both[:, source, :, :length]

    def clear(self, row: int) -> None:
        """Set a row to zero; on a CPU its memory returns to the system."""
        for layer, both in enumerate(self.buffers):
            for one in both:
                self._clear(layer, one[row])

    def _clear(self, layer: int, row_HCE: Tensor) -> None:
        size = row_HCE.element_size()
        begin = row_HCE.storage_offset() * size
        # Whole pages read as zeros after MADV_DONTNEED; the parts of pages that belong to other rows are kept.
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (begin + row_HCE.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if not self._maps or sys.platform != "linux" or first >= last:
            row_HCE.zero_()
            return
        self._maps[layer].madvise(mmap.MADV_DONTNEED, first, last - first)
        flat = row_HCE.view(-1)
        flat[: (first - begin) // size].zero_()
        flat[(last - begin) // size :].zero_()


def _reserve(nbytes: int) -> mmap.mmap:
    """Return zeroed memory whose pages are committed when they are written."""
    if sys.platform == "win32":
        return mmap.mmap(-1, nbytes)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memory = mmap.mmap(-1, nbytes, flags=flags)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        # A huge page would commit a large part of a row for its first token.
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


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
    """A row of the KV cache.

    content:   content keys of the filled columns; the owner appends the keys of the tokens it computes.
    expected:  content keys of the owner's prompt during prefill.
    reserved:  columns that the owner may need; 0 if the row has no owner.
    committed: columns whose memory may be committed.
    used:      time of the last use, for LRU eviction.
    """

    row: int
    content: list[int] = field(default_factory=list)
    expected: Sequence[int] = ()
    reserved: int = 0
    committed: int = 0
    used: int = 0

    @property
    def held(self) -> int:
        """Columns that count against the budget."""
        return max(self.reserved, self.committed)


class KVCachePool:
    """Allocates the rows of a KV cache within a budget of tokens, and reuses the prefixes that rows still hold.

    A row without an owner keeps its content until it is evicted, least recently used first.
    """

    def __init__(self, cache: KVCache, tokens: int) -> None:
        """tokens: maximum number of tokens in all rows together."""
        self.cache, self.tokens = cache, tokens
        self.rows = [KVRow(row) for row in range(cache.rows)]
        self._clock = 0

    @property
    def tokens_owned(self) -> int:
        """Tokens in the rows of running requests."""
        return sum(len(row.content) for row in self.rows if row.reserved)

    @property
    def tokens_cached(self) -> int:
        """Tokens of finished requests that are still in their rows."""
        return sum(len(row.content) for row in self.rows if not row.reserved)

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of a request."""
        return min(self.cache.columns, self.tokens // _ALIGNED * _ALIGNED)

    @property
    def has_free_row(self) -> bool:
        """Whether any row has no owner."""
        return not all(row.reserved for row in self.rows)

    def is_prefix_coming(self, keys: Sequence[int], max_shared: int | None = None) -> bool:
        """Return whether a running request is about to compute a longer prefix of this prompt than any row has."""
        prefilling = [row.expected for row in self.rows if row.reserved and row.expected]
        if not prefilling:
            return False
        begun = _shareable(keys, max_shared)
        coming = max(common_length(expected, begun) for expected in prefilling)
        return coming >= _MIN_SHARED and coming >= self._longest_prefix(begun)[1] + _MIN_SHARED

    def allocate(self, keys: Sequence[int], columns: int, max_shared: int | None = None) -> KVRow | None:
        """Return a row for a request of `columns` tokens whose prompt has these content keys; None if it has to wait.

        The row's content is the longest prefix that any row has in common with the prompt, at most `max_shared` tokens,
        without the prompt's last token, whose logits are needed.
        """
        columns = aligned(columns)
        free = [row for row in self.rows if not row.reserved]
        if not free or columns + sum(row.held for row in self.rows if row.reserved) > self.tokens:
            return None
        source, shared = self._longest_prefix(_shareable(keys, max_shared))
        shared = shared if shared >= _MIN_SHARED else 0
        target = _choose(free, source, shared)
        if not self._evict(columns, target, source if shared else target):
            # The prefix does not fit beside the request and is computed again.
            for row in (source, target):
                if not row.reserved:
                    self.forget(row)
            shared, target = 0, self.rows[target.row]
        if shared and target is not source:
            self.cache.copy(source.row, target.row, shared)
            source.used = self._tick()
        committed = max(target.committed, shared)
        row = KVRow(target.row, list(keys[:shared]), keys, columns, committed, self._tick())
        self.rows[row.row] = row
        return row

    def _longest_prefix(self, begun: Sequence[int]) -> tuple[KVRow, int]:
        """Return the row with the longest common prefix, and its length."""
        lengths = [common_length(row.content, begun) for row in self.rows]
        longest = max(lengths)
        return self.rows[lengths.index(longest)], longest

    def release(self, row: KVRow) -> None:
        """Give up a row; its content stays available as prefix cache."""
        # Rejected draft tokens may have been written behind the content.
        row.committed = max(row.committed, min(row.reserved, aligned(len(row.content)) + _ALIGNED))
        row.reserved, row.expected, row.used = 0, (), self._tick()

    def forget(self, row: KVRow) -> None:
        """Give up a row and clear its content."""
        self.rows[row.row] = KVRow(row.row)
        if row.held:
            self.cache.clear(row.row)

    def forget_all(self) -> None:
        """Give up and clear all rows."""
        for row in list(self.rows):
            self.forget(row)

    def drop_prefixes(self) -> None:
        """Drop the content of rows without an owner; required after a change of the weights."""
        for row in self.rows:
            if not row.reserved:
                row.content.clear()

    def _evict(self, columns: int, target: KVRow, source: KVRow) -> bool:
        """Evict rows other than `target` and `source` until `columns` fit in `target`; return whether they do."""
        total = max(columns, target.committed) + sum(row.held for row in self.rows if row is not target)
        evictable = [row for row in self.rows if not row.reserved and row is not target and row is not source]
        for row in sorted(evictable, key=lambda row: row.used):
            if total <= self.tokens:
                break
            total -= row.held
            self.forget(row)
        return total <= self.tokens

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def _shareable(keys: Sequence[int], max_shared: int | None) -> Sequence[int]:
    """Return the keys of the prompt that may be reused."""
    return keys[: len(keys) - 1 if max_shared is None else min(max_shared, len(keys) - 1)]


def _choose(free: Sequence[KVRow], source: KVRow, shared: int) -> KVRow:
    """Return the row for a request that shares `shared` tokens with `source`."""
    if shared and shared == len(source.content) and not source.reserved:
        return source
    empty = [row for row in free if not row.content]
    others = [row for row in free if row is not source or not shared]
    return (empty or [min(others or free, key=lambda row: row.used)])[0]
