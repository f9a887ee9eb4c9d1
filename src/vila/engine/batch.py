"""Forward passes of an offline batch: shared prefixes once, then all remainders together, then decode steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from vila.engine.attention_mask import CachePositions
from vila.engine.fast_decoder import FastDecoder
from vila.engine.kv_rows import content_keys
from vila.engine.offline_kv_cache import BatchKVCache, new_cache, row_index
from vila.engine.prefix_cache import PrefixCache
from vila.engine.vision_cache import HashedImage, Prompt
from vila.model.modeling import VilaForConditionalGeneration

# B batch rows  S tokens of a phase  D model width  V vocab

Encode = Callable[[Sequence[HashedImage]], Tensor]

_CHUNK = 2048
"""Prefill chunk in tokens per row, which bounds the memory of a long prompt."""


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts with a common prefix of `shared` tokens (and the same images); `members` index the batch."""

    shared: int
    members: tuple[int, ...]


def group_prompts(prompts: Sequence[Prompt]) -> list[Group]:
    """Group prompts with the same images, which share the prefix up to their last image and as far as the ids agree."""
    by_images: dict[tuple[object, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        key = (prompt.images, prompt.runs) if prompt.images else (index,)
        by_images.setdefault(key, []).append(index)
    groups = []
    for members in by_images.values():
        rows = [prompts[index] for index in members]
        shared = _common_length(rows) if len(rows) > 1 else 0
        after_images = max((start + count for start, count in rows[0].runs), default=0)
        if shared < after_images or shared == 0:
            groups += [Group(0, (index,)) for index in members]
        else:
            groups.append(Group(shared, tuple(members)))
    return groups


def _common_length(rows: Sequence[Prompt]) -> int:
    length = min(len(row.ids) for row in rows) - 1
    for row in rows[1:]:
        length = next((i for i in range(length) if row.ids[i] != rows[0].ids[i]), length)
    return max(length, 0)


def columns_needed(prompts: Sequence[Prompt], groups: Sequence[Group]) -> int:
    """Return the KV cache columns that the prompts need: the longest shared prefix and the longest remainder."""
    tails = max(len(prompts[index].ids) - group.shared for group in groups for index in group.members)
    return max(group.shared for group in groups) + tails


class Run(Protocol):
    """Forward passes of one batch by a backend. Logits are float32 whatever the compute dtype."""

    @property
    def order(self) -> list[int]:
        """Index of the prompt in each batch row."""

    def prefill(self, prompts: Sequence[Prompt], groups: Sequence[Group]) -> Tensor:
        """Return logits [B, V] after each prompt, rows in `order`."""

    def step(self, ids_B: Tensor) -> Tensor:
        """Append one token to each row; return logits [B, V]."""

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows."""

    def verify(self, ids: Sequence[int]) -> Tensor:
        """Append N tokens to the single row; return logits [N, V] after each."""

    def rewind(self, count: int) -> None:
        """Remove the last `count` tokens of the single row."""

    def close(self, fed: Sequence[int]) -> None:
        """End the run; `fed` are the tokens appended to a single row after its prompt."""

    def logits_at(self, prompts: Sequence[Prompt], places: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Yield logits [N, V] at the given positions of each prompt."""


class _DecodeAttention:
    """Attention of one new token per row over the filled columns of a cache."""

    def __init__(self, cache: BatchKVCache, positions: CachePositions) -> None:
        self.cache, self.positions = cache, positions
        self._masks: dict[int | None, Tensor | None] = {}

    def attend(
        self, layer: int, query_HBE: Tensor, key_GBE: Tensor, value_GBE: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Return the attention [B, H, E]."""
        new = (one.transpose(0, 1)[:, :, None] for one in (key_GBE, value_GBE))
        keys, values = self.cache.layers[layer].update(*new)
        if window not in self._masks:
            self._masks[window] = self.positions.mask(1, window)
        mask = self._masks[window]
        if mask is None and window is not None:
            keys, values = keys[:, :, -window:], values[:, :, -window:]
        # Query heads of a KV head take the sequence dimension, so that no key is read or copied twice.
        query_BGgE = query_HBE.transpose(0, 1).unflatten(1, (keys.shape[1], -1))
        return F.scaled_dot_product_attention(query_BGgE, keys, values, attn_mask=mask, scale=scale).flatten(1, 2)


@dataclass
class BatchRun:
    """Runs a batch with torch: the KV cache, its positions, and the prompt of each row."""

    model: VilaForConditionalGeneration
    encode: Encode
    capacity: int
    fast_decoder: FastDecoder | None = None
    """Runs the decode steps, if given; prefill uses the model's decoder."""
    prefix_cache: PrefixCache | None = None
    """Read and filled by runs of a single row."""
    order: list[int] = field(default_factory=list)
    """Index of the prompt in each batch row."""
    _single_prompt: Prompt | None = None

    def prefill(self, prompts: Sequence[Prompt], groups: Sequence[Group]) -> Tensor:
        """Return logits [B, V] after each prompt, rows in `order`."""
        self.order = [index for group in groups for index in group.members]
        if len(prompts) == 1 and self.prefix_cache is not None:
            return self._prefill_single(prompts[0], self.prefix_cache)
        self._begin(len(groups))
        if any(group.shared for group in groups):
            prefixes = [prompts[group.members[0]] for group in groups]
            self._append(
                [prefix.ids[: group.shared] for prefix, group in zip(prefixes, groups, strict=True)],
                [p for prefix, group in zip(prefixes, groups, strict=True) if group.shared for p in prefix.images],
            )
            self._select(row_index([len(group.members) for group in groups]))
        shared = [group.shared for group in groups for _ in group.members]
        rows = [prompts[index] for index in self.order]
        tails = [row.ids[start:] for row, start in zip(rows, shared, strict=True)]
        unseen = [p for row, start in zip(rows, shared, strict=True) if not start for p in row.images]
        states_BSD = self._append(tails, unseen)
        last_B = torch.tensor([len(tail) - 1 for tail in tails], device=states_BSD.device)
        return self._logits(states_BSD[torch.arange(len(tails), device=states_BSD.device), last_B])

    def logits_at(self, prompts: Sequence[Prompt], places: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Yield logits [N, V] at the given positions of each prompt."""
        self._begin(len(prompts))
        states_BSD = self._append([prompt.ids for prompt in prompts], [p for prompt in prompts for p in prompt.images])
        for states_SD, wanted in zip(states_BSD, places, strict=True):
            yield self._logits(states_SD[torch.tensor(wanted, dtype=torch.long, device=states_SD.device)])

    def step(self, ids_B: Tensor) -> Tensor:
        """Append one token to each row; return logits [B, V]."""
        positions_B1 = self.positions.append([1] * len(ids_B))
        embeds_B1D = self.model.get_input_embeddings()(ids_B[:, None])
        if self.fast_decoder is None:
            return self._logits(self._decoder(embeds_B1D, positions_B1)[:, -1])
        attention = _DecodeAttention(self.cache, self.positions)
        return self.fast_decoder.logits(self.fast_decoder.states(embeds_B1D[:, 0], positions_B1[:, 0], attention))

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows."""
        self._select(rows)
        self.order = [self.order[row] for row in rows.tolist()]

    def verify(self, ids: Sequence[int]) -> Tensor:
        """Append N tokens to the single row; return logits [N, V] after each."""
        return self._logits(self._append([ids], [])[0])

    def rewind(self, count: int) -> None:
        """Remove the last `count` tokens of the single row."""
        if count:
            self.positions.drop(count)
            self.cache.reset(self.positions.filled)

    @property
    def is_cached(self) -> bool:
        """Whether the KV cache goes to the prefix cache at the end."""
        return self._single_prompt is not None

    def close(self, fed: Sequence[int]) -> None:
        """End the run; the cache of a single row goes to the prefix cache."""
        if self._single_prompt is not None and self.prefix_cache is not None:
            self.prefix_cache.put([*content_keys(self._single_prompt), *fed], self.cache)

    def _prefill_single(self, prompt: Prompt, prefix_cache: PrefixCache) -> Tensor:
        known, length = prefix_cache.take(prompt)
        self._begin(1, known)
        if length:
            self.positions.append([length])
        unseen = [p for (start, _), p in zip(prompt.runs, prompt.images, strict=True) if start >= length]
        logits_BV = self._logits(self._append([prompt.ids[length:]], unseen)[:, -1])
        self._single_prompt = prompt
        return logits_BV

    def _begin(self, rows: int, cache: BatchKVCache | None = None) -> None:
        self.cache = cache or new_cache(self.model.config.text_config, self.capacity)
        self.cache.reserve(self.capacity)
        self.positions = CachePositions(rows, self.capacity, self.model.device)

    def _select(self, rows: Tensor) -> None:
        rows = rows.to(self.model.device)
        self.cache.expand(rows)
        self.positions.select(rows)

    def _append(self, rows: Sequence[Sequence[int]], images: Sequence[HashedImage]) -> Tensor:
        """Append tokens to each row; return the last hidden states [B, S, D] of this phase."""
        counts = [len(row) for row in rows]
        width = max(counts)
        ids_BS = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self.model.device)
        media_NPD = self.model.project(self.encode(images)) if images else None
        embeds_BSD = self.model.embed(ids_BS, media_NPD)
        states = []
        for start in range(0, width, _CHUNK):
            chunk = embeds_BSD[:, start : start + _CHUNK]
            positions_BS = self.positions.append([min(max(count - start, 0), chunk.shape[1]) for count in counts])
            states.append(self._decoder(chunk, positions_BS))
        return states[0] if len(states) == 1 else torch.cat(states, 1)

    def _decoder(self, embeds_BSD: Tensor, positions_BS: Tensor) -> Tensor:
        states: Tensor = self.model.get_decoder()(
            inputs_embeds=embeds_BSD,
            attention_mask=self.positions.masks(embeds_BSD.shape[1], self.model.config.text_config),
            position_ids=positions_BS,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return states

    def _logits(self, states_BD: Tensor) -> Tensor:
        logits: Tensor = self.model.get_output_embeddings()(states_BD)
        return logits.float()
