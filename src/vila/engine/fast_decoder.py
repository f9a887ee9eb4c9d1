"""Fast decoder for CPUs: calls the operators of Llama-like blocks directly, without module overhead.

oneDNN is slow at 16-bit matrix-vector products; for single tokens PyTorch's native kernels are used, which run at
memory bandwidth (7.2 ms instead of 11.8 ms per step for SmolLM2-135M).
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vila.engine.attention import Attention
from vila.families import attention_windows, unsupported_blocks
from vila.model.modeling import VilaForConditionalGeneration

# T tokens  H query heads  G KV heads  E head width  D model width  V vocab


@dataclass(frozen=True, slots=True)
class _Linear:
    """Parameters of a Linear; looking them up by name in a module takes longer than a small matmul."""

    weight_OI: Tensor
    bias_O: Tensor | None

    @staticmethod
    def of(linear: Any) -> _Linear:
        return _Linear(linear.weight, linear.bias)

    def __call__(self, x_TI: Tensor) -> Tensor:
        if len(x_TI) != 1:
            return F.linear(x_TI, self.weight_OI, self.bias_O)
        x_I = x_TI.view(-1)
        out_O = torch.mv(self.weight_OI, x_I) if self.bias_O is None else torch.addmv(self.bias_O, self.weight_OI, x_I)
        return out_O.view(1, -1)


@dataclass(frozen=True, slots=True)
class _Norm:
    weight_D: Tensor
    eps: float

    def __call__(self, x_TD: Tensor) -> Tensor:
        return F.rms_norm(x_TD, self.weight_D.shape, self.weight_D, self.eps)


class _Block:
    """The linear layers and norms of a decoder block."""

    def __init__(self, block: Any, window: int | None, eps: float) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.q, self.k, self.v, self.o = (_Linear.of(getattr(attention, f"{name}_proj")) for name in "qkvo")
        self.gate, self.up, self.down = (_Linear.of(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down"))
        self.before, self.after = (
            _Norm(norm.weight, eps) for norm in (block.input_layernorm, block.post_attention_layernorm)
        )
        self.scale: float | None = attention.scaling
        self.window = window


class FastDecoder:
    """Computes a llama, mistral or qwen2 decoder from the same weights, with slightly fewer roundings.

    Weights may change in place but must not be replaced; hooks on the decoder's blocks are not called.
    """

    def __init__(self, model: VilaForConditionalGeneration) -> None:
        """Raises ValueError for a model with an `unsupported_reason`."""
        if why := unsupported_reason(model):
            raise ValueError(why)
        config: Any = model.config.text_config
        decoder: Any = model.get_decoder()
        eps = float(config.rms_norm_eps)
        windows = attention_windows(config)
        self._blocks = [_Block(block, window, eps) for block, window in zip(decoder.layers, windows, strict=True)]
        self._rotary, self._norm = decoder.rotary_emb, _Norm(decoder.norm.weight, eps)
        self._head = _Linear.of(model.get_output_embeddings())

    def states(self, embeds_TD: Tensor, positions_T: Tensor, attention: Attention) -> Tensor:
        """Return the last hidden states [T, D] of tokens at the given positions."""
        cos_1TE, sin_1TE = self._rotary(embeds_TD, positions_T[None])
        tokens, width = cos_1TE.shape[1:]
        half = width // 2
        cos_T1E = cos_1TE.view(tokens, 1, width)
        # Rotary embedding: x * cos + rotate_half(x) * sin, with the sign of rotate_half folded into sin.
        sin_T1E = torch.cat([-sin_1TE[..., :half], sin_1TE[..., half:]], -1).view(tokens, 1, width)
        states_TD = embeds_TD
        with _matmul_backend(tokens, embeds_TD.dtype):
            for index, block in enumerate(self._blocks):
                normed_TD = block.before(states_TD)
                query, key = block.q(normed_TD), block.k(normed_TD)
                turned = torch.cat([query, key], -1).view(tokens, -1, width)
                turned = torch.addcmul(turned * cos_T1E, turned.roll(half, -1), sin_T1E).transpose(0, 1)
                query_HTE, key_GTE = turned.split([query.shape[1] // width, key.shape[1] // width])
                value_GTE = block.v(normed_TD).view(tokens, -1, width).transpose(0, 1)
                seen_THE = attention.attend(index, query_HTE, key_GTE, value_GTE, block.scale, block.window)
                states_TD = states_TD + block.o(seen_THE.flatten(1))
                normed_TD = block.after(states_TD)
                states_TD = states_TD + block.down(F.silu(block.gate(normed_TD)).mul_(block.up(normed_TD)))
        return self._norm(states_TD)

    def logits(self, states_TD: Tensor) -> Tensor:
        """Return float32 logits [T, V]."""
        with _matmul_backend(len(states_TD), states_TD.dtype):
            return self._head(states_TD).float()


def unsupported_reason(model: VilaForConditionalGeneration) -> str:
    """Return why FastDecoder does not support a model; empty if it does. It is faster on CPUs only."""
    decoder: Any = model.get_decoder()
    problems = list(unsupported_blocks(model.config.text_config, decoder.layers))
    modules = [*decoder.layers.modules(), decoder.norm, model.get_output_embeddings()]
    if problems:
        return "; ".join(problems)
    if odd := {type(m).__name__ for m in modules if hasattr(m, "in_features") and type(m) is not nn.Linear}:
        return f"linear layers of type {', '.join(sorted(odd))}"
    if any(type(value.data) is not Tensor for module in modules for value in module.parameters(recurse=False)):
        return "the weights are sharded"
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return "hooks on its blocks"
    return "" if model.device.type == "cpu" else f"the model is on {model.device}"


class _NativeMatmul:
    """Disables oneDNN while any thread is inside; the switch is global, so other threads are slower meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._before: Any = True

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_inside:
                self._before = torch.backends.mkldnn.enabled
                torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
            self._num_inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if not self._num_inside:
                torch.backends.mkldnn.enabled = self._before


_NATIVE = _NativeMatmul()


def _matmul_backend(rows: int, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Return the context with the fastest matmul for this many rows."""
    return nullcontext() if rows != 1 or dtype == torch.float32 else _NATIVE
