"""A static key-value cache whose filled part alone is read, and whose rows can be shared by several continuations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

# B rows  H KV heads  K columns  E head width


class BatchKVLayer(CacheLayerMixin):
    """One layer's buffers, allocated once for `capacity` columns; `update` appends and returns the filled columns."""

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch, heads and type of the first keys."""
        B, H, _, E = key_states.shape
        self.keys = key_states.new_empty(B, H, self.capacity, E)
        self.values = value_states.new_empty(B, H, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns; returns views of all filled ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.filled + key_states.shape[2]
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def expand(self, rows: Tensor) -> None:
        """Make row i of the new cache row rows[i] of the old one; only the filled columns are copied."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(len(rows), *old.shape[1:])
            new[:, :, : self.filled] = old[rows.to(old.device), :, : self.filled]
            setattr(self, name, new)

    def reserve(self, capacity: int) -> None:
        """Make room for at least so many columns; what is filled is copied when there was less."""
        if self.is_initialized and capacity > self.capacity:
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
                new[:, :, : self.filled] = old[:, :, : self.filled]
                setattr(self, name, new)
        self.capacity = max(capacity, self.capacity)

    def fork(self, length: int) -> BatchKVLayer:
        """A copy of the first `length` columns."""
        other = BatchKVLayer(length)
        other.update(self.keys[:, :, :length], self.values[:, :, :length])
        return other

    def get_seq_length(self) -> int:
        """Filled columns."""
        return self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns a step of `query_length` sees, and the offset of the first."""
        return self.filled + query_length, 0

    def get_max_length(self) -> int:
        """Columns in all."""
        return self.capacity

    get_max_cache_shape = get_max_length


class BatchKVCache(Cache):
    """The cache of all layers."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        super().__init__(layers=[BatchKVLayer(capacity) for _ in range(num_layers)])

    def expand(self, rows: Tensor) -> None:
        """Duplicate, drop or reorder rows: several questions go on from one image's prefix."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.expand(rows)

    @property
    def length(self) -> int:
        """Columns that every layer has filled."""
        return min(layer.filled for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)

    def reset(self, length: int = 0) -> None:
        """Go back to the first `length` columns."""
        for layer in self.layers:
            layer.filled = length

    def reserve(self, capacity: int) -> None:
        """Make room for at least so many columns."""
        for layer in self.layers:
            layer.reserve(capacity)

    def fork(self, length: int | None = None) -> BatchKVCache:
        """A copy of the first columns, of all filled ones when `length` is None."""
        other = BatchKVCache(0, 0)
        other.layers = [layer.fork(self.length if length is None else length) for layer in self.layers]
        return other


def new_cache(text_config: Any, capacity: int) -> BatchKVCache:
    """An empty cache for an LLM config."""
    return BatchKVCache(int(text_config.num_hidden_layers), capacity)


def row_index(counts: list[int]) -> Tensor:
    """[0, 0, 1] for counts [2, 1]: which prefix row each continuation goes on from."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
