"""Model runner of onnxruntime: decode steps together, each prefill chunk in a separate run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vila.engine.model_runner import ModelRunner
from vila.engine.onnx.program import Binding, OnnxProgram, append
from vila.engine.ragged_attention import TokenRange
from vila.engine.vision_cache import VisionCache
from vila.model.modeling import VilaForConditionalGeneration

# B rows of a run  S tokens of a chunk  D model width  V vocab  N positions with logits

_BINDINGS = 32
"""Row ranges whose bindings are kept; binding all caches takes about as long as a step of a small model."""


class OnnxRunner(ModelRunner):
    """Runs a range of adjacent KV rows at once; rows of the range that do not decode are computed and restored."""

    def __init__(
        self, model: VilaForConditionalGeneration, features: VisionCache, tokens: int, program: OnnxProgram
    ) -> None:
        super().__init__(model, features, tokens, torch.float32)
        self.program = program
        self._bindings: dict[tuple[int, int, int], Binding] = {}

    def forward(
        self,
        steps: Sequence[tuple[TokenRange, int]],
        pieces: Sequence[tuple[TokenRange, Tensor]],
        ends: Sequence[int],
    ) -> Tensor:
        """Run the passes; see `ModelRunner.forward`."""
        logits = [self._grow(steps)] if steps else []
        for number, (place, embeds_SD) in enumerate(pieces):
            wanted = [place.count - 1] if number in ends else []
            logits += append(self._bind(place.row, 1), embeds_SD[None], wanted, place.start)
        return torch.cat(logits)

    def _grow(self, steps: Sequence[tuple[TokenRange, int]]) -> Tensor:
        first, last = steps[0][0].row, steps[-1][0].row
        binding = self._bound(first, last + 1 - first)
        rows = [place.row - first for place, _ in steps]
        ids = torch.tensor([token for _, token in steps])
        torch.from_numpy(binding.embeds_BSD)[rows, 0] = self.program.embeddings_VD[ids].float()
        # A row that rests is given a token for its first column, which is put back: nothing is shorter.
        lengths = [1] * (last + 1 - first)
        for row, (place, _) in zip(rows, steps, strict=True):
            lengths[row] = place.start + 1
        resting = sorted(set(range(first, last + 1)) - {place.row for place, _ in steps})
        kept = [both[:, resting, :, 0] for both in self.pool.buffers] if resting else []
        try:
            binding.run(lengths)
        finally:
            for both, before in zip(self.pool.buffers, kept, strict=False):
                both[:, resting, :, 0] = before
        return torch.from_numpy(binding.logits_BNV)[rows, 0]

    def _bound(self, first: int, count: int) -> Binding:
        """Return the cached binding of `count` adjacent rows from `first`, for one token each."""
        key = (self.pool.rows, first, count)
        if key not in self._bindings:
            if len(self._bindings) >= _BINDINGS:
                del self._bindings[next(iter(self._bindings))]
            self._bindings[key] = self._bind(first, count)
        return self._bindings[key]

    def _bind(self, first: int, count: int) -> Binding:
        layers = zip(self.pool.keys, self.pool.values, strict=True)
        return Binding(self.program, [one[first : first + count].numpy() for layer in layers for one in layer])
