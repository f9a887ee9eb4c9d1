"""A model that is in INT4 already, as GGUF: its own codes in Q4_1, or its values in F16; nothing is rounded again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vila.export.gguf_file import Kind
from vila.kernels.int4_layout import Int4Weight, dequantize, pack, unpack
from vila.kernels.int4_packing import half_scales
from vila.model.packed import read_packed

if TYPE_CHECKING:
    from vila.export.source import Source

# O outputs  I inputs

BLOCK = 32
_KEEPS = ("f16", "q4_1")


def int4_refusals(source: Source, precision: str) -> list[str]:
    """Why the INT4 weights of a model cannot be kept in a precision; empty for a model without any."""
    held = source.checkpoint.int4
    if not held:
        return []
    if precision not in _KEEPS:
        return [f"the model is in INT4 and would be rounded again; {' and '.join(_KEEPS)} keep its values"]
    sizes = sorted({weight.group_size for weight in held.values() if weight.group_size % BLOCK})
    if precision == "q4_1" and sizes:
        return [f"groups of {sizes[0]} are no whole blocks of {BLOCK}; f16 keeps the values"]
    return []


def int4_runs(source: Source, name: str, kind: Kind) -> Iterator[Tensor]:
    """A Linear in INT4, whole: float32 values [O, I], or for Q4_1 the bytes of its blocks, uint8 [O, I / 32 * 20]."""
    for _, weight in read_packed({name: source.checkpoint.int4[name]}):
        yield q4_1_blocks(weight) if kind == Kind.Q4_1 else dequantize(weight)


def q4_1_blocks(weight: Int4Weight) -> Tensor:
    """Blocks of 32 with the weight's own codes: half scale, half -zero * scale, sixteen bytes; uint8 [O, I / 32 * 20].

    Byte j holds the inputs j (low) and j + 16. Rounding -zero * scale to a half moves values by 0.4 % of a step at
    most. Raises LayoutError for a scale that does not fit float16.
    """
    scales = half_scales(weight.scales)
    least = (-weight.zeros.float() * scales.float()).to(torch.float16)
    heads = torch.stack([scales, least], dim=-1).repeat_interleave(weight.group_size // BLOCK, dim=1)
    halves = unpack(weight.codes).unflatten(-1, (-1, 2, BLOCK // 2))
    codes = pack(halves.transpose(-1, -2).flatten(-2))
    return torch.cat([heads.contiguous().view(torch.uint8), codes], dim=-1).flatten(1)
