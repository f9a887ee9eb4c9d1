"""How other programs pack 4-bit weights, both ways: every packing is a pair of functions on the tensors of one Linear.

A packer takes our storage and gives tensors by the names they have behind the Linear's own in a file; an unpacker takes
these and the group size that the file claims. Files, names of Linears and configurations belong to the layouts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vila.core.errors import LayoutError, UnknownNameError
from vila.kernels.int4_layout import Int4Weight, check_group, pack, unpack
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
from vila.kernels.int4_targets import TARGETS

# N outputs  K inputs  G inputs of a group  (the letters of the published formats)

# AutoAWQ's gemm words: nibble i of a word holds output 8c + GEMM_ORDER[i]; channels valued 0..7 give 0x75316420.
GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_GEMM_BACK = (0, 4, 1, 5, 2, 6, 3, 7)
_TINYCHAT_RUN = 32
_TINYCHAT_ROWS = 4
_TINYCHAT_COLUMNS = 64


def find_format(name: str) -> Int4Format:
    """The packing of that name. Raises UnknownNameError naming those that exist."""
    for candidate in FORMATS:
        if candidate.name == name:
            return candidate
    raise UnknownNameError("4-bit packing", name, (candidate.name for candidate in FORMATS))


def pack_gemm(weight: Int4Weight) -> Packed:
    """AutoAWQ `gemm`: qweight int32 [K, N/8], qzeros int32 [K/G, N/8], scales float16 [K/G, N].

    Words hold eight outputs in GEMM_ORDER. Raises LayoutError unless 8 divides N.
    """
    check_divides("outputs of gemm words", weight.num_outputs, WORD)
    return {
        "qweight": _gemm_words(unpack(weight.codes).T),
        "qzeros": _gemm_words(weight.zeros.T),
        "scales": half_scales(weight.scales).T.contiguous(),
    }


def unpack_gemm(tensors: Mapping[str, Tensor], group_size: int) -> Int4Weight:
    """The inverse of `pack_gemm`. Raises LayoutError when a tensor is missing or of another shape or type."""
    qweight, qzeros, scales = take(tensors, "gemm", ("qweight", "qzeros", "scales"))
    expect("gemm", "qweight", qweight, torch.int32, (None, None))
    num_inputs, num_outputs = qweight.shape[0], qweight.shape[1] * WORD
    check_group(num_inputs, group_size)
    groups = num_inputs // group_size
    expect("gemm", "qzeros", qzeros, torch.int32, (groups, num_outputs // WORD))
    expect("gemm", "scales", scales, None, (groups, num_outputs))
    codes, zeros = (_gemm_codes(words).T.contiguous() for words in (qweight, qzeros))
    return Int4Weight(pack(codes), scales.T.contiguous(), zeros, group_size)


def pack_gemv(weight: Int4Weight) -> Packed:
    """AutoAWQ `gemv`, TinyChat's first format: qweight int32 [N, K/8], qzeros int32 [N, Z], scales float16 [N, 8Z].

    All in natural order; `padded_words` is Z, and what lies past the K/G groups is zero.
    Raises LayoutError when 8 does not divide K or the format has no such group size.
    """
    check_divides("inputs of gemv words", weight.num_inputs, WORD)
    width = padded_words(weight.num_inputs, weight.group_size) * WORD
    return {
        "qweight": as_words(weight.codes),
        "qzeros": as_words(pack(widen(weight.zeros, width))),
        "scales": widen(half_scales(weight.scales), width),
    }


def unpack_gemv(tensors: Mapping[str, Tensor], group_size: int) -> Int4Weight:
    """The inverse of `pack_gemv`. Raises LayoutError when a tensor is missing or of another shape or type."""
    qweight, qzeros, scales = take(tensors, "gemv", ("qweight", "qzeros", "scales"))
    expect("gemv", "qweight", qweight, torch.int32, (None, None))
    num_outputs, num_inputs = qweight.shape[0], qweight.shape[1] * WORD
    words = padded_words(num_inputs, group_size)
    expect("gemv", "qzeros", qzeros, torch.int32, (num_outputs, words))
    expect("gemv", "scales", scales, None, (num_outputs, words * WORD))
    groups = num_inputs // group_size
    zeros = unpack(as_bytes(qzeros))[:, :groups]
    codes = as_bytes(qweight)
    return Int4Weight(codes, scales[:, :groups].contiguous(), zeros.contiguous(), group_size)


def pack_tinychat(weight: Int4Weight) -> Packed:
    """TinyChat v2 (AutoAWQ `gemv_fast`): qweight int16 [N/4, K], scales and scaled_zeros float16 [8Z, N].

    scaled_zeros is -(scale * zero) in float16, which costs up to 0.8 % of a step. Within runs of 32 inputs position p
    holds input 8 (p mod 4) + p div 4; words of four neighbours then run through tiles of 4 outputs x 64 inputs.
    Raises LayoutError unless 8 divides N, 64 divides K and the format has such a group size.
    """
    check_divides("outputs of tinychat words", weight.num_outputs, WORD)
    check_divides("inputs of tinychat words", weight.num_inputs, _TINYCHAT_COLUMNS)
    width = padded_words(weight.num_inputs, weight.group_size) * WORD
    runs = unpack(weight.codes).unflatten(-1, (-1, 4, _TINYCHAT_RUN // 4)).transpose(-1, -2).flatten(-3)
    tiles = runs.unflatten(0, (-1, _TINYCHAT_ROWS)).unflatten(-1, (-1, _TINYCHAT_COLUMNS)).transpose(1, 2)
    scales = half_scales(weight.scales)
    scaled_zeros = -(scales * weight.zeros)
    return {
        "qweight": as_words(pack(tiles.flatten(1)), torch.int16),
        "scales": widen(scales, width).T.contiguous(),
        "scaled_zeros": widen(scaled_zeros, width).T.contiguous(),
    }


def unpack_tinychat(tensors: Mapping[str, Tensor], group_size: int) -> Int4Weight:
    """The inverse of `pack_tinychat`; `scaled_zeros` may be called `qzeros`, as AutoAWQ does.

    Raises LayoutError when a tensor is missing or of another shape or type, or a zero is none of 0..15.
    """
    if "scaled_zeros" not in tensors and "qzeros" in tensors:
        tensors = {**tensors, "scaled_zeros": tensors["qzeros"]}
    qweight, scales, scaled_zeros = take(tensors, "tinychat", ("qweight", "scales", "scaled_zeros"))
    expect("tinychat", "qweight", qweight, torch.int16, (None, None))
    num_outputs, num_inputs = qweight.shape[0] * _TINYCHAT_ROWS, qweight.shape[1]
    check_divides("inputs of tinychat words", num_inputs, _TINYCHAT_COLUMNS)
    width = padded_words(num_inputs, group_size) * WORD
    expect("tinychat", "scales", scales, None, (width, num_outputs))
    expect("tinychat", "scaled_zeros", scaled_zeros, None, (width, num_outputs))
    tiles = unpack(as_bytes(qweight)).unflatten(1, (-1, _TINYCHAT_ROWS, _TINYCHAT_COLUMNS))
    runs = tiles.transpose(1, 2).flatten(2).flatten(0, 1)
    codes = runs.unflatten(-1, (-1, _TINYCHAT_RUN // 4, 4)).transpose(-1, -2).flatten(-3)
    groups = num_inputs // group_size
    kept = scales[:groups].T.contiguous()
    return Int4Weight(pack(codes), kept, _whole_zeros(kept, scaled_zeros[:groups].T), group_size)


def pack_onnx(weight: Int4Weight) -> Packed:
    """ONNX Runtime's MatMulNBits: B uint8 [N, K/G, G/2], scales [N, K/G], zero_points uint8 [N, ceil(K/G / 2)].

    All in natural order; scales keep their type, and the nibble past an odd number of groups is zero. The operator
    takes group sizes of 16 and more that are powers of two. Raises LayoutError for other ones.
    """
    size = weight.group_size
    if size < 16 or size & (size - 1):
        raise LayoutError(f"MatMulNBits takes groups of 16, 32, 64, 128, 256 ..., not {size}")
    groups = weight.num_inputs // size
    return {
        "B": weight.codes.unflatten(-1, (-1, size // 2)).contiguous(),
        "scales": weight.scales.contiguous(),
        "zero_points": pack(widen(weight.zeros, groups + groups % 2)),
    }


def unpack_onnx(tensors: Mapping[str, Tensor], group_size: int) -> Int4Weight:
    """The inverse of `pack_onnx`; scales and zero points may be flat, as older files have them.

    Raises LayoutError when a tensor is missing or of another shape or type.
    """
    blocks, scales, zero_points = take(tensors, "onnx", ("B", "scales", "zero_points"))
    expect("onnx", "B", blocks, torch.uint8, (None, None, group_size // 2))
    num_outputs, groups, _ = blocks.shape
    scales, zero_points = (part.reshape(num_outputs, -1) for part in (scales, zero_points))
    expect("onnx", "scales", scales, None, (num_outputs, groups))
    expect("onnx", "zero_points", zero_points, torch.uint8, (num_outputs, (groups + 1) // 2))
    return Int4Weight(blocks.flatten(1), scales, unpack(zero_points)[:, :groups].contiguous(), group_size)


def _gemm_words(codes: Tensor) -> Tensor:
    """Codes [..., N] to int32 [..., N/8] in the order of gemm."""
    return as_words(pack(codes.unflatten(-1, (-1, WORD))[..., GEMM_ORDER].flatten(-2)))


def _gemm_codes(words: Tensor) -> Tensor:
    """The inverse of `_gemm_words`."""
    return unpack(as_bytes(words)).unflatten(-1, (-1, WORD))[..., _GEMM_BACK].flatten(-2)


def _whole_zeros(scales: Tensor, scaled_zeros: Tensor) -> Tensor:
    """Zeros 0..15 of -(scale * zero)."""
    zeros = (-scaled_zeros.float() / scales.float()).round()
    if not bool(((zeros >= 0) & (zeros <= 15)).all()):
        raise LayoutError(
            "tinychat scaled_zeros are not -(scale * zero) with a zero of 0..15: another format or damaged"
        )
    return zeros.to(torch.uint8)


FORMATS = (
    Int4Format("gemm", ("qweight", "qzeros", "scales"), pack_gemm, unpack_gemm),
    Int4Format("gemv", ("qweight", "qzeros", "scales"), pack_gemv, unpack_gemv),
    Int4Format("tinychat", ("qweight", "scales", "scaled_zeros"), pack_tinychat, unpack_tinychat),
    Int4Format("onnx", ("B", "scales", "zero_points"), pack_onnx, unpack_onnx),
    *TARGETS,
)
