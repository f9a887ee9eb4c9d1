"""Decode step on static buffers without host synchronisation, replayed as a CUDA graph.

On a CPU the same code runs without a graph. Batch sizes and lengths are rounded up to buckets, so that few graphs
serve all runs.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vila.engine.attention_mask import PADDING
from vila.engine.ragged_attention import use_ragged_attention
from vila.families import attention_windows
from vila.model.modeling import VilaForConditionalGeneration

# B rows  H query heads  G KV heads  E head width  C columns  K columns that a step reads  V vocab

_BUCKET = 256
"""The number of columns that a step reads is rounded up to a multiple of this."""
_WARM_UPS = 2
"""Steps before a capture, which select kernels and allocate memory."""


class CudaGraphStep:
    """Buffers for `rows` sequences of `columns` tokens, and the step that appends a token to each.

    Unused rows are computed and discarded. Each step overwrites the logits of the last one.
    """

    def __init__(self, model: VilaForConditionalGeneration, like: Tensor, rows: int, columns: int) -> None:
        """like: keys of one layer, [.., G, .., E], for their shape, dtype and device."""
        self.model, self.rows, self.columns = model, rows, columns
        device, layers = like.device, int(model.config.text_config.num_hidden_layers)
        shape = (rows, like.shape[1], columns, like.shape[3])
        # Masked values are still multiplied by zero, so they must be finite.
        self.keys = [like.new_zeros(shape) for _ in range(layers)]
        self.values = [like.new_zeros(shape) for _ in range(layers)]
        self.places_BC = torch.full((rows, columns), PADDING, dtype=torch.long, device=device)
        self.lengths_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.column_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.ids_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.filled = 0
        self.steps = 0
        """Steps of all runs so far."""
        self.captures = 0
        self._windows = set(attention_windows(model.config.text_config))
        self._logits_BV: Tensor | None = None
        # transformers passes a 4D mask on unchanged and builds none; ragged attention ignores it.
        self._no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        self._graphs: dict[int, Any] = {}

    def load(self, keys: Sequence[Tensor], values: Sequence[Tensor], places_BC: Tensor, lengths_B: Tensor) -> None:
        """Load prefilled rows: filled columns only, at most `rows` and `columns` of them."""
        count, self.filled = places_BC.shape
        for new, old in zip((*self.keys, *self.values), (*keys, *values), strict=True):
            new[:count, :, : self.filled] = old
        self.places_BC.fill_(PADDING)
        self.places_BC[:count, : self.filled] = places_BC
        self.lengths_B.zero_()
        self.lengths_B[:count] = lengths_B
        self.column_1.fill_(self.filled)

    def run(self, ids_B: Tensor, rows: Tensor) -> Tensor:
        """Append a token to some rows; return float32 logits [B, V] of all rows."""
        self.ids_B.index_copy_(0, rows, ids_B)
        reads = min(round_up(self.filled + 1, _BUCKET), self.columns)
        if self.ids_B.is_cuda:
            if reads not in self._graphs:
                self._graphs[reads] = self._capture(reads)
            self._graphs[reads].replay()
        else:
            self._forward(reads)
        self.filled += 1
        self.steps += 1
        assert self._logits_BV is not None
        return self._logits_BV

    def _forward(self, reads: int) -> None:
        """The captured step: every tensor that outlives it is written in place."""
        self.places_BC.index_copy_(1, self.column_1, self.lengths_B[:, None])
        embeds_BD = self.model.get_input_embeddings()(self.ids_B)
        masks = {window: self._mask(reads, window, embeds_BD.dtype) for window in self._windows}
        states: Tensor = self.model.get_decoder()(
            inputs_embeds=embeds_BD[None],
            attention_mask=self._no_mask,
            position_ids=self.lengths_B[None],
            use_cache=False,
            forward_batch=_Attention(self, reads, masks),
        ).last_hidden_state[0]
        logits_BV = self.model.get_output_embeddings()(states)
        if self._logits_BV is None:
            self._logits_BV = torch.empty_like(logits_BV, dtype=torch.float32)
        self._logits_BV.copy_(logits_BV)
        self.lengths_B.add_(1)
        self.column_1.add_(1)

    def _mask(self, reads: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the additive mask [B, 1, 1, K]: 0 for real tokens in the window, -inf for others."""
        places_BK = self.places_BC[:, :reads]
        hidden_BK = places_BK == PADDING
        if window is not None:
            hidden_BK = hidden_BK | (places_BK <= self.lengths_B[:, None] - window)
        return torch.zeros_like(places_BK, dtype=dtype).masked_fill_(hidden_BK, -torch.inf)[:, None, None]

    def _capture(self, reads: int) -> Any:
        # Warm-up steps advance the lengths, which are reset; the columns they write are written again.
        before = self.lengths_B.clone(), self.column_1.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._forward(reads)
                self.lengths_B.copy_(before[0])
                self.column_1.copy_(before[1])
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._forward(reads)
        self.captures += 1
        return graph


class _Attention:
    """Attention of one query per row over the columns that the step reads."""

    def __init__(self, step: CudaGraphStep, reads: int, masks: dict[int | None, Tensor]) -> None:
        self.step, self.reads, self.masks = step, reads, masks

    def attend(
        self, layer: int, query_HBE: Tensor, key_GBE: Tensor, value_GBE: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Return the attention [B, H, E]."""
        keys, values = self.step.keys[layer], self.step.values[layer]
        keys.index_copy_(2, self.step.column_1, key_GBE.transpose(0, 1)[:, :, None])
        values.index_copy_(2, self.step.column_1, value_GBE.transpose(0, 1)[:, :, None])
        # Query heads of a KV head take the sequence dimension, so that no key is read or copied twice.
        query_BGgE = query_HBE.transpose(0, 1).unflatten(1, (keys.shape[1], -1))
        out = F.scaled_dot_product_attention(
            query_BGgE,
            keys[:, :, : self.reads],
            values[:, :, : self.reads],
            attn_mask=self.masks[window],
            scale=scale,
        )
        return out.flatten(1, 2)


class CudaGraphSteps:
    """Pool of a model's unused static buffers; a run has exclusive use of one."""

    def __init__(self, model: VilaForConditionalGeneration, kept: int = 4) -> None:
        """kept: maximum number of unused buffers; the least recently used are dropped."""
        use_ragged_attention(model.get_decoder())
        self.model, self.kept = model, kept
        self._free: list[CudaGraphStep] = []
        self._lock = threading.Lock()

    def take(self, like: Tensor, rows: int, columns: int) -> CudaGraphStep:
        """Return a step for at least this many rows and columns; shorter ones of this batch size are dropped."""
        rows, columns = row_count(rows), round_up(columns, _BUCKET)
        with self._lock:
            same = [step for step in self._free if step.rows == rows]
            for step in same:
                self._free.remove(step)
                if step.columns >= columns:
                    return step
        return CudaGraphStep(self.model, like, rows, columns)

    def give(self, step: CudaGraphStep) -> None:
        """Put a step back into the pool."""
        with self._lock:
            self._free.append(step)
            del self._free[: -self.kept]


def row_count(rows: int) -> int:
    """Round a number of rows up to a power of two."""
    return 1 << (rows - 1).bit_length()


def round_up(count: int, unit: int) -> int:
    """Round up to a multiple of `unit`."""
    return -(-count // unit) * unit
