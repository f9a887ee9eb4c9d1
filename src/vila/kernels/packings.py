"""INT4 packings of other programs: functions on the tensors of one Linear.

A packer takes an `Int4Weight` and returns tensors by name suffix. An unpacker (`UNPACKERS`) takes these and the group
size; the caller has checked names, shapes and dtypes. Checkpoint layouts and exports add file names, Linear names,
configuration, and checks of sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vila.core.errors import LayoutError
from vila.kernels.group_size import CODES_PER_WORD, num_zero_words
from vila.kernels.int4 import SYMMETRIC_ZERO, Int4Weight, pack_nibbles, unpack_nibbles

# N outputs  K inputs  G group size  Z words of zeros per row  (the letters of the published formats)

Packed = dict[str, Tensor]
# AutoAWQ's gemm words: nibble i of a word holds output 8c + GEMM_ORDER[i]; outputs with codes 0..7 give 0x75316420.
GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_GEMM_BACK = (0, 4, 1, 5, 2, 6, 3, 7)
_TINYCHAT_RUN = 32
_TINYCHAT_ROWS = 4
_TINYCHAT_COLUMNS = 64
_EIGHTS = -0x77777778  # a word of eight 8s, 0x88888888 as int32


def half_scales(scales: Tensor) -> Tensor:
    """Return scales as float16, which most packings store. Raises LayoutError for values outside its range."""
    half = scales.to(torch.float16)
    if not bool(half.isfinite().all()):
        problem = "outside the range of float16, which this packing stores"
        raise LayoutError(problem, field="scales", hint="quantize with dtype=torch.float16")
    return half


def as_words(packed: Tensor, kind: torch.dtype = torch.int32) -> Tensor:
    """View bytes [..., n] as little-endian words [..., n / size of `kind`]."""
    return packed.contiguous().flatten().view(kind).reshape(*packed.shape[:-1], -1)


def as_bytes(words: Tensor) -> Tensor:
    """Inverse of `as_words`."""
    return words.contiguous().flatten().view(torch.uint8).reshape(*words.shape[:-1], -1)


def widen(rows: Tensor, width: int) -> Tensor:
    """Zero-pad [N, groups] on the right to [N, width]."""
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))


def check_divides(what: str, size: int, unit: int) -> None:
    """Raise LayoutError unless `unit` divides `size`."""
    if size % unit:
        raise LayoutError("", field=what, value=size, expected=f"a multiple of {unit}")


# AutoAWQ and TinyChat


def pack_gemm(weight: Int4Weight) -> Packed:
    """Pack for AutoAWQ `gemm`: qweight int32 [K, N/8], qzeros int32 [K/G, N/8], scales float16 [K/G, N].

    Words hold eight outputs in GEMM_ORDER.
    """
    return {
        "qweight": _gemm_words(unpack_nibbles(weight.codes).T),
        "qzeros": _gemm_words(weight.zeros.T),
        "scales": half_scales(weight.scales).T.contiguous(),
    }


def unpack_gemm(tensors: Mapping[str, Tensor], group_size: int) -> Int4Weight:
    """Inverse of `pack_gemm`."""
    codes, zeros = (_gemm_codes(tensors[name]).T.contiguous() for name in ("qweight", "qzeros"))
    return Int4Weight(pack_nibbles(codes), tensors["scales"].T.contiguous(), zeros, group_size)


def _gemm_words(codes: Tensor) -> Tensor:
    """Pack codes [..., N] into int32 [..., N/8] in gemm order."""
    return as_words(pack_nibbles(codes.unflatten(-1, (-1, CODES_PER_WORD))[..., GEMM_ORDER].flatten(-2)))


def _gemm_codes(words: Tensor) -> Tensor:
    """Inverse of `_gemm_words`."""
    return unpack_nibbles(as_bytes(words)).unflatten(-1, (-1, CODES_PER_WORD))[..., _GEMM_BACK].flatten(-2)


def unpack_gemv(tensors: Mapping[str, Tensor], group_size: int) -> Int4Weight:
    """Unpack AutoAWQ `gemv` (TinyChat v1): qweight int32 [N, K/8], qzeros int32 [N, Z], scales float16 [N, 8Z].

    Natural order; Z is `num_zero_words`, and entries beyond the K/G groups are ignored.
    """
    codes = as_bytes(tensors["qweight"])
    groups = codes.shape[1] * 2 // group_size
    zeros = unpack_nibbles(as_bytes(tensors["qzeros"]))[:, :groups].contiguous()
    return Int4Weight(codes, tensors["scales"][:, :groups].contiguous(), zeros, group_size)


def pack_tinychat(weight: Int4Weight) -> Packed:
    """Pack for TinyChat v2 (AutoAWQ `gemv_fast`): qweight int16 [N/4, K], scales and scaled_zeros float16 [8Z, N].

    scaled_zeros is -(scale * zero) in float16, which costs up to 0.8 % of a step. Within runs of 32 inputs, position p
    holds input 8 (p mod 4) + p div 4; words of four neighbours are then ordered by tiles of 4 outputs x 64 inputs.
    Raises LayoutError for an unsupported group size.
    """
    width = num_zero_words(weight.num_inputs, weight.group_size) * CODES_PER_WORD
    runs = unpack_nibbles(weight.codes).unflatten(-1, (-1, 4, _TINYCHAT_RUN // 4)).transpose(-1, -2).flatten(-3)
    tiles = runs.unflatten(0, (-1, _TINYCHAT_ROWS)).unflatten(-1, (-1, _TINYCHAT_COLUMNS)).transpose(1, 2)
    scales = half_scales(weight.scales)
    return {
        "qweight": as_words(pack_nibbles(tiles.flatten(1)), torch.int16),
        "scales": widen(scales, width).T.contiguous(),
        "scaled_zeros": widen(-(scales * weight.zeros), width).T.contiguous(),
    }


def unpack_tinychat(tensors: Mapping[str, Tensor], group_size: int) -> Int4Weight:
    """Inverse of `pack_tinychat`; `scaled_zeros` may be named `qzeros`, as in AutoAWQ.

    Raises LayoutError for a zero outside 0..15.
    """
    tiles = unpack_nibbles(as_bytes(tensors["qweight"])).unflatten(1, (-1, _TINYCHAT_ROWS, _TINYCHAT_COLUMNS))
    runs = tiles.transpose(1, 2).flatten(2).flatten(0, 1)
    codes = runs.unflatten(-1, (-1, _TINYCHAT_RUN // 4, 4)).transpose(-1, -2).flatten(-3)
    groups = codes.shape[1] // group_size
    scaled_zeros = tensors["scaled_zeros"] if "scaled_zeros" in tensors else tensors["qzeros"]
    scales, scaled_zeros = (part[:groups].T.contiguous() for part in (tensors["scales"], scaled_zeros))
    zeros = (-scaled_zeros.float() / scales.float()).round()
    if not bool(((zeros >= 0) & (zeros <= 15)).all()):
        raise LayoutError("not -(scale * zero) with a zero of 0..15: another format, or damaged", field="scaled_zeros")
    return Int4Weight(pack_nibbles(codes), scales, zeros.to(torch.uint8), group_size)


UNPACKERS: Mapping[str, Callable[[Mapping[str, Tensor], int], Int4Weight]] = {
    "gemm": unpack_gemm,
    "gemv": unpack_gemv,
    "tinychat": unpack_tinychat,
}


# Packings of exports, which are only written


def pack_compressed(weight: Int4Weight, *, symmetric: bool) -> Packed:
    """Pack for compressed-tensors: weight_packed int32 [N, K/8], weight_scale [N, K/G]; natural order.

    An asymmetric weight also has weight_zero_point int32 [N/8, K/G], packed along the outputs.
    """
    packed = {"weight_packed": as_words(weight.codes), "weight_scale": weight.scales.contiguous()}
    if not symmetric:
        packed["weight_zero_point"] = as_words(pack_nibbles(weight.zeros.T)).T.contiguous()
    return packed


def pack_modelopt(weight: Int4Weight) -> Packed:
    """Pack for ModelOpt's INT4 for TensorRT-LLM: weight uint8 [N/2, K], weight_scale [N, K/G].

    A byte holds the two's complement codes of outputs 2r (low) and 2r + 1. Raises LayoutError for a zero other than 8.
    """
    _check_symmetric(weight)
    signed = unpack_nibbles(weight.codes) ^ SYMMETRIC_ZERO
    return {"weight": pack_nibbles(signed.T).T.contiguous(), "weight_scale": weight.scales.contiguous()}


def pack_tinychatengine_blocks(weight: Int4Weight, *, run: int) -> Packed:
    """Pack for TinyChatEngine on a CPU: byte e of a run holds inputs e and e + run/2.

    weight_int4 uint8 [N, K/2], scaling_factor_int4 and offset_int4 (zeros) float32 [N, K/G], zero_point_int4 [1] = 8.
    Runs are 64 (QM_x86) or 32 (QM_ARM) inputs. Raises LayoutError for a zero other than 8.
    """
    _check_symmetric(weight)
    halves = unpack_nibbles(weight.codes).unflatten(-1, (-1, 2, run // 2))
    return {
        "weight_int4": pack_nibbles(halves.transpose(-1, -2).flatten(-3)),
        "scaling_factor_int4": weight.scales.float(),
        "offset_int4": torch.zeros_like(weight.scales, dtype=torch.float32),
        "zero_point_int4": torch.tensor([float(SYMMETRIC_ZERO)]),
    }


def pack_tinychatengine_cuda(weight: Int4Weight) -> Packed:
    """Pack for TinyChatEngine's QM_CUDA: weight_int4 int32 [N, K/8] and scaling_factor_int4 float16 [N, 8Z] as in gemv.

    offset_int4 float16 [N, K/G] is zero and every word of zero_point_int4 int32 [N, Z] is 0x88888888, padding included.
    Raises LayoutError for a zero other than 8 or an unsupported group size.
    """
    _check_symmetric(weight)
    words = num_zero_words(weight.num_inputs, weight.group_size)
    return {
        "weight_int4": as_words(weight.codes),
        "scaling_factor_int4": widen(half_scales(weight.scales), words * CODES_PER_WORD),
        "offset_int4": torch.zeros_like(weight.scales, dtype=torch.float16),
        "zero_point_int4": torch.full((weight.num_outputs, words), _EIGHTS, dtype=torch.int32),
    }


def _check_symmetric(weight: Int4Weight) -> None:
    if not bool((weight.zeros == SYMMETRIC_ZERO).all()):
        raise LayoutError("this packing has symmetric weights only", field="zeros", hint="quantize with symmetric=True")
