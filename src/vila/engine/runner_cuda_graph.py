"""Runner whose decode steps use fixed addresses and no host synchronisation, replayed as CUDA graphs.

On a CPU the same code runs without a graph. Numbers of rows and columns are rounded up to buckets, so that few graphs
serve all batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vila.engine.attention import ForwardBatch
from vila.engine.kv_cache import KVCache
from vila.engine.runner_torch import TorchRunner
from vila.engine.vision_cache import VisionCache
from vila.families import attention_windows
from vila.model.modeling import VilaForConditionalGeneration

# B rows of a step  H query heads  G KV heads  E head width  C columns  K columns that a step reads  V vocab

_BUCKET = 256
"""The number of columns that a step reads is rounded up to a multiple of this."""
_WARM_UPS = 2
"""Steps before a capture, which select kernels and allocate memory."""


class CudaGraphRunner(TorchRunner):
    """Runs batches of decode steps on the first rows of the KV cache; other batches run as in TorchRunner.

    Rows without a decode step are computed too: their token is written to the spare columns of the cache, and their
    logits are discarded.
    """

    def __init__(self, model: VilaForConditionalGeneration, features: VisionCache, cache: KVCache) -> None:
        super().__init__(model, features, cache)
        device = model.device
        self._ids_R = torch.zeros(cache.rows, dtype=torch.long, device=device)
        self._columns_R = torch.zeros(cache.rows, dtype=torch.long, device=device)
        self._logits_RV: Tensor | None = None
        self._windows = set(attention_windows(model.config.text_config))
        self._graphs: dict[tuple[int, int], Any] = {}
        self.steps = 0
        """Steps at fixed addresses so far."""
        self.captures = 0

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Run one forward pass; see `ModelRunner.forward`. The next decode step overwrites the logits."""
        if batch.chunks:
            return super().forward(batch)
        used = [one.row for one in batch.steps]
        rows = min(row_bucket(used[-1] + 1), self.cache.rows)
        spare = self.cache.keys[0].shape[2] - 1
        ids, columns = [0] * rows, [spare] * rows
        for one in batch.steps:
            ids[one.row], columns[one.row] = one.ids[0], one.start
        self._ids_R[:rows] = torch.tensor(ids).to(self._ids_R.device, non_blocking=True)
        self._columns_R[:rows] = torch.tensor(columns).to(self._ids_R.device, non_blocking=True)
        reads = min(round_up(max(one.start for one in batch.steps) + 1, _BUCKET), spare + 1)
        self.replay(rows, reads)
        assert self._logits_RV is not None
        return self._logits_RV[: len(used)] if used[-1] + 1 == len(used) else self._logits_RV[used]

    def replay(self, rows: int, reads: int) -> None:
        """Run the step of the first `rows` rows over `reads` columns on the inputs at fixed addresses."""
        self.steps += 1
        if not self._ids_R.is_cuda:
            self._step(rows, reads)
            return
        if (rows, reads) not in self._graphs:
            self._graphs[rows, reads] = self._capture(rows, reads)
        self._graphs[rows, reads].replay()

    def _step(self, rows: int, reads: int) -> None:
        """Run one decode step. It is captured, so every tensor that is used after it is written in place."""
        ids_B, columns_B = self._ids_R[:rows], self._columns_R[:rows]
        embeds_BD = self.model.get_input_embeddings()(ids_B)
        masks = {window: _mask(columns_B, reads, window, embeds_BD.dtype) for window in self._windows}
        logits_BV = self.logits(self.states(embeds_BD, columns_B, _Attention(self.cache, columns_B, reads, masks)))
        if self._logits_RV is None:
            self._logits_RV = logits_BV.new_empty(self.cache.rows, logits_BV.shape[1])
        self._logits_RV[:rows] = logits_BV

    def _capture(self, rows: int, reads: int) -> Any:
        # The columns that warm-up steps write are written again.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._step(rows, reads)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(rows, reads)
        self.captures += 1
        return graph


def _mask(columns_B: Tensor, reads: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return the additive mask [B, 1, 1, K]: 0 for a row's tokens up to its column and in the window, -inf for others.

    A row without a decode step sees all columns, so that no softmax is empty.
    """
    age_BK = columns_B[:, None] - torch.arange(reads, device=columns_B.device)
    hidden_BK = age_BK < 0 if window is None else (age_BK < 0) | (age_BK >= window)
    hidden_BK = hidden_BK & (columns_B < reads)[:, None]
    return torch.zeros_like(hidden_BK, dtype=dtype).masked_fill_(hidden_BK, -torch.inf)[:, None, None]


class _Attention:
    """Attention of one query per row over the columns that the step reads."""

    def __init__(self, cache: KVCache, columns_B: Tensor, reads: int, masks: dict[int | None, Tensor]) -> None:
        self.cache, self.columns_B, self.reads, self.masks = cache, columns_B, reads, masks
        self._rows_B = torch.arange(len(columns_B), device=columns_B.device)

    def attend(
        self, layer: int, query_HBE: Tensor, key_GBE: Tensor, value_GBE: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Return the attention [B, H, E]."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self._rows_B, :, self.columns_B] = key_GBE.transpose(0, 1)
        values[self._rows_B, :, self.columns_B] = value_GBE.transpose(0, 1)
        # Query heads of a KV head take the sequence dimension, so that no key is read or copied twice.
        query_BGgE = query_HBE.transpose(0, 1).unflatten(1, (keys.shape[1], -1))
        rows = len(self.columns_B)
        out = F.scaled_dot_product_attention(
            query_BGgE,
            keys[:rows, :, : self.reads],
            values[:rows, :, : self.reads],
            attn_mask=self.masks[window],
            scale=scale,
        )
        return out.flatten(1, 2)


def row_bucket(rows: int) -> int:
    """Round a number of rows up to a power of two."""
    return 1 << (rows - 1).bit_length()


def round_up(count: int, unit: int) -> int:
    """Round up to a multiple of `unit`."""
    return -(-count // unit) * unit
