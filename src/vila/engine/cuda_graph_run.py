"""A batch of prompts whose steps run at fixed addresses: prefilled as any other, then moved to a captured step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vila.engine.batch import BatchRun, Group
from vila.engine.cuda_graph_step import CudaGraphStep, CudaGraphSteps, row_count
from vila.engine.vision_cache import Prompt

# B rows  V vocab


class CudaGraphRun:
    """The state of a batch on its way; its rows move to the step when the first token is fed.

    Rows that have ended stay where they are until half of them have, and then the others move to a smaller step.
    """

    def __init__(self, prompts: BatchRun, steps: CudaGraphSteps) -> None:
        """prompts: computes the prompts, and steps that are more than one token long."""
        self.prompts, self.steps = prompts, steps
        self._step: CudaGraphStep | None = None
        self._rows = torch.zeros(0, dtype=torch.long)
        """Rows of the step in which prompts stand that have not ended."""

    @property
    def order(self) -> list[int]:
        """Index of the prompt in each batch row."""
        return self.prompts.order

    def prefill(self, prompts: Sequence[Prompt], groups: Sequence[Group]) -> Tensor:
        """Return logits [B, V] after each prompt, rows in `order`."""
        return self.prompts.prefill(prompts, groups)

    def step(self, ids_B: Tensor) -> Tensor:
        """Logits [B, V] after one more token in each row; the next step overwrites them."""
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
        """The run is over: its step goes back, and what a row alone has computed stays for others."""
        try:
            if self.prompts.is_kept:
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
        columns, cache = self.prompts.columns, self.prompts.cache
        keys = [layer.keys[:, :, : layer.filled] for layer in cache.layers]
        values = [layer.values[:, :, : layer.filled] for layer in cache.layers]
        places_BC = columns.places_BC[:, : columns.filled]
        return self._move(keys, values, places_BC, columns.lengths_B, self.prompts.capacity)

    def _move(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], places_BC: Tensor, lengths_B: Tensor, capacity: int
    ) -> CudaGraphStep:
        rows = len(lengths_B)
        self._step = self.steps.take(keys[0], rows, capacity)
        self._step.load(keys, values, places_BC, lengths_B)
        self._rows = torch.arange(rows, device=lengths_B.device)
        return self._step

    def _leave(self) -> None:
        """Give the only row its tokens back."""
        step, columns = self._step, self.prompts.columns
        if step is None:
            return
        start, end = columns.filled, step.filled
        for index, layer in enumerate(self.prompts.cache.layers):
            layer.keys[:, :, start:end] = step.keys[index][:1, :, start:end]
            layer.values[:, :, start:end] = step.values[index][:1, :, start:end]
            layer.filled = end
        columns.append([end - start])
        self.steps.give(step)
        self._step = None
