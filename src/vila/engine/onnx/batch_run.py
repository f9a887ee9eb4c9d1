"""A batch of prompts by onnxruntime: their steps are taken together, and shared prefixes are computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vila.engine.batch import Group
from vila.engine.kv_cache_pool import aligned
from vila.engine.kv_rows import content_keys
from vila.engine.onnx.program import OnnxProgram
from vila.engine.onnx.runner import OnnxRunner
from vila.engine.onnx.sequence import OnnxSequence
from vila.engine.prefix_cache import PrefixCache
from vila.engine.ragged_attention import TokenRange
from vila.engine.vision_cache import HashedImage, Prompt, VisionCache
from vila.model.modeling import VilaForConditionalGeneration

# B rows  S tokens  D model width  V vocab  N positions with logits


class OnnxBatchRun:
    """Runs a batch with onnxruntime. A single prompt uses an OnnxSequence, which may come from the prefix cache."""

    def __init__(
        self,
        model: VilaForConditionalGeneration,
        features: VisionCache,
        program: OnnxProgram,
        capacity: int,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        """capacity:     maximum tokens of a row.
        prefix_cache: read and filled by runs of a single row.
        """
        self.model, self.features, self.program = model, features, program
        self.capacity, self.prefix_cache = capacity, prefix_cache
        self.order: list[int] = []
        self._prompt: Prompt | None = None
        self._alone: OnnxSequence | None = None
        self._rows: _Rows | None = None

    def prefill(self, prompts: Sequence[Prompt], groups: Sequence[Group]) -> Tensor:
        """Return logits [B, V] after each prompt, rows in `order`."""
        self.order = [index for group in groups for index in group.members]
        if len(prompts) == 1:
            return self._prefill_alone(prompts[0])
        tokens = len(prompts) * aligned(self.capacity)
        self._rows = rows = _Rows(OnnxRunner(self.model, self.features, tokens, self.program), len(prompts))
        logits: list[Tensor] = []
        for group in groups:
            first = len(logits)
            if group.shared:
                head = prompts[group.members[0]]
                rows.prefill(first, self._embed(head.ids[: group.shared], head.images)[0])
                for row in range(first + 1, first + len(group.members)):
                    rows.copy(first, row)
            for row, index in enumerate(group.members, first):
                images = () if group.shared else prompts[index].images
                logits.append(rows.prefill(row, self._embed(prompts[index].ids[group.shared :], images)[0]))
        return torch.cat(logits)

    def step(self, ids_B: Tensor) -> Tensor:
        """Append one token to each row; return logits [B, V]."""
        if self._rows is not None:
            return self._rows.step(ids_B.tolist())
        # A tensor copy would wake torch's threads while onnxruntime's spin: a third of a small model's step.
        return self._single.step(int(ids_B))[None]

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows."""
        kept = rows.tolist()
        self.order = [self.order[row] for row in kept]
        if self._rows is not None:
            self._rows.keep(kept)

    def verify(self, ids: Sequence[int]) -> Tensor:
        """Append N tokens to the single row; return logits [N, V] after each."""
        if len(ids) == 1:
            return self._single.step(ids[0])[None]
        return self._single.logits_at(self._embed(ids, ()), range(len(ids)))

    def rewind(self, count: int) -> None:
        """Remove the last `count` tokens of the single row."""
        self._single.reset(self._single.length - count)

    def close(self, fed: Sequence[int]) -> None:
        """End the run; the cache of a single row goes to the prefix cache."""
        if self._prompt is not None and self.prefix_cache is not None:
            self.prefix_cache.put([*content_keys(self._prompt), *fed], self._single)

    def logits_at(self, prompts: Sequence[Prompt], places: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Yield logits [N, V] at the given positions of each prompt."""
        for prompt, wanted in zip(prompts, places, strict=True):
            yield OnnxSequence(self.program).logits_at(self._embed(prompt.ids, prompt.images), wanted)

    @property
    def _single(self) -> OnnxSequence:
        assert self._alone is not None
        return self._alone

    def _prefill_alone(self, prompt: Prompt) -> Tensor:
        known, length = self.prefix_cache.take(prompt) if self.prefix_cache is not None else (None, 0)
        self._alone = known or OnnxSequence(self.program)
        unseen = [p for (start, _), p in zip(prompt.runs, prompt.images, strict=True) if start >= length]
        logits_V = self._single.prefill(self._embed(prompt.ids[length:], unseen))
        self._prompt = prompt
        return logits_V[None]

    def _embed(self, ids: Sequence[int], images: Sequence[HashedImage]) -> Tensor:
        media_NPD = self.model.project(self.features(images)) if images else None
        return self.model.embed(torch.tensor([list(ids)]), media_NPD)


class _Rows:
    """Rows of a private KV cache pool; when rows finish, the others move to the front."""

    def __init__(self, run: OnnxRunner, count: int) -> None:
        self.run = run
        run.pool.divide(count)
        self.rows = list(range(count))
        """Pool row of each batch row."""
        self.lengths = [0] * count
        """Tokens in each pool row."""

    def prefill(self, row: int, embeds_SD: Tensor) -> Tensor:
        """Append prompt tokens; return logits [1, V] after them."""
        start, count = self.lengths[row], len(embeds_SD)
        self.lengths[row] += count
        return self.run.forward([], [(TokenRange(row, start, count), embeds_SD)], [0])

    def copy(self, source: int, target: int) -> None:
        """Copy a pool row to another one."""
        self.run.pool.copy(source, target, self.lengths[source])
        self.lengths[target] = self.lengths[source]

    def step(self, ids: Sequence[int]) -> Tensor:
        """Append a token to each batch row; return logits [B, V]."""
        # The runner needs the order of pool rows; the result is put back into batch order.
        by_row = sorted(zip(self.rows, ids, range(len(ids)), strict=True))
        logits_BV = self.run.forward([(TokenRange(row, self.lengths[row], 1), id_) for row, id_, _ in by_row], [], [])
        for row in self.rows:
            self.lengths[row] += 1
        places = [place for _, _, place in by_row]
        return logits_BV if places == sorted(places) else logits_BV[torch.tensor(places).argsort()]

    def keep(self, kept: Sequence[int]) -> None:
        """Keep only these batch rows."""
        self.rows = [self.rows[place] for place in kept]
        free = sorted(set(range(len(kept))) - set(self.rows))
        for place, row in enumerate(self.rows):
            if row >= len(kept):
                self.rows[place] = free.pop()
                self.copy(row, self.rows[place])
