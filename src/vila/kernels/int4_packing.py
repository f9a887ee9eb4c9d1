"""What every packing of 4-bit weights needs: its description, and checks of the tensors that it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vila.core.errors import LayoutError
from vila.kernels.int4_layout import Int4Weight, check_group

Packed = dict[str, Tensor]
WORD = 8
"""Codes in a word of 32 bits."""


@dataclass(frozen=True)
class Int4Format:
    """One foreign packing. `tensors` are the names that `pack` gives and `unpack` needs; both raise LayoutError."""

    name: str
    tensors: tuple[str, ...]
    pack: Callable[[Int4Weight], Packed]
    unpack: Callable[[Mapping[str, Tensor], int], Int4Weight]


def padded_words(num_inputs: int, group_size: int) -> int:
    """Words of eight groups that a row of zeros takes in gemv and TinyChat files: whole pairs at G=64, fours at G=32.

    Raises LayoutError for group sizes that these files do not know.
    """
    check_group(num_inputs, group_size)
    unit = 1 if group_size >= 128 else {64: 2, 32: 4}.get(group_size, 0)
    if not unit:
        raise LayoutError(f"gemv and tinychat files have groups of 32, 64, 128 and more, not {group_size}")
    return -(-num_inputs // (group_size * WORD * unit)) * unit


def half_scales(scales: Tensor) -> Tensor:
    """Scales as float16, what most packings store. Raises LayoutError when one does not fit."""
    half = scales.to(torch.float16)
    if not bool(half.isfinite().all()):
        raise LayoutError("a scale does not fit float16, which this packing stores; quantize with dtype=torch.float16")
    return half


def as_words(packed: Tensor, kind: torch.dtype = torch.int32) -> Tensor:
    """Bytes [..., n] as little-endian words [..., n / size of `kind`]."""
    return packed.contiguous().flatten().view(kind).reshape(*packed.shape[:-1], -1)


def as_bytes(words: Tensor) -> Tensor:
    """The inverse of `as_words`."""
    return words.contiguous().flatten().view(torch.uint8).reshape(*words.shape[:-1], -1)


def widen(rows: Tensor, width: int) -> Tensor:
    """[N, groups] to [N, width], zeros on the right."""
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))


def check_divides(what: str, size: int, unit: int) -> None:
    """Raises LayoutError unless `unit` divides `size`."""
    if size % unit:
        raise LayoutError(f"{what}: {size} is no multiple of {unit}")


def take(tensors: Mapping[str, Tensor], name: str, wanted: Sequence[str]) -> list[Tensor]:
    """The tensors of one weight, in the wanted order. Raises LayoutError naming those that are missing."""
    missing = [key for key in wanted if key not in tensors]
    if missing:
        raise LayoutError(
            f"{name} weight lacks {', '.join(missing)} (found: {', '.join(sorted(tensors)) or 'nothing'})"
        )
    return [tensors[key] for key in wanted]


def expect(name: str, key: str, tensor: Tensor, kind: torch.dtype | None, shape: tuple[int | None, ...]) -> None:
    """Raises LayoutError for another type or shape; `kind` None is any floating type, None in `shape` any size."""
    fits = tensor.dim() == len(shape) and all(
        want is None or want == size for want, size in zip(shape, tensor.shape, strict=True)
    )
    if fits and (tensor.dtype == kind or (kind is None and tensor.is_floating_point())):
        return
    wanted = f"{kind or 'floating'} [{', '.join('any' if size is None else str(size) for size in shape)}]"
    raise LayoutError(
        f"{name} {key} is {tensor.dtype} {list(tensor.shape)}, expected {wanted}: wrong group size or packing?"
    )
