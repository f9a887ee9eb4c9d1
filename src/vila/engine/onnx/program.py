"""onnxruntime session of a model's LLM, shared by any number of sequences or batches."""

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

# B rows  S tokens  D model width  V vocab  N positions with logits  H KV heads  C columns  E head width

CHUNK = 512
"""Prefill chunk in tokens; attention needs memory for this times the filled columns per head."""


class OnnxProgram:
    """The session of a model's LLM and its sizes. It is thread-safe.

    weights:         INT4 weights that replace Linears, by name; Linears that are already INT4 keep their own.
    head_bits:       32 keeps the LM head; 8 and 4 quantize it, which costs accuracy. A 4-bit head stays 4-bit.
    threads:         threads of matmuls; 0: as many as torch.
    capacity:        maximum length of a sequence; 0: the model's context length.
    activation_bits: activations of quantized matmuls: 8 rounds to int8; 16 uses two int8 values, nearly float32, for
                     some small additional operators; 32 keeps float32, which is several times slower.

    Everything else is computed in float32. Raises ConfigError if onnxruntime is missing or does not support the model.
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
            raise ConfigError(
                f"onnx backend: threads={threads}, capacity={capacity}: expected numbers from 1, or 0 for the default"
            )
        if activation_bits not in ACTIVATION_BITS:
            raise ConfigError(f"onnx backend: activation_bits={activation_bits!r}: expected 8, 16 or 32")
        self.threads = threads or torch.get_num_threads()
        """Threads of matmuls."""
        self.capacity = capacity or int(model.config.context_length)
        """Maximum length of a sequence."""
        arrays = decoder_weights(model, weights or {}, head_bits=head_bits, capacity=self.capacity)
        graph, values = decoder_graph(arrays, activation_bits=activation_bits)
        self.session, self._held = _session(self.runtime, graph.SerializeToString(), values, self.threads)
        self.embeddings_VD: Tensor = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
        self.num_layers, self.num_kv_heads, self.head_width = len(arrays.blocks), arrays.num_kv_heads, arrays.head_width
        self.width, self.vocab = arrays.width, arrays.head.num_outputs
        self.weight_bytes = sum(array.nbytes for name, array in values.items() if name not in ("cos", "sin"))
        """Bytes of the weights, which every decode step reads."""
        self.head_bits = arrays.head.bits
        """Bits of the LM head's weights."""
        self.activation_bits = activation_bits


class Binding:
    """KV caches of some rows, bound to the inputs and outputs of a program; each run appends to them in place."""

    def __init__(self, program: OnnxProgram, caches: Sequence[NDArray[Any]]) -> None:
        """caches: float32 [B, H, C, E], keys and values of each layer in turn; written in place."""
        self._program, rows = program, len(caches[0])
        self._binding = program.session.io_binding()
        self._bound: dict[str, Any] = {}
        for (past, present), buffer in zip(cache_names(program.num_layers), caches, strict=True):
            self._binding.bind_ortvalue_output(present, self._input(past, buffer))
        self._last_key_B, self._length_1 = np.zeros(rows, np.int32), np.zeros(1, np.int32)
        self._input("last_key", self._last_key_B)
        self._input("length", self._length_1)
        self.embeds_BSD = np.zeros((rows, 1, program.width), np.float32)
        """Input embeddings; `bind` replaces the buffer."""
        self.logits_BNV = np.zeros((rows, 1, program.vocab), np.float32)
        """Logits of the last run; the next one overwrites them."""
        self.bind(self.embeds_BSD, [0], self.logits_BNV)

    def bind(
        self, embeds_BSD: NDArray[np.float32], places: Sequence[int], logits_BNV: NDArray[np.float32] | None = None
    ) -> None:
        """Bind input embeddings, and the positions after which logits are computed."""
        if logits_BNV is None:
            logits_BNV = np.zeros((len(embeds_BSD), len(places), self._program.vocab), np.float32)
        self.embeds_BSD, self.logits_BNV = embeds_BSD, logits_BNV
        self._input("embeds", embeds_BSD)
        self._input("places", np.array(places, np.int64))
        value = self._program.runtime.OrtValue.ortvalue_from_numpy(logits_BNV)
        self._bound["logits"] = (value, logits_BNV)
        self._binding.bind_ortvalue_output("logits", value)

    def run(self, lengths: Sequence[int] | int) -> None:
        """Append the bound embeddings to each row; lengths: tokens per row including them."""
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
    """Append S tokens to the single row of a binding, which has `length` tokens, chunk by chunk.

    Yields the logits [N, V] at the positions of each chunk. `places` are ascending indices into the S tokens.
    """
    embeds = np.ascontiguousarray(embeds_1SD.detach().float().numpy())
    for start in range(0, embeds.shape[1], CHUNK):
        chunk = np.ascontiguousarray(embeds[:, start : start + CHUNK])
        end = start + chunk.shape[1]
        inside = [place - start for place in places if start <= place < end]
        # Matmuls need at least one row: the last position is computed and discarded.
        binding.bind(chunk, inside or [end - start - 1])
        binding.run(length + end)
        yield torch.from_numpy(binding.logits_BNV)[0, : len(inside)]


def find_runtime() -> Any:
    """Import the onnxruntime package. Raises MissingExtraError, a ConfigError."""
    return require("onnxruntime", "the onnx backend", extra="onnx")


def _session(runtime: Any, graph: bytes, arrays: Mapping[str, NDArray[Any]], threads: int) -> tuple[Any, list[Any]]:
    """Return the session of a graph, and the weight arrays, which it references but does not own."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Threads spin during a run, which is fast, and stop spinning between runs to leave the cores to torch.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    values = {name: runtime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    options.add_external_initializers(list(values), list(values.values()))
    session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return session, [values, arrays]
