"""INT4 packings of other programs, in both directions: each is a pair of functions on the tensors of one Linear.

A packer takes an `Int4Weight` and returns tensors by name suffix; an unpacker takes these and the group size.
Checkpoint layouts add file names, Linear names and configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vila.core.errors import LayoutError, UnknownNameError
from vila.kernels.int4 import SYMMETRIC_ZERO, Int4Weight, check_group_size, pack_nibbles, unpack_nibbles

# N outputs  K inputs  G group size  Z words of zeros per row  (the letters of the published formats)

Packed = dict[str, Tensor]
CODES_PER_WORD = 8
"""Codes in a 32-bit word."""


@dataclass(frozen=True)
class Int4Format:
    """A packing. `tensors` are the names that `pack` returns and `unpack` needs; both raise LayoutError."""

    name: str
    tensors: tuple[str, ...]
    pack: Callable[[Int4Weight], Packed]
    unpack: Callable[[Mapping[str, Tensor], int], Int4Weight]


def num_zero_words(num_inputs: int, group_size: int) -> int:
    """Words (eight groups each) per row of zeros in gemv and TinyChat files: even for G=64, a multiple of 4 for G=32.

    Raises LayoutError for group sizes that these files do not support.
    """
    check_group_size(num_inputs, group_size)
    unit = 1 if group_size >= 128 else {64: 2, 32: 4}.get(group_size, 0)
    if not unit:
        raise LayoutError(
            "not supported by gemv and tinychat files",
            field="group_size",
            value=group_size,
            expected="32, 64, 128 or more",
        )
    return -(-num_inputs // (group_size * CODES_PER_WORD * unit)) * unit


def half_scales(scales: Tensor) -> Tensor:
    """Return scales as float16, which most packings store. Raises LayoutError for values outside its range."""
    half = scales.to(torch.float16)
    if not bool(half.isfinite().all()):
        raise LayoutError(
            "outside the range of float16, which this packing stores",
            field="scales",
            hint="quantize with dtype=torch.float16",
        )
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


def take(tensors: Mapping[str, Tensor], name: str, wanted: Sequence[str]) -> list[Tensor]:
    """Return the named tensors of a weight, in order. Raises LayoutError naming missing ones."""
    missing = [key for key in wanted if key not in tensors]
    if missing:
        raise LayoutError(f"missing in a {name} weight", field=", ".join(missing), value=sorted(tensors))
    return [tensors[key] for key in wanted]


def expect(name: str, key: str, tensor: Tensor, kind: torch.dtype | None, shape: tuple[int | None, ...]) -> None:
    """Raise LayoutError for another dtype or shape; `kind` None is any floating-point dtype, None in `shape` any."""
    fits = tensor.dim() == len(shape) and all(
        want is None or want == size for want, size in zip(shape, tensor.shape, strict=True)
    )
    if fits and (tensor.dtype == kind or (kind is None and tensor.is_floating_point())):
        return
    wanted = f"{kind or 'floating'} [{', '.join('any' if size is None else str(size) for size in shape)}]"
    raise LayoutError(
        f"not a {name} weight of this group size",
        field=key,
        value=f"{tensor.dtype} {list(tensor.shape)}",
        expected=wanted,
    )


# Packings that are only written, by exports; the unpackers verify them.

_ENGINE = ("weight_int4", "scaling_factor_int4", "offset_int4", "zero_point_int4")
_ENGINE_BLOCK = 32
_EIGHTS = -0x77777778  # a word of eight 8s, 0x88888888 as int32


def pack_tinychatengine_blocks(weight: Int4Weight, *, run: int) -> Packed:
    """Pack for TinyChatEngine's CPU and Metal formats: byte e of a run holds inputs e and e + run/2; group size 32.

    weight_int4 uint8 [N, K/2], scaling_factor_int4 and offset_int4 (zeros) float32 [N, K/32], zero_point_int4 [1] = 8.
    Runs are 64 (QM_x86), 32 (QM_ARM) or 8 (QM_METAL) inputs. Raises LayoutError for another group size, a zero other
    than 8, or a K that is not a multiple of `run`.
    """
    _check_symmetric("TinyChatEngine", weight)
    check_divides("inputs of TinyChatEngine's runs", weight.num_inputs, run)
    if weight.group_size != _ENGINE_BLOCK:
        raise LayoutError(
            "not supported by TinyChatEngine", field="group_size", value=weight.group_size, expected=str(_ENGINE_BLOCK)
        )
    halves = unpack_nibbles(weight.codes).unflatten(-1, (-1, 2, run // 2))
    return {
        "weight_int4": pack_nibbles(halves.transpose(-1, -2).flatten(-3)),
        "scaling_factor_int4": weight.scales.float(),
        "offset_int4": torch.zeros_like(weight.scales, dtype=torch.float32),
        "zero_point_int4": torch.tensor([float(SYMMETRIC_ZERO)]),
    }


def unpack_tinychatengine_blocks(tensors: Mapping[str, Tensor], group_size: int, *, run: int) -> Int4Weight:
    """Inverse of `pack_tinychatengine_blocks`. Raises LayoutError for a missing tensor, wrong shape or dtype."""
    packed, scales, _, _ = take(tensors, "TinyChatEngine", _ENGINE)
    expect("TinyChatEngine", "weight_int4", packed, torch.uint8, (None, None))
    check_group_size(packed.shape[1] * 2, group_size)
    check_divides("inputs of TinyChatEngine's runs", packed.shape[1] * 2, run)
    expect("TinyChatEngine", "scaling_factor_int4", scales, None, (packed.shape[0], packed.shape[1] * 2 // group_size))
    codes = unpack_nibbles(packed).unflatten(-1, (-1, run // 2, 2)).transpose(-1, -2).flatten(-3)
    return Int4Weight(pack_nibbles(codes), scales, _eights(scales), group_size)


def pack_tinychatengine_cuda(weight: Int4Weight) -> Packed:
    """Pack for TinyChatEngine's QM_CUDA: weight_int4 int32 [N, K/8] and scaling_factor_int4 float16 [N, 8Z] as in gemv.

    offset_int4 float16 [N, K/G] is zero and every word of zero_point_int4 int32 [N, Z] is 0x88888888, padding included.
    Raises LayoutError for a zero other than 8 or an unsupported group size.
    """
    _check_symmetric("TinyChatEngine", weight)
    check_divides("inputs of TinyChatEngine's words", weight.num_inputs, CODES_PER_WORD)
    words = num_zero_words(weight.num_inputs, weight.group_size)
    return {
        "weight_int4": as_words(weight.codes),
        "scaling_factor_int4": widen(half_scales(weight.scales), words * CODES_PER_WORD),
        "offset_int4": torch.zeros_like(weight.scales, dtype=torch.float16),
        "zero_point_int4": torch.full((weight.num_outputs, words), _EIGHTS, dtype=torch.int32),
    }


def unpack_tinychatengine_cuda(tensors: Mapping[str, Tensor], group_size: int) -> Int4Weight:
    """Inverse of `pack_tinychatengine_cuda`. Raises LayoutError for a missing tensor, wrong shape or dtype."""
    packed, scales, _, _ = take(tensors, "TinyChatEngine", _ENGINE)
    expect("TinyChatEngine", "weight_int4", packed, torch.int32, (None, None))
    num_inputs = packed.shape[1] * CODES_PER_WORD
    words = num_zero_words(num_inputs, group_size)
    expect("TinyChatEngine", "scaling_factor_int4", scales, None, (packed.shape[0], words * CODES_PER_WORD))
    scales = scales[:, : num_inputs // group_size].contiguous()
    return Int4Weight(as_bytes(packed), scales, _eights(scales), group_size)


def pack_compressed(weight: Int4Weight) -> Packed:
    """Pack for compressed-tensors: weight_packed int32 [N, K/8], weight_scale [N, K/G], weight_shape int64 [2].

    Natural order; weight_zero_point int32 [N/8, K/G] is packed along the outputs, and omitted if every zero is 8 (a
    symmetric weight). Raises LayoutError unless 8 divides K and, for an asymmetric weight, N.
    """
    check_divides("inputs of compressed-tensors' words", weight.num_inputs, CODES_PER_WORD)
    packed = {
        "weight_packed": as_words(weight.codes),
        "weight_scale": weight.scales.contiguous(),
        "weight_shape": torch.tensor([weight.num_outputs, weight.num_inputs]),
    }
    if bool((weight.zeros == SYMMETRIC_ZERO).all()):
        return packed
    check_divides("outputs of compressed-tensors' zero points", weight.num_outputs, CODES_PER_WORD)
    return packed | {"weight_zero_point": as_words(pack_nibbles(weight.zeros.T)).T.contiguous()}


def unpack_compressed(tensors: Mapping[str, Tensor], group_size: int) -> Int4Weight:
    """Inverse of `pack_compressed`. Raises LayoutError for a missing tensor, wrong shape or dtype."""
    codes, scales = take(tensors, "compressed-tensors", ("weight_packed", "weight_scale"))
    expect("compressed-tensors", "weight_packed", codes, torch.int32, (None, None))
    num_outputs, num_inputs = codes.shape[0], codes.shape[1] * CODES_PER_WORD
    check_group_size(num_inputs, group_size)
    groups = num_inputs // group_size
    expect("compressed-tensors", "weight_scale", scales, None, (num_outputs, groups))
    zeros = _eights(scales)
    if (words := tensors.get("weight_zero_point")) is not None:
        expect("compressed-tensors", "weight_zero_point", words, torch.int32, (num_outputs // CODES_PER_WORD, groups))
        zeros = unpack_nibbles(as_bytes(words.T)).T.contiguous()
    return Int4Weight(as_bytes(codes), scales, zeros, group_size)


def pack_modelopt(weight: Int4Weight) -> Packed:
    """Pack for ModelOpt's INT4 for TensorRT-LLM: weight uint8 [N/2, K], weight_scale [N, K/G].

    A byte holds the two's complement codes of outputs 2r (low) and 2r + 1. Raises LayoutError for a zero other than 8
    or an odd N.
    """
    _check_symmetric("ModelOpt", weight)
    check_divides("outputs of ModelOpt's bytes", weight.num_outputs, 2)
    signed = unpack_nibbles(weight.codes) ^ SYMMETRIC_ZERO
    return {"weight": pack_nibbles(signed.T).T.contiguous(), "weight_scale": weight.scales.contiguous()}


def unpack_modelopt(tensors: Mapping[str, Tensor], group_size: int) -> Int4Weight:
    """Inverse of `pack_modelopt`. Raises LayoutError for a missing tensor, wrong shape or dtype."""
    packed, scales = take(tensors, "ModelOpt", ("weight", "weight_scale"))
    expect("ModelOpt", "weight", packed, torch.uint8, (None, None))
    check_group_size(packed.shape[1], group_size)
    expect("ModelOpt", "weight_scale", scales, None, (packed.shape[0] * 2, packed.shape[1] // group_size))
    codes = unpack_nibbles(packed.T).T ^ SYMMETRIC_ZERO
    return Int4Weight(pack_nibbles(codes), scales, _eights(scales), group_size)


def _check_symmetric(program: str, weight: Int4Weight) -> None:
    if not bool((weight.zeros == SYMMETRIC_ZERO).all()):
        raise LayoutError(
            f"{program} supports symmetric weights only", field="zeros", hint="quantize with symmetric=True"
        )


def _eights(scales: Tensor) -> Tensor:
    return torch.full_like(scales, SYMMETRIC_ZERO, dtype=torch.uint8)


def _blocks(name: str, run: int) -> Int4Format:
    packer: Callable[[Int4Weight], Packed] = partial(pack_tinychatengine_blocks, run=run)
    return Int4Format(name, _ENGINE, packer, partial(unpack_tinychatengine_blocks, run=run))


TARGETS = (
    _blocks("qm_x86", 64),
    _blocks("qm_arm", 32),
    _blocks("qm_metal", 8),
    Int4Format("qm_cuda", _ENGINE, pack_tinychatengine_cuda, unpack_tinychatengine_cuda),
    Int4Format("compressed", ("weight_packed", "weight_scale", "weight_shape"), pack_compressed, unpack_compressed),
    Int4Format("modelopt", ("weight", "weight_scale"), pack_modelopt, unpack_modelopt),
)


# AutoAWQ's gemm words: nibble i of a word holds output 8c + GEMM_ORDER[i]; outputs with codes 0..7 give 0x75316420.
GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_GEMM_BACK = (0, 4, 1, 5, 2, 6, 3, 7)
_TINYCHAT_RUN = 32
_TINYCHAT_ROWS = 4
_TINYCHAT_COLUMNS = 64


def find_format(name: str) -> Int4Format:
    """Return the packing with a name. Raises UnknownNameError listing all names."""
    for candidate in FORMATS:
        if candidate.name == name:
            return candidate
    raise UnknownNameError("4-bit packing", name, (candidate.name for candidate in FORMATS))


def pack_gemm(weight: Int4Weight) -> Packed:
    """Pack for AutoAWQ `gemm`: qweight int32 [K, N/8], qzeros int32 [K/G, N/8], scales float16 [K/G, N].

    Words hold eight outputs in GEMM_ORDER. Raises LayoutError unless 8 divides N.
    """
    check_divides("outputs of gemm words", weight.num_outputs, CODES_PER_WORD)
    return {
        "qweight": _gemm_words(unpack_nibbles(weight.codes).T),
        "qzeros": _gemm_words(weight.zeros.T),
        "scales": half_scales(weight.scales).T.contiguous(),
    }


def unpack_gemm(tensors: Mapping[str, Tensor], group_size: int) -> Int4Weight:
    """Inverse of `pack_gemm`. Raises LayoutError for a missing tensor, wrong shape or dtype."""
    qweight, qzeros, scales = take(tensors, "gemm", ("qweight", "qzeros", "scales"))
    expect("gemm", "qweight", qweight, torch.int32, (None, None))
    num_inputs, num_outputs = qweight.shape[0], qweight.shape[1] * CODES_PER_WORD
    check_group_size(num_inputs, group_size)
    groups = num_inputs // group_size
    expect("gemm", "qzeros", qzeros, torch.int32, (groups, num_outputs // CODES_PER_WORD))
    expect("gemm", "scales", scales, None, (groups, num_outputs))
    codes, zeros = (_gemm_codes(words).T.contiguous() for words in (qweight, qzeros))
    return Int4Weight(pack_nibbles(codes), scales.T.contiguous(), zeros, group_size)


def pack_gemv(weight: Int4Weight) -> Packed:
    """Pack for AutoAWQ `gemv` (TinyChat v1): qweight int32 [N, K/8], qzeros int32 [N, Z], scales float16 [N, 8Z].

    Natural order; Z is `num_zero_words`, and entries beyond the K/G groups are zero.
    Raises LayoutError unless 8 divides K and the group size is supported.
    """
    check_divides("inputs of gemv words", weight.num_inputs, CODES_PER_WORD)
    width = num_zero_words(weight.num_inputs, weight.group_size) * CODES_PER_WORD
    return {
        "qweight": as_words(weight.codes),
        "qzeros": as_words(pack_nibbles(widen(weight.zeros, width))),
        "scales": widen(half_scales(weight.scales), width),
    }


def unpack_gemv(tensors: Mapping[str, Tensor], group_size: int) -> Int4Weight:
    """Inverse of `pack_gemv`. Raises LayoutError for a missing tensor, wrong shape or dtype."""
    qweight, qzeros, scales = take(tensors, "gemv", ("qweight", "qzeros", "scales"))
    expect("gemv", "qweight", qweight, torch.int32, (None, None))
    num_outputs, num_inputs = qweight.shape[0], qweight.shape[1] * CODES_PER_WORD
    words = num_zero_words(num_inputs, group_size)
    expect("gemv", "qzeros", qzeros, torch.int32, (num_outputs, words))
    expect("gemv", "scales", scales, None, (num_outputs, words * CODES_PER_WORD))
    groups = num_inputs // group_size
    zeros = unpack_nibbles(as_bytes(qzeros))[:, :groups]
    codes = as_bytes(qweight)
    return Int4Weight(codes, scales[:, :groups].contiguous(), zeros.contiguous(), group_size)


def pack_tinychat(weight: Int4Weight) -> Packed:
    """Pack for TinyChat v2 (AutoAWQ `gemv_fast`): qweight int16 [N/4, K], scales and scaled_zeros float16 [8Z, N].

    scaled_zeros is -(scale * zero) in float16, which costs up to 0.8 % of a step. Within runs of 32 inputs, position p
    holds input 8 (p mod 4) + p div 4; words of four neighbours are then ordered by tiles of 4 outputs x 64 inputs.
    Raises LayoutError unless 8 divides N, 64 divides K and the group size is supported.
    """
    check_divides("outputs of tinychat words", weight.num_outputs, CODES_PER_WORD)
    check_divides("inputs of tinychat words", weight.num_inputs, _TINYCHAT_COLUMNS)
    width = num_zero_words(weight.num_inputs, weight.group_size) * CODES_PER_WORD
    runs = unpack_nibbles(weight.codes).unflatten(-1, (-1, 4, _TINYCHAT_RUN // 4)).transpose(-1, -2).flatten(-3)
    tiles = runs.unflatten(0, (-1, _TINYCHAT_ROWS)).unflatten(-1, (-1, _TINYCHAT_COLUMNS)).transpose(1, 2)
    scales = half_scales(weight.scales)
    scaled_zeros = -(scales * weight.zeros)
    return {
        "qweight": as_words(pack_nibbles(tiles.flatten(1)), torch.int16),
        "scales": widen(scales, width).T.contiguous(),
        "scaled_zeros": widen(scaled_zeros, width).T.contiguous(),
    }


def unpack_tinychat(tensors: Mapping[str, Tensor], group_size: int) -> Int4Weight:
    """Inverse of `pack_tinychat`; `scaled_zeros` may be named `qzeros`, as in AutoAWQ.

    Raises LayoutError for a missing tensor, wrong shape or dtype, or a zero outside 0..15.
    """
    if "scaled_zeros" not in tensors and "qzeros" in tensors:
        tensors = {**tensors, "scaled_zeros": tensors["qzeros"]}
    qweight, scales, scaled_zeros = take(tensors, "tinychat", ("qweight", "scales", "scaled_zeros"))
    expect("tinychat", "qweight", qweight, torch.int16, (None, None))
    num_outputs, num_inputs = qweight.shape[0] * _TINYCHAT_ROWS, qweight.shape[1]
    check_divides("inputs of tinychat words", num_inputs, _TINYCHAT_COLUMNS)
    width = num_zero_words(num_inputs, group_size) * CODES_PER_WORD
    expect("tinychat", "scales", scales, None, (width, num_outputs))
    expect("tinychat", "scaled_zeros", scaled_zeros, None, (width, num_outputs))
    tiles = unpack_nibbles(as_bytes(qweight)).unflatten(1, (-1, _TINYCHAT_ROWS, _TINYCHAT_COLUMNS))
    runs = tiles.transpose(1, 2).flatten(2).flatten(0, 1)
    codes = runs.unflatten(-1, (-1, _TINYCHAT_RUN // 4, 4)).transpose(-1, -2).flatten(-3)
    groups = num_inputs // group_size
    scales = scales[:groups].T.contiguous()
    return Int4Weight(pack_nibbles(codes), scales, _whole_zeros(scales, scaled_zeros[:groups].T), group_size)


def pack_onnx(weight: Int4Weight) -> Packed:
    """Pack for ONNX Runtime's MatMulNBits.

    Returns B uint8 [N, K/G, G/2], scales [N, K/G] and zero_points uint8 [N, ceil(K/G / 2)].
    Codes are in channel order. Scales keep their dtype. An odd number of groups is padded with a zero nibble.
    Raises LayoutError unless the group size is a power of two and at least 16.
    """
    size = weight.group_size
    if size < 16 or size & (size - 1):
        raise LayoutError(
            "not supported by MatMulNBits", field="group_size", value=size, expected="a power of two, at least 16"
        )
    groups = weight.num_inputs // size
    return {
        "B": weight.codes.unflatten(-1, (-1, size // 2)).contiguous(),
        "scales": weight.scales.contiguous(),
        "zero_points": pack_nibbles(widen(weight.zeros, groups + groups % 2)),
    }


def unpack_onnx(tensors: Mapping[str, Tensor], group_size: int) -> Int4Weight:
    """Inverse of `pack_onnx`; scales and zero points may be flat, as in older files.

    Raises LayoutError for a missing tensor, wrong shape or dtype.
    """
    blocks, scales, zero_points = take(tensors, "onnx", ("B", "scales", "zero_points"))
    expect("onnx", "B", blocks, torch.uint8, (None, None, group_size // 2))
    num_outputs, groups, _ = blocks.shape
    scales, zero_points = (part.reshape(num_outputs, -1) for part in (scales, zero_points))
    expect("onnx", "scales", scales, None, (num_outputs, groups))
    expect("onnx", "zero_points", zero_points, torch.uint8, (num_outputs, (groups + 1) // 2))
    return Int4Weight(blocks.flatten(1), scales, unpack_nibbles(zero_points)[:, :groups].contiguous(), group_size)


def _gemm_words(codes: Tensor) -> Tensor:
    """Pack codes [..., N] into int32 [..., N/8] in gemm order."""
    return as_words(pack_nibbles(codes.unflatten(-1, (-1, CODES_PER_WORD))[..., GEMM_ORDER].flatten(-2)))


def _gemm_codes(words: Tensor) -> Tensor:
    """Inverse of `_gemm_words`."""
    return unpack_nibbles(as_bytes(words)).unflatten(-1, (-1, CODES_PER_WORD))[..., _GEMM_BACK].flatten(-2)


def _whole_zeros(scales: Tensor, scaled_zeros: Tensor) -> Tensor:
    """Recover zeros 0..15 from -(scale * zero)."""
    zeros = (-scaled_zeros.float() / scales.float()).round()
    if not bool(((zeros >= 0) & (zeros <= 15)).all()):
        raise LayoutError("not -(scale * zero) with a zero of 0..15: another format, or damaged", field="scaled_zeros")
    return zeros.to(torch.uint8)


FORMATS = (
    Int4Format("gemm", ("qweight", "qzeros", "scales"), pack_gemm, unpack_gemm),
    Int4Format("gemv", ("qweight", "qzeros", "scales"), pack_gemv, unpack_gemv),
    Int4Format("tinychat", ("qweight", "scales", "scaled_zeros"), pack_tinychat, unpack_tinychat),
    Int4Format("onnx", ("B", "scales", "zero_points"), pack_onnx, unpack_onnx),
    *TARGETS,
)
