"""Weights of a decoder as arrays for the ONNX graph, dense or in groups of 8 or 4 bits; rejects unsupported models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vila.core.errors import ConfigError
from vila.families import attention_windows, unsupported_blocks
from vila.kernels.int4 import Int4Linear, Int4Weight, concatenate, pack_nibbles, quantize
from vila.model.modeling import VilaForConditionalGeneration

# O outputs  I inputs  G inputs of a group  D model width  E head width  C positions

HeadBits = Literal[4, 8, 32]
HEAD_BITS = (4, 8, 32)
ActivationBits = Literal[8, 16, 32]
ACTIVATION_BITS = (8, 16, 32)
_GROUP_SIZES = (128, 64, 32, 16)
_CHUNK_ROWS = 2048
# Rotary embeddings whose angles do not depend on the sequence length.
FIXED_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, eq=False)
class Matrix:
    """Weight of a matmul. `bits` 32: `values` float32 [O, I]. 8 or 4: value = (code - zero) * scale, where

    values: uint8 [O, I/G, G * bits/8]; of two codes in a byte the even input has the low nibble.
    scales: float32 [O, I/G].
    zeros:  uint8 [O, I/G], or [O, ceil(I/G / 2)] of nibbles for 4 bits.
    """

    bits: int
    num_inputs: int
    num_outputs: int
    values: NDArray[Any]
    bias_O: NDArray[np.float32] | None = None
    group_size: int = 0
    scales: NDArray[np.float32] | None = None
    zeros: NDArray[np.uint8] | None = None


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder block. `qkv` and `gate_up` are one fused matrix, or several that cannot be fused.

    window: sliding window in tokens, the token itself included; None: full attention.
    """

    attention_norm_D: NDArray[np.float32]
    qkv: tuple[Matrix, ...]
    out: Matrix
    mlp_norm_D: NDArray[np.float32]
    gate_up: tuple[Matrix, ...]
    down: Matrix
    window: int | None


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """Weights and sizes of a decoder. `cos` and `sin` [C, E/2] are the rotary tables."""

    blocks: tuple[Block, ...]
    norm_D: NDArray[np.float32]
    head: Matrix
    cos: NDArray[np.float32]
    sin: NDArray[np.float32]
    width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    eps: float


@torch.no_grad()
def decoder_weights(
    model: VilaForConditionalGeneration, weights: Mapping[str, Int4Weight], *, head_bits: HeadBits, context: int
) -> DecoderWeights:
    """Return the weights of a model's LLM; `weights` replace those of Linears, by name.

    context: maximum length of a sequence, for the rotary tables.
    Raises ConfigError with all problems for an unsupported model, unknown names or shapes in `weights`, and head_bits
    other than 4, 8 and 32.
    """
    config, decoder = model.config.text_config, _decoder(model)
    names = {module: name for name, module in model.named_modules()}
    linears = {
        names[m]: m for block in decoder.layers for m in block.modules() if isinstance(m, (nn.Linear, Int4Linear))
    }
    given: dict[nn.Module, Int4Weight] = {module: weights[name] for name, module in linears.items() if name in weights}
    problems = [*_problems(config, decoder.layers), *_misfits(weights, linears)]
    # Replaced Linears may have released their values.
    kept = [module for module in decoder.modules() if module not in given]
    if any(value.device.type != "cpu" for module in kept for value in module.parameters(recurse=False)):
        problems.append("the model is not on a CPU; load it with device='cpu', or use the torch backend")
    if head_bits not in HEAD_BITS:
        problems.append(f"head_bits={head_bits!r}: expected 4, 8 or 32")
    if problems:
        raise ConfigError.collect("onnx backend", problems)
    half = _head_width(config) // 2
    cos, sin = decoder.rotary_emb(torch.zeros(1), torch.arange(context)[None])
    return DecoderWeights(
        blocks=tuple(
            _block(b, given, window) for b, window in zip(decoder.layers, attention_windows(config), strict=True)
        ),
        norm_D=_floats(decoder.norm.weight),
        head=_head(model.get_output_embeddings(), head_bits),
        cos=_floats(cos[0, :, :half]),
        sin=_floats(sin[0, :, :half]),
        width=int(config.hidden_size),
        num_heads=int(config.num_attention_heads),
        num_kv_heads=int(config.num_key_value_heads),
        head_width=2 * half,
        eps=float(config.rms_norm_eps),
    )


def _decoder(model: VilaForConditionalGeneration) -> Any:
    return model.get_decoder()


def _head_width(text_config: Any) -> int:
    return int(getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads)


def _block(block: Any, given: Mapping[nn.Module, Int4Weight], window: int | None) -> Block:
    attention, mlp = block.self_attn, block.mlp
    return Block(
        attention_norm_D=_floats(block.input_layernorm.weight),
        qkv=_joined([attention.q_proj, attention.k_proj, attention.v_proj], given),
        out=_joined([attention.o_proj], given)[0],
        mlp_norm_D=_floats(block.post_attention_layernorm.weight),
        gate_up=_joined([mlp.gate_proj, mlp.up_proj], given),
        down=_joined([mlp.down_proj], given)[0],
        window=window,
    )


def round_to_bytes(weight_OI: Tensor, group_size: int) -> Matrix:
    """Quantize a weight to 8 bits with a range per group that includes 0; ties round to even."""
    O, I = weight_OI.shape  # noqa: E741
    values = torch.empty(O, I // group_size, group_size, dtype=torch.uint8)
    scales, zero_bytes = torch.empty(O, I // group_size), torch.empty(O, I // group_size, dtype=torch.uint8)
    # Rows in chunks, because the temporary tensors would be several times larger than the result.
    for rows in torch.arange(O).split(_CHUNK_ROWS):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        groups = weight_OI[part].float().unflatten(-1, (-1, group_size))
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales[part] = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
        zeros = (-low / scales[part]).round_().clamp_(0, 255)
        values[part] = (groups / scales[part].unsqueeze(-1)).round_().add_(zeros.unsqueeze(-1)).clamp_(0, 255)
        zero_bytes[part] = zeros
    return Matrix(8, I, O, values.numpy(), None, group_size, scales.numpy(), zero_bytes.numpy())


def matrix_of(weight: Int4Weight, bias_O: Tensor | None = None) -> Matrix:
    """Return a 4-bit weight as arrays of the graph; the codes are shared, not copied."""
    codes = weight.codes.unflatten(-1, (-1, weight.group_size // 2)).contiguous()
    zeros = pack_nibbles(F.pad(weight.zeros, (0, weight.zeros.shape[1] % 2)))
    bias = None if bias_O is None else _floats(bias_O)
    scales = _floats(weight.scales)
    return Matrix(
        4, weight.num_inputs, weight.num_outputs, codes.numpy(), bias, weight.group_size, scales, zeros.numpy()
    )


def _head(head: nn.Module, bits: HeadBits) -> Matrix:
    if isinstance(head, Int4Linear):
        return matrix_of(head.weight, head.bias)
    weight: Tensor = head.weight  # type: ignore[assignment]
    if bits == 32:
        return _dense(weight, None)
    fitting = [size for size in _GROUP_SIZES if weight.shape[1] % size == 0]
    if not fitting:
        raise ConfigError(
            f"onnx backend: the {weight.shape[1]} inputs of the LM head are not a multiple of 16; use head_bits=32"
        )
    if bits == 8:
        return round_to_bytes(weight, fitting[0])
    # Small groups: the LM head suffers most from 4 bits, and is a small part of the weights.
    return matrix_of(quantize(weight.float(), min(fitting[0], 32), dtype=torch.float32))


def _joined(parts: Sequence[Any], given: Mapping[nn.Module, Int4Weight]) -> tuple[Matrix, ...]:
    """Return one fused matrix for Linears with the same input, or one each if their formats differ."""
    weights = [given.get(part, part.weight) for part in parts]
    ints = [weight for weight in weights if isinstance(weight, Int4Weight)]
    formats = {(weight.group_size, weight.scales.dtype) for weight in ints}
    if len(formats) > 1 or 0 < len(ints) < len(parts):
        return tuple(_matrix(weight, part.bias) for weight, part in zip(weights, parts, strict=True))
    bias = _joined_bias(parts)
    if ints:
        whole = concatenate(ints) if len(ints) > 1 else ints[0]
        start = 0
        for part, weight in zip(parts, ints, strict=True):
            if part not in given and isinstance(part, Int4Linear):
                part.set_weight(whole.rows(start, start + weight.num_outputs))
            start += weight.num_outputs
        return (_matrix(whole, bias),)
    return (_matrix(torch.cat(weights) if len(weights) > 1 else weights[0], bias),)


def _matrix(weight: Int4Weight | Tensor, bias_O: Tensor | None) -> Matrix:
    return matrix_of(weight, bias_O) if isinstance(weight, Int4Weight) else _dense(weight, bias_O)


def _joined_bias(parts: Sequence[Any]) -> Tensor | None:
    if all(part.bias is None for part in parts):
        return None
    return torch.cat([torch.zeros(p.out_features) if p.bias is None else p.bias.float() for p in parts])


def _dense(weight_OI: Tensor, bias_O: Tensor | None) -> Matrix:
    bias = None if bias_O is None else _floats(bias_O)
    return Matrix(32, weight_OI.shape[1], weight_OI.shape[0], _floats(weight_OI), bias)


def _floats(values: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(values.detach().float().numpy())


def _problems(config: Any, layers: Any) -> Iterator[str]:
    for unknown in unsupported_blocks(config, layers):
        yield f"{unknown}; use the torch backend"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in FIXED_ROPE:
        yield f"rope_type={rope!r}: only {', '.join(FIXED_ROPE)}; use the torch backend"
    if (width := _head_width(config)) % 16:
        yield f"head width {width}: the attention operator requires multiples of 16; use the torch backend"


def _misfits(weights: Mapping[str, Int4Weight], linears: Mapping[str, Any]) -> Iterator[str]:
    for name, weight in weights.items():
        if name not in linears:
            yield f"weights[{name!r}]: not a Linear of the decoder's blocks"
        elif (weight.num_outputs, weight.num_inputs) != (linears[name].out_features, linears[name].in_features):
            shape = (linears[name].out_features, linears[name].in_features)
            yield f"weights[{name!r}] is {weight.num_outputs} x {weight.num_inputs}, the Linear {shape[0]} x {shape[1]}"
        elif weight.group_size not in _GROUP_SIZES:
            yield f"weights[{name!r}] has group size {weight.group_size}; MatMulNBits supports {_GROUP_SIZES}"
