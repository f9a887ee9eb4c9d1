"""Forward batches, and their attention: decode steps and prefill chunks of several sequences as one row of tokens.

Linear layers see a single row of tokens. Attention writes each token's keys and values to the KV row of its
sequence and attends to that row up to the token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vila.core.errors import ConfigError
from vila.engine.kv_cache import KVCache, aligned
from vila.model.packed_attention import ATTENTION_NAME, wrap_attention

# T tokens of a pass  S tokens of a range  D model width  B decode steps  R rows of the cache
# H query heads  G KV heads  E head width  K columns

NAME = "vila_ragged"
"""Name under which `ragged_attention` is registered in transformers."""


class Attention(Protocol):
    """Attention over a KV cache."""

    def attend(
        self, layer: int, query_HTE: Tensor, key_GTE: Tensor, value_GTE: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Store new keys and values and return the attention of the new tokens, [T, H, E]."""


@dataclass(frozen=True, slots=True)
class TokenRange:
    """Consecutive tokens of one sequence, from column `start` of a KV row.

    ids:       their token ids; those of image placeholders are ignored.
    embeds_SD: their embeddings, if they are not those of `ids`.
    outputs:   indices of the tokens after which logits are computed.
    """

    row: int
    start: int
    ids: Sequence[int]
    embeds_SD: Tensor | None = None
    outputs: Sequence[int] = (0,)

    @property
    def count(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    @property
    def is_step(self) -> bool:
        """Whether this is a decode step of one token."""
        return len(self.ids) == 1 and self.embeds_SD is None


class ForwardBatch:
    """Token ranges of one forward pass: decode steps in order of their rows, then all others."""

    def __init__(self, ranges: Sequence[TokenRange]) -> None:
        count = next((index for index, one in enumerate(ranges) if not one.is_step), len(ranges))
        self.ranges, self.steps, self.chunks = ranges, ranges[:count], ranges[count:]

    @property
    def outputs(self) -> list[int]:
        """Indices of the batch's tokens after which logits are computed."""
        indices, first = [], 0
        for one in self.ranges:
            indices += [first + place for place in one.outputs]
            first += one.count
        return indices


class RaggedAttention:
    """Attention of the tokens of a batch to the KV rows of their sequences.

    positions_T: position of each token in its sequence.
    """

    def __init__(self, cache: KVCache, batch: ForwardBatch) -> None:
        self.cache, self.steps, self.chunks = cache, batch.steps, batch.chunks
        device = cache.keys[0].device
        rows = [one.row for one in batch.ranges for _ in range(one.count)]
        columns = [one.start + i for one in batch.ranges for i in range(one.count)]
        self.rows_T, self.positions_T = torch.tensor([rows, columns], device=device)
        self.layers_called = 0
        self._masks: dict[Any, Tensor] = {}
        if steps := self.steps:
            self._first = steps[0].row
            self._span = steps[-1].row - self._first + 1
            self._index_B = None if self._span == len(steps) else self.rows_T[: len(steps)] - self._first
            longest = max(one.start for one in steps) + 1
            # A single decode step attends to all filled columns and needs no mask.
            self._columns = longest if len(steps) == 1 else aligned(longest)

    def attend(
        self, layer: int, query_HTE: Tensor, key_GTE: Tensor, value_GTE: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Write the new keys and values of a layer and return the attention of all tokens, [T, H, E]."""
        self.layers_called += 1
        self._write(layer, key_GTE, value_GTE)
        out, done = [], len(self.steps)
        if self.steps:
            out.append(self._attend_steps(layer, query_HTE[:, :done], scale, window))
        for number, chunk in enumerate(self.chunks):
            query = query_HTE[:, done : done + chunk.count]
            out.append(self._attend_chunk(layer, number, query, scale, window))
            done += chunk.count
        return torch.cat(out) if len(out) > 1 else out[0]

    def _write(self, layer: int, key_GTE: Tensor, value_GTE: Tensor) -> None:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        done = len(self.steps) if len(self.steps) > 1 else 0
        if done:
            rows_B, columns_B = self.rows_T[:done], self.positions_T[:done]
            keys[rows_B, :, columns_B] = key_GTE[:, :done].transpose(0, 1)
            values[rows_B, :, columns_B] = value_GTE[:, :done].transpose(0, 1)
        for one in self.chunks if done else (*self.steps, *self.chunks):
            new, columns = slice(done, done + one.count), slice(one.start, one.start + one.count)
            keys[one.row, :, columns] = key_GTE[:, new]
            values[one.row, :, columns] = value_GTE[:, new]
            done += one.count

    def _attend_steps(self, layer: int, query_HBE: Tensor, scale: float | None, window: int | None) -> Tensor:
        keys, values = (
            one[layer][self._first : self._first + self._span, :, : self._columns]
            for one in (self.cache.keys, self.cache.values)
        )
        # Query heads of a KV head take the sequence dimension, so that no key is read or copied twice.
        query_BGgE = query_HBE.transpose(0, 1).unflatten(1, (keys.shape[1], -1))
        if self._index_B is not None:
            query_BGgE = query_BGgE.new_zeros(self._span, *query_BGgE.shape[1:]).index_copy_(
                0, self._index_B, query_BGgE
            )
        whole = len(self.steps) == 1 and (window is None or self._columns <= window)
        mask = None if whole else self._mask(("steps", window), lambda: self._steps_mask(window), query_HBE)
        out = F.scaled_dot_product_attention(query_BGgE, keys, values, attn_mask=mask, scale=scale)
        return (out if self._index_B is None else out[self._index_B]).flatten(1, 2)

    def _steps_mask(self, window: int | None) -> Tensor:
        lengths = torch.zeros(self._span, dtype=torch.long)
        lengths[[one.row - self._first for one in self.steps]] = torch.tensor([one.start for one in self.steps])
        return _causal_mask(lengths, torch.arange(self._columns), window)[:, None, None]

    def _attend_chunk(
        self, layer: int, number: int, query_HTE: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        chunk = self.chunks[number]
        end = chunk.start + chunk.count
        first = 0 if window is None else max(0, chunk.start - window + 1)
        whole = chunk.start == 0 and (window is None or end <= window)
        query, key, value = (
            query_HTE[None],
            self.cache.keys[layer][chunk.row, None, :, first:end],
            self.cache.values[layer][chunk.row, None, :, first:end],
        )
        mask = None if whole else self._mask((number, window), lambda: _chunk_mask(chunk, first, window), query)
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


def _chunk_mask(chunk: TokenRange, first: int, window: int | None) -> Tensor:
    """Mask of a chunk over the columns from `first` to its end."""
    end = chunk.start + chunk.count
    return _causal_mask(torch.arange(chunk.start, end), torch.arange(first, end), window)


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
    ragged: Attention | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers; without `ragged` it calls the model's original attention."""
    layer: Any = module
    if ragged is None:
        attend = ALL_ATTENTION_FUNCTIONS.get(layer.config.fallback_attention, sdpa_attention_forward)
        options = {"scaling": scaling, "sliding_window": sliding_window, **kwargs}
        return attend(module, query, key, value, attention_mask, **options)
    return ragged.attend(layer.layer_idx, query[0], key[0], value[0], scaling, sliding_window)[None], None


AttentionInterface.register(NAME, ragged_attention)


def use_ragged_attention(decoder: nn.Module) -> None:
    """Make the blocks of a transformers decoder use `ragged_attention` when its forward gets `ragged=`.

    Without that argument the decoder behaves as before. Raises ConfigError for other attention implementations.
    """
    for name, module in decoder.named_modules():
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if hasattr(module, "layer_idx") and implementation not in (None, "sdpa", ATTENTION_NAME, NAME):
            raise ConfigError(field=name, value=implementation, expected="attention 'sdpa'")
    wrap_attention(decoder, NAME, "fallback_attention")


def check_attention(text_config: Any) -> None:
    """Raise ConfigError for an LLM whose attention is not supported."""
    problems = []
    if (implementation := getattr(text_config, "_attn_implementation", None)) not in ("sdpa", None):
        problems.append(f"attention {implementation!r} is not supported; load the model with 'sdpa'")
    unknown = set(getattr(text_config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        problems.append(f"layers with {', '.join(sorted(unknown))}: only full and sliding attention are supported")
    if problems:
        raise ConfigError.collect("engine", problems)
