"""Selection of the backend that runs the LLM, torch or onnxruntime; the choice is logged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from vila.core.errors import ConfigError
from vila.core.progress import SILENT, Events
from vila.engine.fast_decoder import FastDecoder, unsupported_reason
from vila.engine.kv_cache import KVCache, aligned
from vila.engine.onnx_weights import ACTIVATION_BITS, FIXED_ROPE
from vila.engine.runner_torch import ModelRunner, TorchRunner
from vila.engine.vision_cache import VisionCache
from vila.kernels.select import use_backend
from vila.model.int4_weights import int4_layers
from vila.model.loading import has_fast_bfloat16
from vila.model.modeling import VilaForConditionalGeneration

if TYPE_CHECKING:
    from vila.engine.onnx_weights import ActivationBits, HeadBits
    from vila.engine.runner_onnx import OnnxProgram

Backend = Literal["auto", "torch", "onnx"]
BACKENDS = ("auto", "torch", "onnx")
_CPU_BYTES = 2 * 2**30
"""Default budget of the KV cache on a CPU, unless the context needs more."""


def check_backend(backend: str, head_bits: int, threads: int, device: str, activation_bits: int = 0) -> None:
    """Check backend options before any weight is read. 0 bits leave the choice to the backend.

    Raises ConfigError for an unknown backend, a missing onnxruntime, onnxruntime on another device than a CPU, and
    options of onnxruntime with another backend.
    """
    if backend not in BACKENDS:
        raise ConfigError(field="backend", value=backend, expected="auto, torch or onnx")
    if head_bits not in (0, 4, 8, 32):
        raise ConfigError(field="head_bits", value=head_bits, expected="4, 8 or 32")
    if activation_bits not in (0, *ACTIVATION_BITS):
        raise ConfigError(field="activation_bits", value=activation_bits, expected="8, 16 or 32")
    if head_bits in (4, 8) and backend != "onnx":
        raise _onnx_only("head_bits", head_bits)
    if activation_bits and backend == "torch":
        raise _onnx_only("activation_bits", activation_bits)
    if threads and backend == "torch":
        raise _onnx_only("threads", threads, "leave it out; torch.set_num_threads sets PyTorch's")
    if backend == "onnx" and device != "cpu":
        hint = "run on device 'cpu', or choose another backend"
        raise ConfigError(f"the onnx backend runs on a CPU only, not on {device!r}", field="backend", hint=hint)
    if backend == "onnx":
        from vila.engine.runner_onnx import find_runtime

        find_runtime()


def _onnx_only(field: str, value: int, hint: str = "leave it out, or choose the onnx backend") -> ConfigError:
    return ConfigError("an option of the onnx backend", field=field, value=value, hint=hint)


def choose_program(
    model: VilaForConditionalGeneration,
    backend: str = "auto",
    *,
    head_bits: int = 0,
    activation_bits: ActivationBits | Literal[0] = 0,
    threads: int = 0,
    release_weights: bool = False,
    events: Events = SILENT,
) -> OnnxProgram | None:
    """Return the onnxruntime program of a model's LLM, or None for torch, whose INT4 kernel is selected here too.

    backend:         `auto` selects onnxruntime for a 4-bit model on a CPU if it is installed, else torch.
    head_bits:       onnx; 0: 8 for a 4-bit model, else 32.
    activation_bits: onnx, see OnnxProgram; 0: 8.
    threads:         onnx; 0: as many as torch.
    release_weights: onnx; free the model's own 4-bit weights, see OnnxProgram.
    events:          logs the choice.

    Raises ConfigError as `check_backend` does, if onnxruntime was requested and does not support the model, and for
    `activation_bits` with torch.
    """
    device = model.device.type
    check_backend(backend, head_bits, threads, device, activation_bits)
    four_bit = any(int4_layers(model))
    why = "" if backend != "auto" else _why_not_onnx(four_bit, device)
    if backend != "torch" and not why:
        from vila.engine.runner_onnx import OnnxProgram

        bits: HeadBits = head_bits or (8 if four_bit else 32)  # type: ignore[assignment]
        try:
            program = OnnxProgram(
                model,
                head_bits=bits,
                activation_bits=activation_bits or 8,
                threads=threads,
                release=release_weights and four_bit,
            )
        except ConfigError as error:
            if backend != "auto":
                raise
            why = str(error)
        else:
            weights = f"4-bit weights, {program.activation_bits}-bit activations" if four_bit else "float32"
            events.log(f"backend: onnx on cpu, {program.threads} threads, {weights}, {bits}-bit head")
            return program
    if activation_bits:
        raise ConfigError(
            f"activation_bits={activation_bits} is an option of backend='onnx', and torch computes this model: {why}; "
            "leave it out, or ask for that backend"
        )
    if four_bit:
        if why:
            events.log(f"backend: torch; not onnx: {why}")
        use_backend(model, "auto", dtype=model.get_input_embeddings().weight.dtype, events=events)  # type: ignore[arg-type]
    else:
        emulated = device == "cpu" and model.dtype == torch.bfloat16 and not has_fast_bfloat16(device)
        if backend == "torch" or emulated:
            slow = ", which this CPU emulates; float32 is faster" if emulated else ""
            events.log(f"backend: torch on {device}, {_short(model.dtype)}{slow}")
    return None


def choose_cuda_graph(model: VilaForConditionalGeneration, events: Events = SILENT) -> bool:
    """Return whether decode steps use CUDA graphs: on one CUDA device, with rotary angles independent of the length."""
    if model.device.type != "cuda":
        return False
    why = ""
    rope = (getattr(model.config.text_config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in FIXED_ROPE:
        why = f"rope_type={rope!r} depends on the sequence length"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        why = "the model is on several devices"
    events.log(f"decoding: {'without CUDA graphs: ' + why if why else 'CUDA graphs'}")
    return not why


def choose_fast_decoder(model: VilaForConditionalGeneration) -> FastDecoder | None:
    """Return the fast decoder for decode steps on a CPU; None if it does not support the model."""
    return None if unsupported_reason(model) else FastDecoder(model)


def new_runner(
    model: VilaForConditionalGeneration,
    max_num_seqs: int,
    kv_tokens: int = 0,
    *,
    program: OnnxProgram | None = None,
    fast_decoder: FastDecoder | None = None,
    cuda_graph: bool = False,
) -> tuple[ModelRunner, int]:
    """Return a runner with its own KV cache, and the budget of the cache in tokens.

    kv_tokens: the budget; 0: the context length for every sequence, but at most 2 GiB on a CPU and half of the free
               memory on CUDA. Every row may be as long as the context; on CUDA, where all rows are allocated, a small
               budget reduces their number.
    """
    config: Any = model.config.text_config
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    layers, kv_heads = int(config.num_hidden_layers), int(getattr(config, "num_key_value_heads", None) or heads)
    dtype = torch.float32 if program else next(model.get_input_embeddings().parameters()).dtype
    context, on_cuda = int(model.config.context_length), model.device.type == "cuda"
    tokens = kv_tokens
    if not tokens:
        budget = torch.cuda.mem_get_info(model.device)[0] // 2 if on_cuda else _CPU_BYTES
        tokens = min(max_num_seqs * context, budget // (2 * layers * kv_heads * width * dtype.itemsize))
        tokens = max(tokens, 0 if on_cuda else aligned(context))
    columns = min(context, tokens)
    rows = min(max_num_seqs, max(1, tokens // columns)) if on_cuda else max_num_seqs
    cache, features = KVCache(layers, kv_heads, width, rows, columns, dtype=dtype, device=model.device), VisionCache()
    if program is not None:
        from vila.engine.runner_onnx import OnnxRunner

        return OnnxRunner(model, features, cache, program), tokens
    if cuda_graph:
        from vila.engine.runner_cuda_graph import CudaGraphRunner

        return CudaGraphRunner(model, features, cache), tokens
    return TorchRunner(model, features, cache, fast_decoder), tokens


def _why_not_onnx(four_bit: bool, device: str) -> str:
    """Return why `auto` does not select onnxruntime; empty if it does."""
    if not four_bit:
        return "the weights are not 4-bit"
    if device != "cpu":
        return f"the model is on {device}"
    from vila.engine.runner_onnx import find_runtime

    try:
        find_runtime()
    except ConfigError as error:
        return str(error)
    return ""


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
