"""Attention of a ragged batch: decode steps and prefill chunks of several requests as one sequence of tokens.

Linear layers see a single row of tokens. Attention writes each token's keys and values to the KV row of its request
and attends to that row up to the token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vila.core.errors import ConfigError
from vila.engine.kv_cache_pool import KVCachePool, aligned

# T tokens of a pass  B decode steps  R rows of the pool  H query heads  G KV heads  E head width  K columns

NAME = "vila_ragged"
"""Name under which `ragged_attention` is registered in transformers."""


@dataclass(frozen=True, slots=True)
class TokenRange:
    """`count` consecutive tokens of one request, from column `start` of a KV row."""

    row: int
    start: int
    count: int


class ForwardBatch:
    """Token ranges of one forward pass: the decode steps, in order of their rows, then the prefill chunks.

    positions_1T: position of each token in its request.
    """

    def __init__(self, pool: KVCachePool, steps: Sequence[TokenRange], pieces: Sequence[TokenRange]) -> None:
        self.pool, self.steps, self.pieces = pool, steps, pieces
        device = pool.keys[0].device
        ranges = (*steps, *pieces)
        rows = [one.row for one in ranges for _ in range(one.count)]
        columns = [one.start + i for one in ranges for i in range(one.count)]
        self.rows_T, self.columns_T = torch.tensor([rows, columns], device=device)
        self.positions_1T = self.columns_T[None]
        self.layers_called = 0
        self._masks: dict[Any, Tensor] = {}
        if steps:
            self._first = steps[0].row
            self._span = steps[-1].row - self._first + 1
            self._index_B = None if self._span == len(steps) else self.rows_T[: len(steps)] - self._first
            longest = max(one.start for one in steps) + 1
            # A single decode step attends to all filled columns and needs no mask.
            self._columns = longest if len(steps) == 1 else min(aligned(longest), pool.columns)

    def attend(
        self, layer: int, query_HTE: Tensor, key_GTE: Tensor, value_GTE: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Write the new keys and values of a layer and return the attention of all tokens, [T, H, E]."""
        self.layers_called += 1
        self._write(layer, key_GTE, value_GTE)
        out, done = [], len(self.steps)
        if self.steps:
            out.append(self._attend_decodes(layer, query_HTE[:, :done], scale, window))
        for number, piece in enumerate(self.pieces):
            query = query_HTE[:, done : done + piece.count]
            out.append(self._attend_prefill(layer, number, query, scale, window))
            done += piece.count
        return torch.cat(out) if len(out) > 1 else out[0]

    def _write(self, layer: int, key_GTE: Tensor, value_GTE: Tensor) -> None:
        done = len(self.steps) if len(self.steps) > 1 else 0
        if done:
            places = self.rows_T[:done], self.columns_T[:done]
            self.pool.scatter(layer, *places, key_GTE[:, :done], value_GTE[:, :done])
        for one in self.pieces if done else (*self.steps, *self.pieces):
            tokens = slice(done, done + one.count)
            self.pool.write(layer, one.row, one.start, key_GTE[:, tokens], value_GTE[:, tokens])
            done += one.count

    def _attend_decodes(self, layer: int, query_HBE: Tensor, scale: float | None, window: int | None) -> Tensor:
        keys, values = (
            one[layer][self._first : self._first + self._span, :, : self._columns]
            for one in (self.pool.keys, self.pool.values)
        )
        # Query heads of a KV head take the sequence dimension, so that no key is read or copied twice.
        query_BGgE = query_HBE.transpose(0, 1).unflatten(1, (keys.shape[1], -1))
        if self._index_B is not None:
            query_BGgE = query_BGgE.new_zeros(self._span, *query_BGgE.shape[1:]).index_copy_(
                0, self._index_B, query_BGgE
            )
        whole = len(self.steps) == 1 and (window is None or self._columns <= window)
        mask = None if whole else self._mask(("steps", window), lambda: self._decode_mask(window), query_HBE)
        out = F.scaled_dot_product_attention(query_BGgE, keys, values, attn_mask=mask, scale=scale)
        return (out if self._index_B is None else out[self._index_B]).flatten(1, 2)

    def _decode_mask(self, window: int | None) -> Tensor:
        lengths = torch.zeros(self._span, dtype=torch.long)
        lengths[[one.row - self._first for one in self.steps]] = torch.tensor([one.start for one in self.steps])
        return _causal_mask(lengths, torch.arange(self._columns), window)[:, None, None]

    def _attend_prefill(
        self, layer: int, number: int, query_HTE: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        piece = self.pieces[number]
        end = piece.start + piece.count
        first = 0 if window is None else max(0, piece.start - window + 1)
        whole = piece.start == 0 and (window is None or end <= window)
        query, key, value = (
            query_HTE[None],
            self.pool.keys[layer][piece.row, None, :, first:end],
            self.pool.values[layer][piece.row, None, :, first:end],
        )
        mask = None if whole else self._mask((number, window), lambda: _prefill_mask(piece, first, window), query)
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and mask is not None and query.is_cuda:
            # On CUDA, a mask with grouped heads selects the math kernel, which materialises all scores.
            key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=groups > 1
        )
        return out[0].transpose(0, 1)

    def _mask(self, key: Any, seen: Callable[[], Tensor], like: Tensor) -> Tensor:
        if key not in self._masks:
            hidden = ~seen()
            added = torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, -torch.inf)
            self._masks[key] = added.to(like.device)
        return self._masks[key]


def _prefill_mask(piece: TokenRange, first: int, window: int | None) -> Tensor:
    """Mask of a prefill chunk over the columns from `first` to its end."""
    end = piece.start + piece.count
    return _causal_mask(torch.arange(piece.start, end), torch.arange(first, end), window)


def _causal_mask(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Causal mask with an optional sliding window: bool [Q, K]."""
    age = query_positions[:, None] - key_positions
    return age >= 0 if window is None else (age >= 0) & (age < window)


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    forward_batch: ForwardBatch | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers; without `forward_batch` it calls the model's original attention."""
    layer: Any = module
    if forward_batch is None:
        attend = ALL_ATTENTION_FUNCTIONS.get(layer.config.fallback_attention, sdpa_attention_forward)
        options = {"scaling": scaling, "sliding_window": sliding_window, **kwargs}
        return attend(module, query, key, value, attention_mask, **options)
    return forward_batch.attend(layer.layer_idx, query[0], key[0], value[0], scaling, sliding_window)[None], None


AttentionInterface.register(NAME, ragged_attention)


def use_ragged_attention(decoder: nn.Module) -> None:
    """Make the blocks of a transformers decoder use `ragged_attention` when its forward gets `forward_batch=`.

    Without that argument the decoder behaves as before. Raises ConfigError for other attention implementations.
    """
    config: Any = decoder.config
    changed = copy.copy(config)
    changed._attn_implementation_internal, changed.fallback_attention = NAME, config._attn_implementation
    for name, module in decoder.named_modules():
        if not hasattr(module, "layer_idx") or not hasattr(module, "config"):
            continue
        if module.config is config:
            module.config = changed
        elif module.config._attn_implementation != NAME:
            implementation = module.config._attn_implementation
            raise ConfigError(field=name, value=implementation, expected="attention 'sdpa'")
