"""Running a batch of prompts through the model: shared prefixes once, then all remainders together, then single steps.

Rows are padded on the right inside each phase; padded columns are masked for ever, and positions count real tokens
only, so a row's numbers do not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vila.chat.tokenize import Tokens
from vila.core.types import Image
from vila.engine.cache import new_cache, row_index
from vila.model.fusion import cached_mask
from vila.model.vila import VilaForConditionalGeneration

# B rows  S tokens of a phase  K columns of the cache  D model width  V vocab

Encode = Callable[[Sequence[Image]], Tensor]


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts that begin with the same `shared` tokens (and the same pictures); `members` index the batch."""

    shared: int
    members: tuple[int, ...]


def group_prompts(prompts: Sequence[Tokens]) -> list[Group]:
    """Prompts with equal pictures share the prefix up to their last picture, and further as far as the ids agree."""
    by_media: dict[tuple[object, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        key = (*prompt.media, tuple(prompt.runs)) if prompt.media else (index,)
        by_media.setdefault(key, []).append(index)
    groups = []
    for members in by_media.values():
        rows = [prompts[index] for index in members]
        shared = _common_length(rows) if len(rows) > 1 else 0
        after_media = max((start + slots for start, slots in rows[0].runs), default=0)
        if shared < after_media or shared == 0:
            groups += [Group(0, (index,)) for index in members]
        else:
            groups.append(Group(shared, tuple(members)))
    return groups


def _common_length(rows: Sequence[Tokens]) -> int:
    length = min(len(row.ids) for row in rows) - 1
    for row in rows[1:]:
        length = next((i for i in range(length) if row.ids[i] != rows[0].ids[i]), length)
    return max(length, 0)


@dataclass
class BatchRun:
    """The state of a batch on its way: cache, valid columns, real length of each row."""

    model: VilaForConditionalGeneration
    encode: Encode
    capacity: int
    order: list[int] = field(default_factory=list)
    """Index of the prompt that stands in each row."""

    def begin(self, rows: int) -> None:
        """An empty cache for `rows` rows."""
        self.cache = new_cache(self.model.config.text_config, self.capacity)
        self.valid = torch.zeros(rows, 0, dtype=torch.bool)
        self.length = torch.zeros(rows, dtype=torch.long)

    def prefill(self, prompts: Sequence[Tokens], groups: Sequence[Group]) -> Tensor:
        """Logits [B, V] after each prompt, rows in `order`."""
        self.begin(len(groups))
        self.order = [index for group in groups for index in group.members]
        if any(group.shared for group in groups):
            heads = [prompts[group.members[0]] for group in groups]
            self._extend(
                [h.ids[: g.shared] for h, g in zip(heads, groups, strict=True)], self._media(heads, groups, head=True)
            )
        rows = row_index([len(group.members) for group in groups])
        self.cache.expand(rows)
        self.valid, self.length = self.valid[rows], self.length[rows]
        shared = [group.shared for group in groups for _ in group.members]
        tails = [prompts[index].ids[start:] for index, start in zip(self.order, shared, strict=True)]
        return self._extend(tails, self._media(prompts, groups, head=False))

    def _media(self, prompts: Sequence[Tokens], groups: Sequence[Group], *, head: bool) -> list[Image]:
        if head:
            rows = [p for p, group in zip(prompts, groups, strict=True) if group.shared]
        else:
            rows = [prompts[index] for group in groups if not group.shared for index in group.members]
        return [item for row in rows for item in row.media if isinstance(item, Image)]

    def step(self, ids_B: Tensor) -> Tensor:
        """Logits [B, V] after one more token in each row."""
        return self._extend([[int(i)] for i in ids_B], [])

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.cache.expand(rows)
        self.valid, self.length = self.valid[rows], self.length[rows]
        self.order = [self.order[int(row)] for row in rows]

    def hidden(self, rows: Sequence[Sequence[int]], images: Sequence[Image]) -> tuple[Tensor, Tensor]:
        """Append tokens to each row. Returns last hidden states [B, S, D] and the real lengths [B] of this phase."""
        lengths = torch.tensor([len(row) for row in rows])
        width = int(lengths.max())
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row, dtype=torch.long)
        columns = torch.arange(width)
        self.valid = torch.cat([self.valid, columns < lengths[:, None]], dim=1)
        device = self.model.device
        media = self.model.project(self.encode(images)) if images else None
        states = self.model.get_decoder()(
            inputs_embeds=self.model.embed(ids.to(device), media),
            attention_mask=cached_mask(self.valid.to(device), width),
            position_ids=(self.length[:, None] + columns).to(device),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.length = self.length + lengths
        return states, lengths

    def _extend(self, rows: Sequence[Sequence[int]], images: Sequence[Image]) -> Tensor:
        states, lengths = self.hidden(rows, images)
        last = (lengths - 1).clamp_min(0).to(states.device)
        picked = states[torch.arange(len(rows), device=states.device), last]
        return self.model.get_output_embeddings()(picked).float()
