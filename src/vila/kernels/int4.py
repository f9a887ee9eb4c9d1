"""A Linear whose weight is stored in 4 bits, alone or as several that share an input and are multiplied at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vila.core.errors import ConfigError, LayoutError

# --- int4_layout
# The one storage of 4-bit weights: codes, scales and zeros, the published rounding, and the way back.


# O outputs  I inputs  G inputs of a group

BITS = 4
MAX_CODE = 2**BITS - 1
SYMMETRIC_ZERO = 8
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

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
        check_group_size(self.num_inputs, self.group_size)
        groups = [self.num_outputs, self.num_inputs // self.group_size]
        if list(self.scales.shape) != groups or self.scales.dtype not in SCALE_DTYPES:
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


def check_group_size(num_inputs: int, group_size: int) -> None:
    """Raises LayoutError unless whole groups, of whole bytes, fill the inputs; names group sizes that would fit."""
    if group_size >= 2 and group_size % 2 == 0 and num_inputs >= group_size and num_inputs % group_size == 0:
        return
    fitting = [size for size in (16, 32, 64, 128, 256) if num_inputs >= size and num_inputs % size == 0]
    remedy = f"; group sizes that fit: {', '.join(map(str, fitting))}" if fitting else ""
    raise LayoutError(f"{num_inputs} inputs cannot be cut into groups of {group_size}{remedy}")


def pack_nibbles(codes_OI: Tensor) -> Tensor:
    """Codes 0..15 [..., I] to bytes [..., I/2]; the even one of two neighbours takes the low nibble.

    Raises LayoutError when I is odd or the codes are not uint8.
    """
    if codes_OI.dtype != torch.uint8 or codes_OI.shape[-1] % 2:
        raise LayoutError(f"only an even number of uint8 codes packs, not {codes_OI.dtype} {list(codes_OI.shape)}")
    return codes_OI[..., 0::2] | (codes_OI[..., 1::2] << BITS)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Bytes [..., I/2] to codes 0..15 [..., I]: the inverse of `pack_nibbles`."""
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
    check_group_size(weight_OI.shape[-1], group_size)
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
    return Int4Weight(pack_nibbles(codes.flatten(-2).to(torch.uint8)), kept, zeros.to(torch.uint8), group_size)


def dequantize(weight: Int4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values [O, I], rounded once to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    codes = unpack_nibbles(weight.codes).unflatten(-1, (-1, weight.group_size)).to(wide)
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


# --- int4_torch
# The product with a 4-bit weight in plain torch: what every other backend is held against, and runs on any device.


# M rows  I inputs  O outputs

# Values of a weight that exist at once outside their 4 bits; 2**22 are about 30 MB with what unpacking needs.
MAX_DEQUANTIZED_VALUES = 2**22


class TorchBackend:
    """Rounds the weight to the type of the activations, a piece of the outputs at a time, and multiplies."""

    name = "torch"

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str:
        """Nothing: it runs everywhere."""
        return ""

    def unsupported(self, num_inputs: int, num_outputs: int, group_size: int) -> str:
        """Nothing: it takes every shape."""
        return ""

    def max_rows(self, device: torch.device) -> int | None:
        """None: this is the reference."""
        return None

    def prepare(self, weight: Int4Weight, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Nothing: it reads the storage itself."""
        return ()

    def multiply(self, x_MI: Tensor, operands: tuple[Tensor, ...], group_size: int, bias_O: Tensor | None) -> Tensor:
        """`x @ dequantize(weight).T + bias` [M, O] in the type of `x`; operands are codes, scales and zeros."""
        codes, scales, zeros = operands
        weight = Int4Weight(codes, scales, zeros, group_size)
        step = max(1, MAX_DEQUANTIZED_VALUES // weight.num_inputs)
        pieces = [
            F.linear(x_MI, dequantize(weight.rows(start, start + step), x_MI.dtype))
            for start in range(0, weight.num_outputs, step)
        ]
        y_MO = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
        return y_MO if bias_O is None else y_MO + bias_O.to(y_MO.dtype)


BACKEND = TorchBackend()


# M rows  I inputs  O outputs  G inputs of a group

_STORED = ("codes", "scales", "zeros")
_BITS_TYPE = {2: torch.int16, 4: torch.int32}


class Int4Backend(Protocol):
    """One way to multiply with a 4-bit weight; `backends` names those that exist."""

    @property
    def name(self) -> str:
        """As users write it."""

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why it cannot run on that device with activations of that type; empty when it can."""

    def unsupported(self, num_inputs: int, num_outputs: int, group_size: int) -> str:
        """Why it cannot take a weight of that shape; empty when it can."""

    def max_rows(self, device: torch.device) -> int | None:
        """Above so many rows the reference is faster there; None for never."""

    def prepare(self, weight: Int4Weight, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What `multiply` reads, made once; empty when it reads codes, scales and zeros themselves."""

    def multiply(self, x_MI: Tensor, operands: tuple[Tensor, ...], group_size: int, bias_O: Tensor | None) -> Tensor:
        """`x @ weight.T + bias` [M, O] in the type of `x`; more columns than O are cut off by the caller."""


class Int4Linear(nn.Module):
    """`y = x @ dequantize(weight).T + bias` for x [..., I], in the type of x.

    The state holds `codes`, `scales` and `zeros` of an Int4Weight, and `bias` [O] where there is one; what a backend
    prepares for itself is not saved. `splits` are the outputs of the Linears that a fused layer stands for. Casting the
    module to another floating type leaves the scales as they are: rounding them again would change the weight.
    Raises LayoutError when groups do not fill the inputs or the splits do not add up to the outputs.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group_size: int = 128,
        bias: bool = False,
        splits: Sequence[int] = (),
        scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_group_size(in_features, group_size)
        if splits and sum(splits) != out_features:
            raise LayoutError(f"splits {tuple(splits)} do not add up to {out_features} outputs")
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        self.splits = tuple(splits) or (out_features,)
        groups = in_features // group_size
        self.register_buffer("codes", torch.zeros(out_features, in_features // 2, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.zeros(out_features, groups, dtype=scale_dtype, device=device))
        self.register_buffer("zeros", torch.zeros(out_features, groups, dtype=torch.uint8, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=scale_dtype, device=device) if bias else None)
        self._product: Int4Backend = BACKEND
        self._dtype = scale_dtype
        self._operands: tuple[str, ...] = _STORED

    @classmethod
    def from_weight(cls, weight: Int4Weight, bias: Tensor | None = None, splits: Sequence[int] = ()) -> Int4Linear:
        """A layer around an existing weight, whose tensors it shares."""
        layer = cls(
            weight.num_inputs,
            weight.num_outputs,
            group_size=weight.group_size,
            bias=bias is not None,
            splits=splits,
            scale_dtype=weight.scales.dtype,
            device="meta",
        )
        layer.codes, layer.scales, layer.zeros = weight.codes, weight.scales, weight.zeros
        layer.bias = None if bias is None else bias.detach()
        return layer

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, group_size: int, *, symmetric: bool = False, dtype: torch.dtype = torch.float16
    ) -> Int4Linear:
        """A Linear rounded to 4 bits as `quantize` does; the bias keeps its type."""
        return cls.from_weight(quantize(linear.weight, group_size, symmetric=symmetric, dtype=dtype), linear.bias)

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """An ordinary Linear with the rounded values."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(dequantize(self.weight, dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return linear

    @property
    def weight(self) -> Int4Weight:
        """The stored weight, sharing its tensors."""
        return Int4Weight(self.codes, self.scales, self.zeros, self.group_size)

    def set_weight(self, weight: Int4Weight) -> None:
        """Keep the same weight in other tensors, such as a part of a joined one, so that memory has it once."""
        self.codes, self.scales, self.zeros = weight.codes, weight.scales, weight.zeros

    @property
    def backend(self) -> str:
        """Name of the product in use; "torch" until `use` says otherwise."""
        return self._product.name

    def use_backend(self, product: Int4Backend, dtype: torch.dtype) -> None:
        """Multiply by `product` from now on, with activations of type `dtype`.

        What it prepares follows the module to another device and is made anew when other weights are loaded.
        Raises ConfigError when it cannot run here, or not with this weight.
        """
        why = product.unavailable(self.codes.device, dtype) or product.unsupported(
            self.in_features, self.out_features, self.group_size
        )
        if why:
            raise ConfigError(f"int4 backend {product.name!r}: {why}; choose another backend, or 'auto'")
        for name in set(self._operands) - set(_STORED):
            delattr(self, name)
        prepared = product.prepare(self.weight, dtype)
        for index, tensor in enumerate(prepared):
            self.register_buffer(f"prepared_{index}", tensor, persistent=False)
        self._operands = tuple(f"prepared_{index}" for index in range(len(prepared))) or _STORED
        self._product, self._dtype = product, dtype

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        x_MI = x.reshape(-1, self.in_features)
        most = self._product.max_rows(x.device)
        product, names = (self._product, self._operands) if most is None or len(x_MI) <= most else (BACKEND, _STORED)
        operands = tuple(getattr(self, name) for name in names)
        y_MO = product.multiply(x_MI, operands, self.group_size, self.bias)
        return y_MO[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """`forward`, cut into the outputs of the Linears that were fused (views)."""
        return self.forward(x).split(self.splits, dim=-1)

    def extra_repr(self) -> str:
        """Sizes, groups and backend."""
        fused = f", splits={self.splits}" if len(self.splits) > 1 else ""
        return f"{self.in_features}, {self.out_features}, group_size={self.group_size}{fused}, backend={self.backend}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int4Linear:
        kind = self.scales.dtype
        # Seen as whole numbers, the scales are moved but not cast.
        self.scales = self.scales.view(_BITS_TYPE[kind.itemsize])
        super()._apply(fn, recurse)
        self.scales = self.scales.view(kind)
        self._prepare_again()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._prepare_again()

    def _prepare_again(self) -> None:
        """What a product prepared belongs to one device and one weight; a product that cannot run now is an error."""
        if self._product is not BACKEND and self.codes.device.type != "meta":
            self.use_backend(self._product, self._dtype)


def fuse(layers: Sequence[Int4Linear]) -> Int4Linear:
    """One layer for several that share their input (q, k and v; gate and up); `split` gives their outputs back.

    Where only some have a bias the others get one of zeros. The new layer starts with the reference backend.
    Raises LayoutError when inputs, groups or scale types differ.
    """
    weight = concatenate([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers]
    given = [bias for bias in biases if bias is not None]
    joined = None
    if given:
        fills = [given[0].new_zeros(layer.out_features) for layer in layers]
        joined = torch.cat([fill if bias is None else bias for bias, fill in zip(biases, fills, strict=True)])
    return Int4Linear.from_weight(weight, joined, [width for layer in layers for width in layer.splits])


def unfuse(layer: Int4Linear) -> tuple[Int4Linear, ...]:
    """The layers that `fuse` joined, as views of its tensors; each has a bias if the fused one has."""
    parts, start = [], 0
    for width in layer.splits:
        bias = None if layer.bias is None else layer.bias[start : start + width]
        parts.append(Int4Linear.from_weight(layer.weight.rows(start, start + width), bias))
        start += width
    return tuple(parts)
