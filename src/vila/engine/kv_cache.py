"""Key-value memory of a stated size, in rows of equal length: one for each request on its way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# R rows  C columns of a row  H key-value heads  E head width  T tokens of a pass

_ALIGNED = 16
"""Columns come in multiples of this, which kernels for attention like."""


class KVCachePool:
    """The keys and values of all layers: `keys[layer]` and `values[layer]` are [R, H, C, E]; `buffers` has
    both, [2, R, H, C, E].

    The memory is allocated once, for `tokens` tokens, and divided among rows anew when `divide` says so. All of it is
    finite at all times, because what a mask hides is still multiplied, by zero: `clear` rows with other numbers.
    """

    def __init__(
        self, layers: int, heads: int, width: int, tokens: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.tokens, self.heads, self.width = tokens, heads, width
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        # Zeros come from the system untouched, so a CPU pays for what is used.
        # One piece a layer: a system may refuse all of it at once where it gives it bit by bit.
        self._memory = [torch.zeros(2, tokens * heads * width, dtype=dtype, device=device) for _ in range(layers)]
        self.divide(1)

    @property
    def columns(self) -> int:
        """Tokens that a row holds."""
        return self.columns_of(self.rows)

    def columns_of(self, rows: int) -> int:
        """Tokens that each of so many rows would hold."""
        return self.tokens // rows // _ALIGNED * _ALIGNED

    def rows_for(self, columns: int) -> int:
        """How many rows of at least `columns` there can be; 0 when not even one."""
        return self.tokens // aligned(columns)

    def divide(self, rows: int, moved: Mapping[int, tuple[int, int]] | None = None) -> None:
        """Make `rows` rows. moved: for rows that go on, the old row's number to the new one's and its length."""
        moved = moved or {}
        old = list(zip(self.keys, self.values, strict=True)) if moved else []
        self.rows = rows
        shape = (rows, self.heads, self.columns, self.width)
        self.buffers = [memory[:, : math.prod(shape)].unflatten(-1, shape) for memory in self._memory]
        self.keys, self.values = [both[0] for both in self.buffers], [both[1] for both in self.buffers]
        for (old_keys, old_values), keys, values in zip(old, self.keys, self.values, strict=False):
            for before, after in ((old_keys, keys), (old_values, values)):
                # The new rows overlap the old ones: everything is read before anything is written.
                kept = [(new, before[row, :, :length].clone()) for row, (new, length) in moved.items()]
                for new, part in kept:
                    after[new, :, : part.shape[1]] = part

    def copy(self, source: int, target: int, length: int) -> None:
        """Put the first `length` tokens of a row into another one."""
        for buffers in (*self.keys, *self.values):
            buffers[target, :, :length] = buffers[source, :, :length]

    def clear(self, rows: Sequence[int] | None = None) -> None:
        """Make rows zero, all memory without a list of them."""
        if rows is None:
            for memory in self._memory:
                memory.zero_()
            return
        for buffers in (*self.keys, *self.values):
            for row in rows:
                buffers[row].zero_()

    def write(self, layer: int, row: int, start: int, key_HTE: Tensor, value_HTE: Tensor) -> None:
        """Put the keys and values of tokens in a line into a row, from column `start`."""
        end = start + key_HTE.shape[1]
        self.keys[layer][row, :, start:end] = key_HTE
        self.values[layer][row, :, start:end] = value_HTE

    def scatter(self, layer: int, rows_T: Tensor, columns_T: Tensor, key_HTE: Tensor, value_HTE: Tensor) -> None:
        """Put the keys and values of tokens into a row and a column each."""
        self.keys[layer][rows_T, :, columns_T] = key_HTE.transpose(0, 1)
        self.values[layer][rows_T, :, columns_T] = value_HTE.transpose(0, 1)


def aligned(columns: int) -> int:
    """`columns`, rounded up to what rows are made of."""
    return -(-columns // _ALIGNED) * _ALIGNED
