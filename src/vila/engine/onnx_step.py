"""Decoding on a CPU by onnxruntime: a prompt, then token by token, on a static cache that is written in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila.core.errors import ConfigError, ContextOverflowError
from vila.engine.onnx_graph import ACTIVATION_BITS, ActivationBits, cache_names, decoder_graph
from vila.engine.onnx_weights import HeadBits, decoder_weights
from vila.kernels.int4_layout import Int4Weight
from vila.model.vila import VilaForConditionalGeneration

# S tokens  D model width  V vocab  N wanted places  H key-value heads  C capacity  E head width

_CHUNK = 512
"""Tokens of a prompt that are computed at a time; attention takes memory of this times the filled columns a head."""


@dataclass(frozen=True, eq=False)
class _Program:
    """What all decoders of one model share."""

    runtime: Any
    session: Any
    weights: list[Any]
    """The session reads these buffers; it does not own them."""
    embeddings_VD: Tensor
    num_layers: int
    cache_shape: tuple[int, int, int, int]
    vocab: int
    threads: int
    weight_bytes: int
    head_bits: int


class OnnxDecoder:
    """One sequence on its way through a model's LLM.

    weights:          4-bit weights in place of Linears, named as in the model; Linears that are 4-bit ones already keep
                      their own.
    head_bits:        32 keeps the head as it is; 8 and 4 round it, which costs accuracy. A 4-bit head stays one.
    threads:          of the products; 0 for as many as torch uses.
    capacity:         most tokens of a sequence; 0 for the model's context.
    activation_bits:  in products with few bits: 8 rounds to int8; 16 takes two such numbers for each, which is nearly
                      float32 and costs some small operators more; 32 keeps float32, which is several times as slow.

    Everything that is not 4-bit is computed in float32. Memory of the cache is taken as it fills.
    Raises ConfigError when onnxruntime is missing or cannot compute this model, naming what it cannot.
    """

    def __init__(
        self,
        model: VilaForConditionalGeneration,
        weights: Mapping[str, Int4Weight] | None = None,
        *,
        head_bits: HeadBits = 32,
        threads: int = 0,
        capacity: int = 0,
        activation_bits: ActivationBits = 8,
    ) -> None:
        runtime = find_runtime()
        if threads < 0 or capacity < 0:
            raise ConfigError(f"onnx backend: threads={threads}, capacity={capacity}: from 1, or 0 to be chosen")
        if activation_bits not in ACTIVATION_BITS:
            raise ConfigError(f"onnx backend: activation_bits={activation_bits!r}: 8, 16 or 32")
        threads = threads or torch.get_num_threads()
        capacity = capacity or model.config.context_length
        arrays = decoder_weights(model, weights or {}, head_bits=head_bits, capacity=capacity)
        graph, values = decoder_graph(arrays, activation_bits=activation_bits)
        session, held = _session(runtime, graph.SerializeToString(), values, threads)
        cache_shape = (1, arrays.num_kv_heads, capacity, arrays.head_width)
        embeddings_VD: Tensor = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
        vocab, num_layers = arrays.head.num_outputs, len(arrays.blocks)
        read = sum(array.nbytes for name, array in values.items() if name not in ("cos", "sin"))
        bits = arrays.head.bits
        self._begin(
            _Program(runtime, session, held, embeddings_VD, num_layers, cache_shape, vocab, threads, read, bits)
        )

    def _begin(self, program: _Program) -> None:
        self._program = program
        self.length = 0
        self._caches = [np.zeros(program.cache_shape, np.float32) for _ in cache_names(program.num_layers)]
        self._embeds = np.zeros((1, 1, program.embeddings_VD.shape[1]), np.float32)
        self._embeds_D = torch.from_numpy(self._embeds)[0, 0]
        self._last_key, self._length = np.zeros(1, np.int32), np.zeros(1, np.int32)
        self._logits = np.zeros((1, 1, program.vocab), np.float32)
        self._binding = program.session.io_binding()
        self._bound: dict[str, Any] = {}
        for (past, present), buffer in zip(cache_names(program.num_layers), self._caches, strict=True):
            self._binding.bind_ortvalue_output(present, self._bind(past, buffer))
        self._bind("last_key", self._last_key)
        self._bind("length", self._length)
        self._bind_step()

    @property
    def threads(self) -> int:
        """Threads of the products."""
        return self._program.threads

    @property
    def head_bits(self) -> int:
        """Bits of the head's weights."""
        return self._program.head_bits

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights, as they are given to onnxruntime: what every step reads."""
        return self._program.weight_bytes

    @property
    def capacity(self) -> int:
        """Most tokens of a sequence."""
        return self._program.cache_shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the cache that are filled, which is what it takes of the memory."""
        return sum(cache.nbytes for cache in self._caches) // self.capacity * self.length

    def reserve(self, capacity: int) -> None:
        """Room for so many tokens; there is always all of it. Raises ContextOverflowError."""
        self._check_room(max(0, capacity - self.length))

    def prefill(self, embeds_1SD: Tensor) -> Tensor:
        """Append S tokens, given by their embeddings; logits [V] after the last one.

        Raises ContextOverflowError when they do not fit.
        """
        return self.logits_at(embeds_1SD, [embeds_1SD.shape[1] - 1])[0]

    def logits_at(self, embeds_1SD: Tensor, places: Sequence[int]) -> Tensor:
        """Append S tokens; logits [N, V] after those at `places`, which rise and count from the first of the S."""
        embeds = np.ascontiguousarray(embeds_1SD.detach().float().numpy())
        self._check_room(embeds.shape[1])
        out = []
        try:
            for start in range(0, embeds.shape[1], _CHUNK):
                chunk = embeds[:, start : start + _CHUNK]
                inside = [place - start for place in places if start <= place < start + chunk.shape[1]]
                out.append(self._append(np.ascontiguousarray(chunk), inside))
        finally:
            self._bind_step()
        return torch.cat(out)

    def step(self, token: int) -> Tensor:
        """Append one token; logits [V] after it. Raises ContextOverflowError when the cache is full."""
        self._check_room(1)
        self._embeds_D.copy_(self._program.embeddings_VD[token])
        self._run(1)
        return torch.from_numpy(self._logits[0, 0].copy())

    def reset(self, length: int = 0) -> None:
        """Go back to the first `length` tokens, which need not be computed again."""
        if not 0 <= length <= self.length:
            raise ConfigError(f"onnx backend: cannot go back to {length} of {self.length} tokens")
        self.length = length

    def fork(self, length: int | None = None) -> OnnxDecoder:
        """A second sequence that begins with the same tokens, or the first `length` of them; they are copied."""
        other = OnnxDecoder.__new__(OnnxDecoder)
        other._begin(self._program)
        other.length = self.length if length is None else length
        for new, old in zip(other._caches, self._caches, strict=True):
            new[:, :, : other.length] = old[:, :, : other.length]
        return other

    def _append(self, embeds: NDArray[np.float32], places: Sequence[int]) -> Tensor:
        # A product of no rows is not asked for: the last place is computed and thrown away.
        wanted = np.array(places or [embeds.shape[1] - 1], np.int64)
        logits = np.zeros((1, len(wanted), self._program.vocab), np.float32)
        self._bind("embeds", embeds)
        self._bind("places", wanted)
        self._bind_output("logits", logits)
        self._run(embeds.shape[1])
        return torch.from_numpy(logits)[0, : len(places)]

    def _run(self, count: int) -> None:
        self._last_key[0], self._length[0] = self.length + count - 1, self.length + count
        self._program.session.run_with_iobinding(self._binding)
        self.length += count

    def _bind_step(self) -> None:
        self._bind("embeds", self._embeds)
        self._bind("places", np.zeros(1, np.int64))
        self._bind_output("logits", self._logits)

    def _bind(self, name: str, buffer: NDArray[Any]) -> Any:
        value = self._program.runtime.OrtValue.ortvalue_from_numpy(buffer)
        # The value does not own its buffer.
        self._bound[name] = (value, buffer)
        self._binding.bind_ortvalue_input(name, value)
        return value

    def _bind_output(self, name: str, buffer: NDArray[Any]) -> None:
        value = self._program.runtime.OrtValue.ortvalue_from_numpy(buffer)
        self._bound[name] = (value, buffer)
        self._binding.bind_ortvalue_output(name, value)

    def _check_room(self, count: int) -> None:
        if self.length + count > self.capacity:
            raise ContextOverflowError(
                f"a sequence of {self.length} and {count} more tokens does not fit a cache of {self.capacity}; "
                "shorten it, or ask for a greater capacity"
            )


def _session(runtime: Any, graph: bytes, arrays: Mapping[str, NDArray[Any]], threads: int) -> tuple[Any, list[Any]]:
    """The session of a graph, and the values that it reads its weights from."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Threads that wait for the next step turn idly, which is fast; between runs they leave the cores to torch.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    values = {name: runtime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    options.add_external_initializers(list(values), list(values.values()))
    session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return session, [values, arrays]


def find_runtime() -> Any:
    """The onnxruntime package. Raises ConfigError when it cannot be imported."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f"onnx backend: onnxruntime cannot be imported ({error}); pip install 'vila-vlm[onnx]'"
        ) from error
    return onnxruntime
