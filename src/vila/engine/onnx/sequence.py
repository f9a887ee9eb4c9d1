"""A single sequence on onnxruntime: prefill and decode steps on a static KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vila.core.errors import ConfigError, ContextOverflowError
from vila.engine.onnx.graph import cache_names
from vila.engine.onnx.program import Binding, OnnxProgram, append
from vila.kernels.int4 import Int4Weight
from vila.model.modeling import VilaForConditionalGeneration

# S tokens  D model width  V vocab  N positions with logits


class OnnxSequence:
    """One sequence of a program with its KV cache, whose memory is committed as it fills."""

    def __init__(self, program: OnnxProgram) -> None:
        self.program = program
        self.length = 0
        shape = (1, program.num_kv_heads, program.capacity, program.head_width)
        self._caches = [np.zeros(shape, np.float32) for _ in cache_names(program.num_layers)]
        self._binding = Binding(program, self._caches)
        self._step = self._binding.embeds_BSD, [0], self._binding.logits_BNV
        self._embeds_D = torch.from_numpy(self._step[0])[0, 0]

    @staticmethod
    def of(
        model: VilaForConditionalGeneration, weights: Mapping[str, Int4Weight] | None = None, **options: Any
    ) -> OnnxSequence:
        """Return an empty sequence with its own program; arguments and errors are those of OnnxProgram."""
        return OnnxSequence(OnnxProgram(model, weights, **options))

    @property
    def nbytes(self) -> int:
        """Bytes of the filled part of the cache."""
        return sum(cache.nbytes for cache in self._caches) // self.program.capacity * self.length

    def reserve(self, capacity: int) -> None:
        """Check the capacity, which is fixed. Raises ContextOverflowError."""
        self._check_capacity(max(0, capacity - self.length))

    def prefill(self, embeds_1SD: Tensor) -> Tensor:
        """Append S tokens, given by their embeddings; return logits [V] after the last one.

        Raises ContextOverflowError if they do not fit.
        """
        return self.logits_at(embeds_1SD, [embeds_1SD.shape[1] - 1])[0]

    def logits_at(self, embeds_1SD: Tensor, places: Sequence[int]) -> Tensor:
        """Append S tokens; return logits [N, V] at `places`, ascending indices into the S tokens."""
        self._check_capacity(embeds_1SD.shape[1])
        try:
            logits_NV = torch.cat(list(append(self._binding, embeds_1SD, places, self.length)))
        finally:
            self._binding.bind(*self._step)
        self.length += embeds_1SD.shape[1]
        return logits_NV

    def step(self, token: int) -> Tensor:
        """Append one token; return logits [V]. Raises ContextOverflowError if the cache is full."""
        self._check_capacity(1)
        self._embeds_D.copy_(self.program.embeddings_VD[token])
        self._binding.run(self.length + 1)
        self.length += 1
        return torch.from_numpy(self._binding.logits_BNV[0, 0].copy())

    def reset(self, length: int = 0) -> None:
        """Keep only the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ConfigError(f"onnx backend: cannot reset to {length} of {self.length} tokens")
        self.length = length

    def fork(self, length: int | None = None) -> OnnxSequence:
        """Return a copy of the sequence, or of its first `length` tokens."""
        other = OnnxSequence(self.program)
        other.length = self.length if length is None else length
        for new, old in zip(other._caches, self._caches, strict=True):
            new[:, :, : other.length] = old[:, :, : other.length]
        return other

    def _check_capacity(self, count: int) -> None:
        if self.length + count > self.program.capacity:
            raise ContextOverflowError(
                f"{self.length} + {count} tokens exceed the KV cache capacity of {self.program.capacity}",
                hint="shorten it, or use a larger capacity",
            )
