"""The blocks of a decoder called directly, a dozen operators each: at one token a step, calling costs as much as work.

A CPU's libraries for products of matrices are slow at a matrix times a vector in 16 bits: such a step is taken by
PyTorch's own loops, which read weights at the memory's speed (7.2 ms beside 11.8 ms for all of SmolLM2-135M).
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vila.families import attention_windows, unsupported_blocks
from vila.model.modeling import VilaForConditionalGeneration

# T tokens  H query heads  G KV heads  E head width  D model width  V vocab


class Attention(Protocol):
    """Where the keys and values of earlier tokens are."""

    def attend(
        self, layer: int, query_HTE: Tensor, key_GTE: Tensor, value_GTE: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Keep new keys and values, and attend to all that each token sees: [T, H, E]."""


@dataclass(frozen=True, slots=True)
class _Product:
    """A Linear's parameters. A module looks its own up by name, which takes longer than a small product."""

    weight_OI: Tensor
    bias_O: Tensor | None

    @staticmethod
    def of(linear: Any) -> _Product:
        return _Product(linear.weight, linear.bias)

    def __call__(self, x_TI: Tensor) -> Tensor:
        if len(x_TI) != 1:
            return F.linear(x_TI, self.weight_OI, self.bias_O)
        x_I = x_TI.view(-1)
        product_O = (
            torch.mv(self.weight_OI, x_I) if self.bias_O is None else torch.addmv(self.bias_O, self.weight_OI, x_I)
        )
        return product_O.view(1, -1)


@dataclass(frozen=True, slots=True)
class _Norm:
    weight_D: Tensor
    eps: float

    def __call__(self, x_TD: Tensor) -> Tensor:
        return F.rms_norm(x_TD, self.weight_D.shape, self.weight_D, self.eps)


class _Block:
    """The products and norms of a decoder block."""

    def __init__(self, block: Any, window: int | None, eps: float) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.q, self.k, self.v, self.o = (_Product.of(getattr(attention, f"{name}_proj")) for name in "qkvo")
        self.gate, self.up, self.down = (_Product.of(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down"))
        self.before, self.after = (
            _Norm(norm.weight, eps) for norm in (block.input_layernorm, block.post_attention_layernorm)
        )
        self.scale: float | None = attention.scaling
        self.window = window


class FastDecoder:
    """Computes what a llama, mistral or qwen2 decoder computes, from the same weights, rounding a little less often.

    Weights may change in place, but not be replaced; hooks on the decoder's blocks are not called.
    """

    def __init__(self, model: VilaForConditionalGeneration) -> None:
        """Raises ValueError for a model that `unsupported_reason` has something against."""
        if why := unsupported_reason(model):
            raise ValueError(why)
        config: Any = model.config.text_config
        decoder: Any = model.get_decoder()
        eps = float(config.rms_norm_eps)
        windows = attention_windows(config)
        self._blocks = [_Block(block, window, eps) for block, window in zip(decoder.layers, windows, strict=True)]
        self._rotary, self._norm = decoder.rotary_emb, _Norm(decoder.norm.weight, eps)
        self._head = _Product.of(model.get_output_embeddings())

    def states(self, embeds_TD: Tensor, positions_T: Tensor, attention: Attention) -> Tensor:
        """Last hidden states [T, D] of tokens in a line, each at its position."""
        cos_1TE, sin_1TE = self._rotary(embeds_TD, positions_T[None])
        tokens, width = cos_1TE.shape[1:]
        half = width // 2
        cos_T1E = cos_1TE.view(tokens, 1, width)
        # Turned by a half, its first half with the other sign, a vector is what rotary angles are applied to.
        sin_T1E = torch.cat([-sin_1TE[..., :half], sin_1TE[..., half:]], -1).view(tokens, 1, width)
        states_TD = embeds_TD
        with _products(tokens, embeds_TD.dtype):
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
        """[T, V], float32."""
        with _products(len(states_TD), states_TD.dtype):
            return self._head(states_TD).float()


def unsupported_reason(model: VilaForConditionalGeneration) -> str:
    """What keeps a model from a FastDecoder; empty when nothing does. It was measured to pay on CPUs alone."""
    decoder: Any = model.get_decoder()
    problems = list(unsupported_blocks(model.config.text_config, decoder.layers))
    modules = [*decoder.layers.modules(), decoder.norm, model.get_output_embeddings()]
    if problems:
        return "; ".join(problems)
    if odd := {type(m).__name__ for m in modules if hasattr(m, "in_features") and type(m) is not nn.Linear}:
        return f"products by {', '.join(sorted(odd))}"
    if any(type(value.data) is not Tensor for module in modules for value in module.parameters(recurse=False)):
        return "the weights are spread over processes"
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return "hooks on its blocks"
    return "" if model.device.type == "cpu" else f"the model is on {model.device}"


class _OwnProducts:
    """While anybody is inside, products are PyTorch's own; the switch is the process's, so others are slower."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: Any = True

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch.backends.mkldnn.enabled
                torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.backends.mkldnn.enabled = self._before


_OWN = _OwnProducts()


def _products(rows: int, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Whose products are fast for so many rows."""
    return nullcontext() if rows != 1 or dtype == torch.float32 else _OWN
