"""KV cache of an offline batch: preallocated columns of which only the filled ones are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

# B batch rows  H KV heads  K columns  E head width


class BatchKVLayer(CacheLayerMixin):
    """Buffers of one layer for `capacity` columns; `update` appends and returns the filled columns."""

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate with the batch size, heads and dtype of the first keys."""
        B, H, _, E = key_states.shape
        self.keys = key_states.new_empty(B, H, self.capacity, E)
        self.values = value_states.new_empty(B, H, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns; return views of all filled ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.filled + key_states.shape[2]
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def expand(self, rows: Tensor) -> None:
        """Make row i a copy of the old row rows[i]; only filled columns are copied."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(len(rows), *old.shape[1:])
            new[:, :, : self.filled] = old[rows.to(old.device), :, : self.filled]
            setattr(self, name, new)

    def reserve(self, capacity: int) -> None:
        """Grow to at least this many columns."""
        if self.is_initialized and capacity > self.capacity:
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
                new[:, :, : self.filled] = old[:, :, : self.filled]
                setattr(self, name, new)
        self.capacity = max(capacity, self.capacity)

    def fork(self, length: int) -> BatchKVLayer:
        """Return a copy of the first `length` columns."""
        other = BatchKVLayer(length)
        other.update(self.keys[:, :, :length], self.values[:, :, :length])
        return other

    def get_seq_length(self) -> int:
        """Return the number of filled columns."""
        return self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns that a step of `query_length` attends to, and the offset of the first."""
        return self.filled + query_length, 0

    def get_max_length(self) -> int:
        """Return the capacity in columns."""
        return self.capacity

    get_max_cache_shape = get_max_length


class BatchKVCache(Cache):
    """KV cache of all layers."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        super().__init__(layers=[BatchKVLayer(capacity) for _ in range(num_layers)])

    def expand(self, rows: Tensor) -> None:
        """Duplicate, drop or reorder rows, for example to continue one prefix with several questions."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.expand(rows)

    @property
    def length(self) -> int:
        """Columns filled in every layer."""
        return min(layer.filled for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Size of all buffers in bytes."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)

    def reset(self, length: int = 0) -> None:
        """Keep only the first `length` columns."""
        for layer in self.layers:
            layer.filled = length

    def reserve(self, capacity: int) -> None:
        """Grow to at least this many columns."""
        for layer in self.layers:
            layer.reserve(capacity)

    def fork(self, length: int | None = None) -> BatchKVCache:
        """Return a copy of the first `length` columns; None: of all filled ones."""
        other = BatchKVCache(0, 0)
        other.layers = [layer.fork(self.length if length is None else length) for layer in self.layers]
        return other


def new_cache(text_config: Any, capacity: int) -> BatchKVCache:
    """Return an empty cache for an LLM config."""
    return BatchKVCache(int(text_config.num_hidden_layers), capacity)


def row_index(counts: list[int]) -> Tensor:
    """Return the prefix row of each continuation: [0, 0, 1] for counts [2, 1]."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
