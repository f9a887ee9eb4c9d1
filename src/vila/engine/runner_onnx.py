"""Runner of onnxruntime: decode steps together, each prefill chunk in a run of its own."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila.core.errors import ConfigError
from vila.core.optional import require
from vila.engine.attention import ForwardBatch, TokenRange
from vila.engine.kv_cache import KVCache
from vila.engine.onnx_graph import cache_names, decoder_graph
from vila.engine.onnx_weights import ACTIVATION_BITS, ActivationBits, HeadBits, decoder_weights
from vila.engine.runner_torch import ModelRunner
from vila.engine.vision_cache import VisionCache
from vila.kernels.int4 import Int4Linear, Int4Weight
from vila.model.modeling import VilaForConditionalGeneration

# B rows  S tokens  D model width  V vocab  N positions with logits  H KV heads  C columns  E head width

_CHUNK = 512
"""Tokens per run of a prefill; attention needs memory for this times the filled columns per head."""
_PROBE_COLUMNS = 80
"""Columns of the KV cache of a probe."""
_BINDINGS = 32
"""Row ranges whose bindings are kept; binding all caches takes about as long as a step of a small model."""


class OnnxProgram:
    """The session of a model's LLM and its sizes. It is thread-safe.

    weights:         INT4 weights that replace Linears, by name; Linears that are already INT4 keep their own.
    head_bits:       32 keeps the LM head; 8 and 4 quantize it, which costs accuracy. A 4-bit head stays 4-bit.
    threads:         threads of matmuls; 0: as many as torch.
    release:         free the model's 4-bit weights, of which onnxruntime keeps a copy in the layout of its kernels; the
                     model can then not be saved or run by torch.
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
        activation_bits: ActivationBits = 8,
        release: bool = False,
    ) -> None:
        self.runtime = find_runtime()
        if threads < 0:
            raise ConfigError(field="threads", value=threads, expected="an integer from 1, or 0 for as many as torch")
        if activation_bits not in ACTIVATION_BITS:
            raise ConfigError(field="activation_bits", value=activation_bits, expected="8, 16 or 32")
        self.threads = threads or torch.get_num_threads()
        """Threads of matmuls."""
        arrays = decoder_weights(model, weights or {}, head_bits=head_bits, context=int(model.config.context_length))
        graph, values = decoder_graph(arrays, activation_bits=activation_bits)
        if release:
            # Temporary memory of loading, before the session repacks the weights.
            free_unused_memory()
        self.session = _session(self.runtime, graph.SerializeToString(), values, self.threads)
        self._arrays = values
        """The weights of the session, which references but does not own them."""
        self.embeddings_VD: Tensor = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
        self.num_layers, self.width, self.vocab = len(arrays.blocks), arrays.width, arrays.head.num_outputs
        self.weight_bytes = sum(array.nbytes for name, array in values.items() if name not in ("cos", "sin"))
        """Bytes of the weights, which every decode step reads."""
        self.head_bits = arrays.head.bits
        """Bits of the LM head's weights."""
        self.activation_bits = activation_bits
        cache = (1, arrays.num_kv_heads, _PROBE_COLUMNS, arrays.head_width)
        del arrays
        if release:
            self._release(model, cache)

    def _release(self, model: VilaForConditionalGeneration, cache: tuple[int, ...]) -> None:
        """Free the arrays of quantized matmuls that the kernels do not read, and the model's own 4-bit weights."""
        matmuls = [name.removesuffix(".scales") for name in self._arrays if name.endswith(".scales")]
        kinds = ("values", "scales", "zeros")
        shapes = {name: [self._arrays[f"{name}.{kind}"].shape for kind in kinds] for name in matmuls}
        probed = [name for name in matmuls if name.startswith("block_0.") or name == "logits"]
        alike = [name for name in matmuls if shapes[name] in [shapes[one] for one in probed]]
        for kind in kinds:
            if not self._reads([f"{name}.{kind}" for name in probed], cache):
                for name in alike:
                    del self._arrays[f"{name}.{kind}"]
        for layer in model.modules():
            if isinstance(layer, Int4Linear):
                layer.release()
        free_unused_memory()

    def _reads(self, names: Sequence[str], cache: tuple[int, ...]) -> bool:
        """Return whether the session reads these arrays after its creation: whether logits change without them.

        Most kernels repack the weights when the session is created; which arrays they still read then depends on the
        CPU and on the version of onnxruntime.
        """
        before = self._probe(cache)
        kept = {name: self._arrays[name].copy() for name in names}
        try:
            for name in names:
                self._arrays[name][...] = 0
            return not np.array_equal(before, self._probe(cache))
        finally:
            for name, values in kept.items():
                self._arrays[name][...] = values

    def _probe(self, cache: tuple[int, ...]) -> NDArray[np.float32]:
        """Return the logits after runs of several lengths, for which kernels may differ."""
        caches = [np.zeros(cache, np.float32) for _ in range(2 * self.num_layers)]
        binding = _Binding(self, caches)
        embeds_SD = torch.linspace(-1, 1, 64 * self.width).view(64, self.width)
        logits = [binding.append(embeds_SD[:count], range(count), 0)[0][[0, -1]] for count in (1, 4, 64)]
        return torch.cat(logits).numpy()


class OnnxRunner(ModelRunner):
    """Runs a range of adjacent KV rows at once; rows of the range that do not decode are computed and restored."""

    def __init__(
        self, model: VilaForConditionalGeneration, features: VisionCache, cache: KVCache, program: OnnxProgram
    ) -> None:
        super().__init__(model, features, cache)
        self.program = program
        self._bindings: dict[tuple[int, int], _Binding] = {}

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Run the passes; see `ModelRunner.forward`. The next one overwrites the logits."""
        logits = [self._decode(batch.steps)] if batch.steps else []
        for one in batch.chunks:
            logits += self._binding(one.row, 1).append(self._embeds(one), one.outputs, one.start)
        if not logits:
            return torch.zeros(0, self.program.vocab)
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _decode(self, steps: Sequence[TokenRange]) -> Tensor:
        first, count = steps[0].row, steps[-1].row + 1 - steps[0].row
        binding = self._binding(first, count)
        rows = [one.row - first for one in steps]
        # A row that rests is given a token for its first column, which is put back: nothing is shorter.
        lengths = [1] * count
        for row, one in zip(rows, steps, strict=True):
            # Copies of single rows, because larger ones would wake torch's threads beside those of onnxruntime.
            binding.step_embeds_BD[row].copy_(self.program.embeddings_VD[one.ids[0]])
            lengths[row] = one.start + 1
        resting = sorted(set(range(first, first + count)) - {one.row for one in steps})
        kept = [both[:, resting, :, 0] for both in self.cache.buffers] if resting else []
        try:
            binding.run(lengths)
        finally:
            for both, before in zip(self.cache.buffers, kept, strict=False):
                both[:, resting, :, 0] = before
        logits_BV = torch.from_numpy(binding.logits_BNV)[:, 0]
        return logits_BV[rows] if resting else logits_BV

    def _embeds(self, one: TokenRange) -> Tensor:
        return self.program.embeddings_VD[list(one.ids)] if one.embeds_SD is None else one.embeds_SD

    def _binding(self, first: int, count: int) -> _Binding:
        """Return the cached binding of `count` adjacent rows from `first`."""
        key = (first, count)
        if key not in self._bindings:
            while len(self._bindings) >= _BINDINGS:
                del self._bindings[next(iter(self._bindings))]
            layers = zip(self.cache.keys, self.cache.values, strict=True)
            caches = [one[first : first + count].numpy() for layer in layers for one in layer]
            self._bindings[key] = _Binding(self.program, caches)
        return self._bindings[key]


class _Binding:
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
        self._step = np.zeros((rows, 1, program.width), np.float32), [0], np.zeros((rows, 1, program.vocab), np.float32)
        self.step_embeds_BD = torch.from_numpy(self._step[0])[:, 0]
        """Input embeddings of a decode step."""
        self._bind(*self._step)

    def append(self, embeds_SD: Tensor, places: Sequence[int], start: int) -> list[Tensor]:
        """Append S tokens to the single row, which has `start` tokens; return logits [N, V] after `places`."""
        embeds = np.ascontiguousarray(embeds_SD.detach().float().numpy())[None]
        logits = []
        try:
            for begin in range(0, embeds.shape[1], _CHUNK):
                chunk = np.ascontiguousarray(embeds[:, begin : begin + _CHUNK])
                inside = [place - begin for place in places if begin <= place < begin + chunk.shape[1]]
                # Matmuls need at least one row: the last position is computed and discarded.
                self._bind(chunk, inside or [chunk.shape[1] - 1])
                self.run(start + begin + chunk.shape[1])
                if inside:
                    logits.append(torch.from_numpy(self.logits_BNV)[0])
        finally:
            self._bind(*self._step)
        return logits

    def run(self, lengths: Sequence[int] | int) -> None:
        """Append the bound embeddings to each row; lengths: tokens per row including them."""
        self._last_key_B[:] = lengths
        self._last_key_B -= 1
        self._length_1[0] = self._last_key_B.max() + 1
        self._program.session.run_with_iobinding(self._binding)

    def _bind(
        self, embeds_BSD: NDArray[np.float32], places: Sequence[int], logits_BNV: NDArray[np.float32] | None = None
    ) -> None:
        """Bind input embeddings, and the positions after which logits are computed."""
        if logits_BNV is None:
            logits_BNV = np.zeros((len(embeds_BSD), len(places), self._program.vocab), np.float32)
        self.logits_BNV = logits_BNV
        self._input("embeds", embeds_BSD)
        self._input("places", np.array(places, np.int64))
        value = self._program.runtime.OrtValue.ortvalue_from_numpy(logits_BNV)
        self._bound["logits"] = (value, logits_BNV)
        self._binding.bind_ortvalue_output("logits", value)

    def _input(self, name: str, buffer: NDArray[Any]) -> Any:
        value = self._program.runtime.OrtValue.ortvalue_from_numpy(buffer)
        # The value does not own its buffer.
        self._bound[name] = (value, buffer)
        self._binding.bind_ortvalue_input(name, value)
        return value


def find_runtime() -> Any:
    """Import the onnxruntime package. Raises MissingExtraError, a ConfigError."""
    return require("onnxruntime", "the onnx backend", extra="onnx")


def _session(runtime: Any, graph: bytes, arrays: Mapping[str, NDArray[Any]], threads: int) -> Any:
    """Return the session of a graph, which references but does not own the weight arrays."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Threads spin during a run, which is fast, and stop spinning between runs to leave the cores to torch.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    values = {name: runtime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    options.add_external_initializers(list(values), list(values.values()))
    return runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def free_unused_memory() -> None:
    """Return memory that was freed to the system; glibc keeps most of it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
