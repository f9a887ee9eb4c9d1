"""Packings of programs that we only write for: TinyChatEngine, compressed-tensors, ModelOpt; both ways, for checking.

TinyChatEngine and ModelOpt know symmetric weights alone: every zero must be 8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from vila.core.errors import LayoutError
from vila.kernels.int4_layout import SYMMETRIC_ZERO, Int4Weight, check_group, pack, unpack
from vila.kernels.int4_packing import (
    WORD,
    Int4Format,
    Packed,
    as_bytes,
    as_words,
    check_divides,
    expect,
    half_scales,
    padded_words,
    take,
    widen,
)

# N outputs  K inputs  G inputs of a group  (the letters of the published formats)

_ENGINE = ("weight_int4", "scaling_factor_int4", "offset_int4", "zero_point_int4")
_ENGINE_BLOCK = 32
_EIGHTS = -0x77777778  # a word of eight 8s, 0x88888888 as int32


def pack_blocks(weight: Int4Weight, *, run: int) -> Packed:
    """TinyChatEngine's CPU and Metal orders: byte e of a run holds inputs e and e + run/2; groups are of 32.

    weight_int4 uint8 [N, K/2], scaling_factor_int4 and offset_int4 (zeros) float32 [N, K/32], zero_point_int4 [1] = 8.
    Runs are 64 (QM_x86), 32 (QM_ARM) or 8 (QM_METAL). Raises LayoutError for another group size, a zero that is not 8,
    or a K that runs do not fill.
    """
    _check_symmetric("TinyChatEngine", weight)
    check_divides("inputs of TinyChatEngine's runs", weight.num_inputs, run)
    if weight.group_size != _ENGINE_BLOCK:
        raise LayoutError(f"TinyChatEngine takes groups of {_ENGINE_BLOCK}, not {weight.group_size}")
    halves = unpack(weight.codes).unflatten(-1, (-1, 2, run // 2))
    return {
        "weight_int4": pack(halves.transpose(-1, -2).flatten(-3)),
        "scaling_factor_int4": weight.scales.float(),
        "offset_int4": torch.zeros_like(weight.scales, dtype=torch.float32),
        "zero_point_int4": torch.tensor([float(SYMMETRIC_ZERO)]),
    }


def unpack_blocks(tensors: Mapping[str, Tensor], group_size: int, *, run: int) -> Int4Weight:
    """The inverse of `pack_blocks`. Raises LayoutError when a tensor is missing or of another shape or type."""
    packed, scales, _, _ = take(tensors, "TinyChatEngine", _ENGINE)
    expect("TinyChatEngine", "weight_int4", packed, torch.uint8, (None, None))
    check_group(packed.shape[1] * 2, group_size)
    check_divides("inputs of TinyChatEngine's runs", packed.shape[1] * 2, run)
    expect("TinyChatEngine", "scaling_factor_int4", scales, None, (packed.shape[0], packed.shape[1] * 2 // group_size))
    codes = unpack(packed).unflatten(-1, (-1, run // 2, 2)).transpose(-1, -2).flatten(-3)
    return Int4Weight(pack(codes), scales, _eights(scales), group_size)


def pack_engine_cuda(weight: Int4Weight) -> Packed:
    """TinyChatEngine's QM_CUDA: weight_int4 int32 [N, K/8] and scaling_factor_int4 float16 [N, 8Z] as in gemv.

    offset_int4 float16 [N, K/G] is zero and every word of zero_point_int4 int32 [N, Z] is 0x88888888, padding included.
    Raises LayoutError for a zero that is not 8 or a group size that gemv files do not have.
    """
    _check_symmetric("TinyChatEngine", weight)
    check_divides("inputs of TinyChatEngine's words", weight.num_inputs, WORD)
    words = padded_words(weight.num_inputs, weight.group_size)
    return {
        "weight_int4": as_words(weight.codes),
        "scaling_factor_int4": widen(half_scales(weight.scales), words * WORD),
        "offset_int4": torch.zeros_like(weight.scales, dtype=torch.float16),
        "zero_point_int4": torch.full((weight.num_outputs, words), _EIGHTS, dtype=torch.int32),
    }


def unpack_engine_cuda(tensors: Mapping[str, Tensor], group_size: int) -> Int4Weight:
    """The inverse of `pack_engine_cuda`. Raises LayoutError when a tensor is missing or of another shape or type."""
    packed, scales, _, _ = take(tensors, "TinyChatEngine", _ENGINE)
    expect("TinyChatEngine", "weight_int4", packed, torch.int32, (None, None))
    num_inputs = packed.shape[1] * WORD
    words = padded_words(num_inputs, group_size)
    expect("TinyChatEngine", "scaling_factor_int4", scales, None, (packed.shape[0], words * WORD))
    kept = scales[:, : num_inputs // group_size].contiguous()
    return Int4Weight(as_bytes(packed), kept, _eights(kept), group_size)


def pack_compressed(weight: Int4Weight) -> Packed:
    """compressed-tensors `pack-quantized`: weight_packed int32 [N, K/8], weight_scale [N, K/G], weight_shape int64 [2].

    All in natural order; weight_zero_point int32 [N/8, K/G] is packed along the outputs, and left out where every zero
    is 8 (a symmetric weight). Raises LayoutError unless 8 divides K, and N of an asymmetric weight.
    """
    check_divides("inputs of compressed-tensors' words", weight.num_inputs, WORD)
    packed = {
        "weight_packed": as_words(weight.codes),
        "weight_scale": weight.scales.contiguous(),
        "weight_shape": torch.tensor([weight.num_outputs, weight.num_inputs]),
    }
    if bool((weight.zeros == SYMMETRIC_ZERO).all()):
        return packed
    check_divides("outputs of compressed-tensors' zero points", weight.num_outputs, WORD)
    return packed | {"weight_zero_point": as_words(pack(weight.zeros.T)).T.contiguous()}


def unpack_compressed(tensors: Mapping[str, Tensor], group_size: int) -> Int4Weight:
    """The inverse of `pack_compressed`. Raises LayoutError when a tensor is missing or of another shape or type."""
    codes, scales = take(tensors, "compressed-tensors", ("weight_packed", "weight_scale"))
    expect("compressed-tensors", "weight_packed", codes, torch.int32, (None, None))
    num_outputs, num_inputs = codes.shape[0], codes.shape[1] * WORD
    check_group(num_inputs, group_size)
    groups = num_inputs // group_size
    expect("compressed-tensors", "weight_scale", scales, None, (num_outputs, groups))
    zeros = _eights(scales)
    if (words := tensors.get("weight_zero_point")) is not None:
        expect("compressed-tensors", "weight_zero_point", words, torch.int32, (num_outputs // WORD, groups))
        zeros = unpack(as_bytes(words.T)).T.contiguous()
    return Int4Weight(as_bytes(codes), scales, zeros, group_size)


def pack_modelopt(weight: Int4Weight) -> Packed:
    """ModelOpt's INT4 for TensorRT-LLM: weight uint8 [N/2, K], weight_scale [N, K/G].

    A byte holds the two's complement codes of outputs 2r (low) and 2r + 1. Raises LayoutError for a zero that is not 8
    or an odd N.
    """
    _check_symmetric("ModelOpt", weight)
    check_divides("outputs of ModelOpt's bytes", weight.num_outputs, 2)
    signed = unpack(weight.codes) ^ SYMMETRIC_ZERO
    return {"weight": pack(signed.T).T.contiguous(), "weight_scale": weight.scales.contiguous()}


def unpack_modelopt(tensors: Mapping[str, Tensor], group_size: int) -> Int4Weight:
    """The inverse of `pack_modelopt`. Raises LayoutError when a tensor is missing or of another shape or type."""
    packed, scales = take(tensors, "ModelOpt", ("weight", "weight_scale"))
    expect("ModelOpt", "weight", packed, torch.uint8, (None, None))
    check_group(packed.shape[1], group_size)
    expect("ModelOpt", "weight_scale", scales, None, (packed.shape[0] * 2, packed.shape[1] // group_size))
    codes = unpack(packed.T).T ^ SYMMETRIC_ZERO
    return Int4Weight(pack(codes), scales, _eights(scales), group_size)


def _check_symmetric(program: str, weight: Int4Weight) -> None:
    if not bool((weight.zeros == SYMMETRIC_ZERO).all()):
        raise LayoutError(
            f"{program} knows symmetric weights alone, and this one has zeros; quantize with symmetric=True"
        )


def _eights(scales: Tensor) -> Tensor:
    return torch.full_like(scales, SYMMETRIC_ZERO, dtype=torch.uint8)


def _blocks(name: str, run: int) -> Int4Format:
    packer: Callable[[Int4Weight], Packed] = partial(pack_blocks, run=run)
    return Int4Format(name, _ENGINE, packer, partial(unpack_blocks, run=run))


TARGETS = (
    _blocks("qm_x86", 64),
    _blocks("qm_arm", 32),
    _blocks("qm_metal", 8),
    Int4Format("qm_cuda", _ENGINE, pack_engine_cuda, unpack_engine_cuda),
    Int4Format("compressed", ("weight_packed", "weight_scale", "weight_shape"), pack_compressed, unpack_compressed),
    Int4Format("modelopt", ("weight", "weight_scale"), pack_modelopt, unpack_modelopt),
)
