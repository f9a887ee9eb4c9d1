"""Runs a batch whose decode steps use static buffers, on CUDA as a CUDA graph, after an ordinary prefill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vila.engine.batch import BatchRun, Group
from vila.engine.cuda_graph_step import CudaGraphStep, CudaGraphSteps, row_count
from vila.engine.vision_cache import Prompt

# B rows  V vocab


class CudaGraphRun:
    """Runs a batch; its rows are copied to the static buffers at the first decode step.

    Finished rows stay in the buffers until half of the rows have finished; the others then move to smaller buffers.
    """

    def __init__(self, prompts: BatchRun, steps: CudaGraphSteps) -> None:
        """prompts: runs the prefill and steps of several tokens."""
        self.prompts, self.steps = prompts, steps
        self._step: CudaGraphStep | None = None
        self._rows = torch.zeros(0, dtype=torch.long)
        """Rows of the static buffers that hold unfinished answers."""

    @property
    def order(self) -> list[int]:
        """Index of the prompt in each batch row."""
        return self.prompts.order

    def prefill(self, prompts: Sequence[Prompt], groups: Sequence[Group]) -> Tensor:
        """Return logits [B, V] after each prompt, rows in `order`."""
        return self.prompts.prefill(prompts, groups)

    def step(self, ids_B: Tensor) -> Tensor:
        """Append one token to each row; return logits [B, V], which the next step overwrites."""
        step = self._step or self._enter()
        logits_BV = step.run(ids_B, self._rows)
        return logits_BV if len(self._rows) == step.rows else logits_BV[self._rows]

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows."""
        step = self._step
        if step is None:
            return self.prompts.keep(rows)
        self.prompts.order = [self.order[row] for row in rows.tolist()]
        self._rows = self._rows[rows.to(self._rows.device)]
        if row_count(len(rows)) < step.rows:
            places_BC = step.places_BC[self._rows, : step.filled]
            keys, values = ([one[self._rows, :, : step.filled] for one in half] for half in (step.keys, step.values))
            self._move(keys, values, places_BC, step.lengths_B[self._rows], self.prompts.capacity)
            self.steps.give(step)
        return None

    def verify(self, ids: Sequence[int]) -> Tensor:
        """Append N tokens to the single row; return logits [N, V] after each."""
        self._leave()
        return self.prompts.verify(ids)

    def rewind(self, count: int) -> None:
        """Remove the last `count` tokens of the single row."""
        self._leave()
        self.prompts.rewind(count)

    def close(self, fed: Sequence[int]) -> None:
        """End the run: return the static buffers; the cache of a single row goes to the prefix cache."""
        try:
            if self.prompts.is_cached:
                self._leave()
            self.prompts.close(fed)
        finally:
            if self._step is not None:
                self.steps.give(self._step)
                self._step = None

    def logits_at(self, prompts: Sequence[Prompt], places: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Yield logits [N, V] at the given positions of each prompt."""
        return self.prompts.logits_at(prompts, places)

    def _enter(self) -> CudaGraphStep:
        positions, cache = self.prompts.positions, self.prompts.cache
        keys = [layer.keys[:, :, : layer.filled] for layer in cache.layers]
        values = [layer.values[:, :, : layer.filled] for layer in cache.layers]
        places_BC = positions.places_BC[:, : positions.filled]
        return self._move(keys, values, places_BC, positions.lengths_B, self.prompts.capacity)

    def _move(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], places_BC: Tensor, lengths_B: Tensor, capacity: int
    ) -> CudaGraphStep:
        rows = len(lengths_B)
        self._step = self.steps.take(keys[0], rows, capacity)
        self._step.load(keys, values, places_BC, lengths_B)
        self._rows = torch.arange(rows, device=lengths_B.device)
        return self._step

    def _leave(self) -> None:
        """Copy the tokens of the single row back to the ordinary cache."""
        step, positions = self._step, self.prompts.positions
        if step is None:
            return
        start, end = positions.filled, step.filled
        for index, layer in enumerate(self.prompts.cache.layers):
            layer.keys[:, :, start:end] = step.keys[index][:1, :, start:end]
            layer.values[:, :, start:end] = step.values[index][:1, :, start:end]
            layer.filled = end
        positions.append([end - start])
        self.steps.give(step)
        self._step = None
