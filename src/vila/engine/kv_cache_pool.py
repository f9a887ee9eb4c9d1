"""KV cache pool of a fixed size, divided into rows of equal length, one per running request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# R rows  C columns of a row  H KV heads  E head width  T tokens of a pass

_ALIGNED = 16
"""Rows are multiples of this many columns, as attention kernels prefer."""


class KVCachePool:
    """Keys and values of all layers: `keys[layer]` and `values[layer]` are [R, H, C, E], `buffers[layer]` holds both
    as [2, R, H, C, E].

    The memory is allocated once, for `tokens` tokens; `divide` changes the number of rows. All values must be finite,
    because masked values are still multiplied by zero: `clear` rows that may not be.
    """

    def __init__(
        self, layers: int, heads: int, width: int, tokens: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.tokens, self.heads, self.width = tokens, heads, width
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        # Zeros are allocated lazily on a CPU. One buffer per layer, because a system may refuse a single large one.
        self._memory = [torch.zeros(2, tokens * heads * width, dtype=dtype, device=device) for _ in range(layers)]
        self.divide(1)

    @property
    def columns(self) -> int:
        """Capacity of a row in tokens."""
        return self.columns_of(self.rows)

    def columns_of(self, rows: int) -> int:
        """Return the capacity of a row if the pool had this many rows."""
        return self.tokens // rows // _ALIGNED * _ALIGNED

    def rows_for(self, columns: int) -> int:
        """Return the maximum number of rows of at least `columns` tokens; may be 0."""
        return self.tokens // aligned(columns)

    def divide(self, rows: int, moved: Mapping[int, tuple[int, int]] | None = None) -> None:
        """Divide the pool into `rows` rows. moved: rows to keep, from old index to new index and length."""
        moved = moved or {}
        old = list(zip(self.keys, self.values, strict=True)) if moved else []
        self.rows = rows
        shape = (rows, self.heads, self.columns, self.width)
        self.buffers = [memory[:, : math.prod(shape)].unflatten(-1, shape) for memory in self._memory]
        self.keys, self.values = [both[0] for both in self.buffers], [both[1] for both in self.buffers]
        for (old_keys, old_values), keys, values in zip(old, self.keys, self.values, strict=False):
            for before, after in ((old_keys, keys), (old_values, values)):
                # New and old rows overlap: read everything before writing.
                kept = [(new, before[row, :, :length].clone()) for row, (new, length) in moved.items()]
                for new, part in kept:
                    after[new, :, : part.shape[1]] = part

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row to another row."""
        for buffers in (*self.keys, *self.values):
            buffers[target, :, :length] = buffers[source, :, :length]

    def clear(self, rows: Sequence[int] | None = None) -> None:
        """Set rows to zero; None: the whole pool."""
        if rows is None:
            for memory in self._memory:
                memory.zero_()
            return
        for buffers in (*self.keys, *self.values):
            for row in rows:
                buffers[row].zero_()

    def write(self, layer: int, row: int, start: int, key_HTE: Tensor, value_HTE: Tensor) -> None:
        """Write the keys and values of consecutive tokens to a row, from column `start`."""
        end = start + key_HTE.shape[1]
        self.keys[layer][row, :, start:end] = key_HTE
        self.values[layer][row, :, start:end] = value_HTE

    def scatter(self, layer: int, rows_T: Tensor, columns_T: Tensor, key_HTE: Tensor, value_HTE: Tensor) -> None:
        """Write the keys and values of tokens, each to its row and column."""
        self.keys[layer][rows_T, :, columns_T] = key_HTE.transpose(0, 1)
        self.values[layer][rows_T, :, columns_T] = value_HTE.transpose(0, 1)


def aligned(columns: int) -> int:
    """Round a number of columns up to the alignment of rows."""
    return -(-columns // _ALIGNED) * _ALIGNED
