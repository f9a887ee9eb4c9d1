"""A batch of prompts by onnxruntime: row after row, each on a cache of its own; shared prefixes are computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vila.engine.batch import Encode, Group
from vila.engine.onnx_step import OnnxDecoder
from vila.engine.pictures import Picture, Prompt
from vila.engine.prefix import Prefixes
from vila.engine.slots import content_keys
from vila.model.vila import VilaForConditionalGeneration

# B rows  S tokens  D model width  V vocab  N wanted places


class OnnxRun:
    """The state of a batch on its way. Rows do not share their products: a batch of two takes twice the time of one."""

    def __init__(
        self,
        model: VilaForConditionalGeneration,
        encode: Encode,
        decoder: OnnxDecoder,
        prefixes: Prefixes | None = None,
    ) -> None:
        """decoder:  is left as it is; rows begin as forks of it, so it should be empty.
        prefixes: where a run of one row finds the beginning of its prompt, and leaves what it computed.
        """
        self.model, self.encode, self.decoder, self.prefixes = model, encode, decoder, prefixes
        self._alone: Prompt | None = None
        self.order: list[int] = []
        self._rows: list[OnnxDecoder] = []

    def prefill(self, prompts: Sequence[Prompt], groups: Sequence[Group]) -> Tensor:
        """Logits [B, V] after each prompt, rows in `order`."""
        self.order = [index for group in groups for index in group.members]
        if len(prompts) == 1 and self.prefixes is not None:
            return self._prefill_alone(prompts[0], self.prefixes)
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
        logits = [row.step(token) for row, token in zip(self._rows, ids_B.tolist(), strict=True)]
        # A copy wakes torch's threads while onnxruntime's still turn: it costs a third of a small model's step.
        return logits[0][None] if len(logits) == 1 else torch.stack(logits)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        kept = rows.tolist()
        self._rows = [self._rows[row] for row in kept]
        self.order = [self.order[row] for row in kept]

    def verify(self, ids: Sequence[int]) -> Tensor:
        """Logits [N, V] after each of N more tokens in the only row."""
        if len(ids) == 1:
            return self._rows[0].step(ids[0])[None]
        return self._rows[0].logits_at(self._embed(ids, ()), range(len(ids)))

    def rewind(self, count: int) -> None:
        """Take back the last `count` tokens of the only row."""
        row = self._rows[0]
        row.reset(row.length - count)

    def close(self, fed: Sequence[int]) -> None:
        """Leave the cache of a row that was alone to conversations that begin alike."""
        if self._alone is not None and self.prefixes is not None:
            self.prefixes.put([*content_keys(self._alone), *fed], self._rows[0])

    def _prefill_alone(self, prompt: Prompt, prefixes: Prefixes) -> Tensor:
        known, length = prefixes.take(prompt)
        self._rows = [known or self.decoder.fork()]
        unseen = [p for (start, _), p in zip(prompt.runs, prompt.pictures, strict=True) if start >= length]
        logits_V = self._rows[0].prefill(self._embed(prompt.ids[length:], unseen))
        self._alone = prompt
        return logits_V[None]

    def logits_at(self, prompts: Sequence[Prompt], places: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Logits [N, V] after the wanted places of each of whole prompts."""
        for prompt, wanted in zip(prompts, places, strict=True):
            yield self.decoder.fork().logits_at(self._embed(prompt.ids, prompt.pictures), wanted)

    def _embed(self, ids: Sequence[int], pictures: Sequence[Picture]) -> Tensor:
        media_NPD = self.model.project(self.encode(pictures)) if pictures else None
        return self.model.embed(torch.tensor([list(ids)]), media_NPD)
