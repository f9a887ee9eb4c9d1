"""A Linear whose weight is stored in 4 bits, alone or as several that share an input and are multiplied at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vila.core.errors import ConfigError, LayoutError
from vila.kernels.int4_layout import Int4Weight, check_group, concatenate, dequantize, quantize
from vila.kernels.int4_torch import PRODUCT as REFERENCE

# M rows  I inputs  O outputs  G inputs of a group

_STORED = ("codes", "scales", "zeros")
_BITS_TYPE = {2: torch.int16, 4: torch.int32}


class Int4Product(Protocol):
    """One way to multiply with a 4-bit weight; `backends` names those that exist."""

    @property
    def name(self) -> str:
        """As users write it."""

    def missing(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why it cannot run on that device with activations of that type; empty when it can."""

    def refusal(self, num_inputs: int, num_outputs: int, group_size: int) -> str:
        """Why it cannot take a weight of that shape; empty when it can."""

    def most_rows(self, device: torch.device) -> int | None:
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
        check_group(in_features, group_size)
        if splits and sum(splits) != out_features:
            raise LayoutError(f"splits {tuple(splits)} do not add up to {out_features} outputs")
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        self.splits = tuple(splits) or (out_features,)
        groups = in_features // group_size
        self.register_buffer("codes", torch.zeros(out_features, in_features // 2, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.zeros(out_features, groups, dtype=scale_dtype, device=device))
        self.register_buffer("zeros", torch.zeros(out_features, groups, dtype=torch.uint8, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=scale_dtype, device=device) if bias else None)
        self._product: Int4Product = REFERENCE
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

    def hold(self, weight: Int4Weight) -> None:
        """Keep the same weight in other tensors, such as a part of a joined one, so that memory has it once."""
        self.codes, self.scales, self.zeros = weight.codes, weight.scales, weight.zeros

    @property
    def backend(self) -> str:
        """Name of the product in use; "torch" until `use` says otherwise."""
        return self._product.name

    def use(self, product: Int4Product, dtype: torch.dtype) -> None:
        """Multiply by `product` from now on, with activations of type `dtype`.

        What it prepares follows the module to another device and is made anew when other weights are loaded.
        Raises ConfigError when it cannot run here, or not with this weight.
        """
        why = product.missing(self.codes.device, dtype) or product.refusal(
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
        most = self._product.most_rows(x.device)
        product, names = (self._product, self._operands) if most is None or len(x_MI) <= most else (REFERENCE, _STORED)
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
        if self._product is not REFERENCE and self.codes.device.type != "meta":
            self.use(self._product, self._dtype)


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
