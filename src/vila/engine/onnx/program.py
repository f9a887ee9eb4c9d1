"""A model's LLM as a session of onnxruntime: made once, run by any number of sequences, alone or in rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila.core.errors import ConfigError
from vila.core.optional import require
from vila.engine.onnx.graph import cache_names, decoder_graph
from vila.engine.onnx.weights import ACTIVATION_BITS, ActivationBits, HeadBits, decoder_weights
from vila.kernels.int4 import Int4Weight
from vila.model.modeling import VilaForConditionalGeneration

# B rows  S tokens  D model width  V vocab  N wanted places  H KV heads  C columns  E head width

CHUNK = 512
"""Tokens of a prompt that are computed at a time; attention takes memory of this times the filled columns a head."""


class OnnxProgram:
    """The session of a model, and the facts that whoever runs it needs.

    weights:          4-bit weights in place of Linears, named as in the model; Linears that are 4-bit ones already keep
                      their own.
    head_bits:        32 keeps the head as it is; 8 and 4 round it, which costs accuracy. A 4-bit head stays one.
    threads:          of the products; 0 for as many as torch uses.
    capacity:         most tokens of a sequence; 0 for the model's context.
    activation_bits:  in products with few bits: 8 rounds to int8; 16 takes two such numbers for each, which is nearly
                      float32 and costs some small operators more; 32 keeps float32, which is several times as slow.

    Everything that is not 4-bit is computed in float32. Threads may run it at the same time.
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
        self.runtime = find_runtime()
        if threads < 0 or capacity < 0:
            raise ConfigError(f"onnx backend: threads={threads}, capacity={capacity}: from 1, or 0 to be chosen")
        if activation_bits not in ACTIVATION_BITS:
            raise ConfigError(f"onnx backend: activation_bits={activation_bits!r}: 8, 16 or 32")
        self.threads = threads or torch.get_num_threads()
        """Of the products."""
        self.capacity = capacity or int(model.config.context_length)
        """Most tokens of a sequence."""
        arrays = decoder_weights(model, weights or {}, head_bits=head_bits, capacity=self.capacity)
        graph, values = decoder_graph(arrays, activation_bits=activation_bits)
        self.session, self._held = _session(self.runtime, graph.SerializeToString(), values, self.threads)
        self.embeddings_VD: Tensor = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
        self.num_layers, self.num_kv_heads, self.head_width = len(arrays.blocks), arrays.num_kv_heads, arrays.head_width
        self.width, self.vocab = arrays.width, arrays.head.num_outputs
        self.weight_bytes = sum(array.nbytes for name, array in values.items() if name not in ("cos", "sin"))
        """Bytes of the weights, as they are given to onnxruntime: what every step reads."""
        self.head_bits = arrays.head.bits
        """Bits of the head's weights."""
        self.activation_bits = activation_bits


class Binding:
    """The caches of some rows, bound to a program's inputs and outputs: each run appends to them in place."""

    def __init__(self, program: OnnxProgram, caches: Sequence[NDArray[Any]]) -> None:
        """caches: float32 [B, H, C, E], keys and values of each layer in turn; they are written, never replaced."""
        self._program, rows = program, len(caches[0])
        self._binding = program.session.io_binding()
        self._bound: dict[str, Any] = {}
        for (past, present), buffer in zip(cache_names(program.num_layers), caches, strict=True):
            self._binding.bind_ortvalue_output(present, self._input(past, buffer))
        self._last_key_B, self._length_1 = np.zeros(rows, np.int32), np.zeros(1, np.int32)
        self._input("last_key", self._last_key_B)
        self._input("length", self._length_1)
        self.embeds_BSD = np.zeros((rows, 1, program.width), np.float32)
        """What is fed; `take` replaces it."""
        self.logits_BNV = np.zeros((rows, 1, program.vocab), np.float32)
        """After the wanted places; the next run overwrites them."""
        self.take(self.embeds_BSD, [0], self.logits_BNV)

    def take(
        self, embeds_BSD: NDArray[np.float32], places: Sequence[int], logits_BNV: NDArray[np.float32] | None = None
    ) -> None:
        """Feed these embeddings from now on, as many tokens as they have, and want the logits after some of them."""
        if logits_BNV is None:
            logits_BNV = np.zeros((len(embeds_BSD), len(places), self._program.vocab), np.float32)
        self.embeds_BSD, self.logits_BNV = embeds_BSD, logits_BNV
        self._input("embeds", embeds_BSD)
        self._input("places", np.array(places, np.int64))
        value = self._program.runtime.OrtValue.ortvalue_from_numpy(logits_BNV)
        self._bound["logits"] = (value, logits_BNV)
        self._binding.bind_ortvalue_output("logits", value)

    def run(self, lengths: Sequence[int] | int) -> None:
        """Append what is fed to each row, which has so many tokens with it."""
        self._last_key_B[:] = lengths
        self._last_key_B -= 1
        self._length_1[0] = self._last_key_B.max() + 1
        self._program.session.run_with_iobinding(self._binding)

    def _input(self, name: str, buffer: NDArray[Any]) -> Any:
        value = self._program.runtime.OrtValue.ortvalue_from_numpy(buffer)
        # The value does not own its buffer.
        self._bound[name] = (value, buffer)
        self._binding.bind_ortvalue_input(name, value)
        return value


def append(binding: Binding, embeds_1SD: Tensor, places: Sequence[int], length: int) -> Iterator[Tensor]:
    """Append a piece of a prompt to the only row of a binding, which has `length` tokens, chunk by chunk.

    Yields the logits [N, V] after those of `places` in each chunk; they rise, and count from the first of the S.
    """
    embeds = np.ascontiguousarray(embeds_1SD.detach().float().numpy())
    for start in range(0, embeds.shape[1], CHUNK):
        chunk = np.ascontiguousarray(embeds[:, start : start + CHUNK])
        end = start + chunk.shape[1]
        inside = [place - start for place in places if start <= place < end]
        # A product of no rows is not asked for: the last place is computed and thrown away.
        binding.take(chunk, inside or [end - start - 1])
        binding.run(length + end)
        yield torch.from_numpy(binding.logits_BNV)[0, : len(inside)]


def find_runtime() -> Any:
    """Import the onnxruntime package. Raises MissingExtraError, a ConfigError."""
    return require("onnxruntime", "the onnx backend", extra="onnx")


def _session(runtime: Any, graph: bytes, arrays: Mapping[str, NDArray[Any]], threads: int) -> tuple[Any, list[Any]]:
    """The session of a graph, and the values that it reads its weights from but does not own."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Threads that wait for the next step turn idly, which is fast; between runs they leave the cores to torch.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    values = {name: runtime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    options.add_external_initializers(list(values), list(values.values()))
    session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return session, [values, arrays]
