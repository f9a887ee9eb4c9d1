"""The one storage of 4-bit weights: codes, scales and zeros, the published rounding, and the way back.

Other programs' packings are in `int4_formats`; products with such a weight are in `int4_linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vila.core.errors import LayoutError

# O outputs  I inputs  G inputs of a group

BITS = 4
MAX_CODE = 2**BITS - 1
SYMMETRIC_ZERO = 8
SCALE_TYPES = (torch.float16, torch.bfloat16, torch.float32)

# The published code's floor of a group's range, which keeps the scale of a constant group above zero.
_SMALLEST_RANGE = 1e-5


@dataclass(frozen=True)
class Int4Weight:
    """A weight [O, I] in 4 bits: value = (code - zero) * scale, with a scale and a zero for G neighbouring inputs.

    codes:      uint8 [O, I/2], the codes of two neighbouring inputs a byte, the even input in the low nibble.
    scales:     float16, bfloat16 or float32 [O, I/G].
    zeros:      uint8 [O, I/G], 0..15.
    group_size: G.

    Raises LayoutError when shapes or types do not belong together.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int

    def __post_init__(self) -> None:
        if self.codes.dim() != 2 or self.codes.dtype != torch.uint8:
            raise LayoutError(f"4-bit codes must be uint8 [O, I/2], not {self.codes.dtype} {list(self.codes.shape)}")
        check_group(self.num_inputs, self.group_size)
        groups = [self.num_outputs, self.num_inputs // self.group_size]
        if list(self.scales.shape) != groups or self.scales.dtype not in SCALE_TYPES:
            found = f"{self.scales.dtype} {list(self.scales.shape)}"
            raise LayoutError(f"scales of groups of {self.group_size} must be floating {groups}, not {found}")
        if list(self.zeros.shape) != groups or self.zeros.dtype != torch.uint8:
            found = f"{self.zeros.dtype} {list(self.zeros.shape)}"
            raise LayoutError(f"zeros of groups of {self.group_size} must be uint8 {groups}, not {found}")

    @property
    def num_outputs(self) -> int:
        """O."""
        return self.codes.shape[0]

    @property
    def num_inputs(self) -> int:
        """I."""
        return self.codes.shape[1] * 2

    @property
    def num_bytes(self) -> int:
        """Bytes of codes, scales and zeros together: what a product with this weight has to read."""
        return sum(part.nbytes for part in (self.codes, self.scales, self.zeros))

    def rows(self, start: int, end: int) -> Int4Weight:
        """The outputs `start` to `end`, as views."""
        codes, scales, zeros = (part[start:end] for part in (self.codes, self.scales, self.zeros))
        return Int4Weight(codes, scales, zeros, self.group_size)

    def to(self, device: torch.device | str) -> Int4Weight:
        """The same weight on another device."""
        codes, scales, zeros = (part.to(device) for part in (self.codes, self.scales, self.zeros))
        return replace(self, codes=codes, scales=scales, zeros=zeros)


def check_group(num_inputs: int, group_size: int) -> None:
    """Raises LayoutError unless whole groups, of whole bytes, fill the inputs; names group sizes that would fit."""
    if group_size >= 2 and group_size % 2 == 0 and num_inputs >= group_size and num_inputs % group_size == 0:
        return
    fitting = [size for size in (16, 32, 64, 128, 256) if num_inputs >= size and num_inputs % size == 0]
    remedy = f"; group sizes that fit: {', '.join(map(str, fitting))}" if fitting else ""
    raise LayoutError(f"{num_inputs} inputs cannot be cut into groups of {group_size}{remedy}")


def pack(codes_OI: Tensor) -> Tensor:
    """Codes 0..15 [..., I] to bytes [..., I/2]; the even one of two neighbours takes the low nibble.

    Raises LayoutError when I is odd or the codes are not uint8.
    """
    if codes_OI.dtype != torch.uint8 or codes_OI.shape[-1] % 2:
        raise LayoutError(f"only an even number of uint8 codes packs, not {codes_OI.dtype} {list(codes_OI.shape)}")
    return codes_OI[..., 0::2] | (codes_OI[..., 1::2] << BITS)


def unpack(packed: Tensor) -> Tensor:
    """Bytes [..., I/2] to codes 0..15 [..., I]: the inverse of `pack`."""
    return torch.stack((packed & MAX_CODE, packed >> BITS), dim=-1).flatten(-2)


def quantize(
    weight_OI: Tensor, group_size: int, *, symmetric: bool = False, dtype: torch.dtype = torch.float16
) -> Int4Weight:
    """Round a weight to 4 bits, each group by its own range.

    Asymmetric, the published rounding: scale = max(max - min, 1e-5) / 15, zero = -round(min / scale) and
    code = round(w / scale) + zero, both cut to 0..15. Symmetric: scale = max |w| / 7, codes -8..7 stored with zero 8.
    The range need not contain 0: a group that lies wholly above it loses its top.

    The arithmetic is in the weight's own type and halves go to the even neighbour, as in the original; scales are
    rounded to `dtype` first, so that codes and stored scales agree.
    Raises LayoutError when groups do not fill the inputs, or a scale is not finite in `dtype` (NaN, infinity).
    """
    check_group(weight_OI.shape[-1], group_size)
    groups = weight_OI.detach().unflatten(-1, (-1, group_size))
    if symmetric:
        scales = groups.abs().amax(-1).clamp(min=_SMALLEST_RANGE) / (SYMMETRIC_ZERO - 1)
    else:
        low, high = groups.aminmax(dim=-1)
        scales = (high - low).clamp(min=_SMALLEST_RANGE) / MAX_CODE
    kept = scales.to(dtype)
    if not bool(kept.isfinite().all()):
        raise LayoutError(
            f"a weight {list(weight_OI.shape)} has values that are not finite in {dtype}; repair the model"
        )
    scales = kept.to(groups.dtype)
    zeros = torch.full_like(scales, SYMMETRIC_ZERO)
    if not symmetric:
        zeros = (low / scales).round_().neg_().clamp_(0, MAX_CODE)
    codes = (groups / scales.unsqueeze(-1)).round_().add_(zeros.unsqueeze(-1)).clamp_(0, MAX_CODE)
    return Int4Weight(pack(codes.flatten(-2).to(torch.uint8)), kept, zeros.to(torch.uint8), group_size)


def dequantize(weight: Int4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values [O, I], rounded once to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    codes = unpack(weight.codes).unflatten(-1, (-1, weight.group_size)).to(wide)
    return (codes.sub_(weight.zeros.unsqueeze(-1)).mul_(weight.scales.unsqueeze(-1))).flatten(-2).to(dtype)


def concatenate(weights: Sequence[Int4Weight]) -> Int4Weight:
    """Weights of the same inputs, groups and scale type, one after the other along their outputs.

    Raises LayoutError when they differ in one of these.
    """
    kinds = {(weight.num_inputs, weight.group_size, weight.scales.dtype) for weight in weights}
    if len(kinds) != 1:
        found = ", ".join(f"{inputs} inputs in groups of {size} with {kind} scales" for inputs, size, kind in kinds)
        raise LayoutError(f"only 4-bit weights of one kind can be joined, not {found or 'none'}")
    return Int4Weight(
        torch.cat([weight.codes for weight in weights]),
        torch.cat([weight.scales for weight in weights]),
        torch.cat([weight.zeros for weight in weights]),
        weights[0].group_size,
    )
