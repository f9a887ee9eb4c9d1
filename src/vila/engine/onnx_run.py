"""A batch of prompts by onnxruntime: row after row, each on a cache of its own; shared prefixes are computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vila.engine.batch import Encode, Group
from vila.engine.onnx_step import OnnxDecoder
from vila.engine.pictures import Picture, Prompt
from vila.model.vila import VilaForConditionalGeneration

# B rows  S tokens  D model width  V vocab  N wanted places


class OnnxRun:
    """The state of a batch on its way. Rows do not share their products: a batch of two takes twice the time of one."""

    def __init__(self, model: VilaForConditionalGeneration, encode: Encode, decoder: OnnxDecoder) -> None:
        """decoder: is left as it is; rows begin as forks of it, so it should be empty."""
        self.model, self.encode, self.decoder = model, encode, decoder
        self.order: list[int] = []
        self._rows: list[OnnxDecoder] = []

    def prefill(self, prompts: Sequence[Prompt], groups: Sequence[Group]) -> Tensor:
        """Logits [B, V] after each prompt, rows in `order`."""
        self.order = [index for group in groups for index in group.members]
        logits = []
        for group in groups:
            first = self.decoder.fork()
            head = prompts[group.members[0]]
            if group.shared:
                first.prefill(self._embed(head.ids[: group.shared], head.pictures))
            others = [first.fork() for _ in group.members[1:]]
            for index, row in zip(group.members, [first, *others], strict=True):
                pictures = () if group.shared else prompts[index].pictures
                logits.append(row.prefill(self._embed(prompts[index].ids[group.shared :], pictures)))
                self._rows.append(row)
        return torch.stack(logits)

    def step(self, ids_B: Tensor) -> Tensor:
        """Logits [B, V] after one more token in each row."""
        return torch.stack([row.step(token) for row, token in zip(self._rows, ids_B.tolist(), strict=True)])

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        kept = rows.tolist()
        self._rows = [self._rows[row] for row in kept]
        self.order = [self.order[row] for row in kept]

    def logits_at(self, prompts: Sequence[Prompt], places: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Logits [N, V] after the wanted places of each of whole prompts."""
        for prompt, wanted in zip(prompts, places, strict=True):
            yield self.decoder.fork().logits_at(self._embed(prompt.ids, prompt.pictures), wanted)

    def _embed(self, ids: Sequence[int], pictures: Sequence[Picture]) -> Tensor:
        media_NPD = self.model.project(self.encode(pictures)) if pictures else None
        return self.model.embed(torch.tensor([list(ids)]), media_NPD)
