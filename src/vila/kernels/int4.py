"""INT4 weights: storage and rounding (`Int4Weight`), the layer (`Int4Linear`), backend protocol, reference backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vila.core.errors import ConfigError, LayoutError
from vila.kernels.group_size import check_group_size

# M activation rows  O outputs  I inputs  G group size

BITS = 4
MAX_CODE = 2**BITS - 1
SYMMETRIC_ZERO = 8
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Lower limit of a group's range in the AWQ code; keeps the scale of a constant group above zero.
_SMALLEST_RANGE = 1e-5


@dataclass(frozen=True)
class Int4Weight:
    """A 4-bit weight [O, I]: value = (code - zero) * scale, with one scale and zero per group of G neighbouring inputs.

    codes:      uint8 [O, I/2], two neighbouring inputs per byte, the even input in the low nibble.
    scales:     float16, bfloat16 or float32 [O, I/G].
    zeros:      uint8 [O, I/G], 0..15.
    group_size: G.

    Raises LayoutError for inconsistent shapes or dtypes.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int

    def __post_init__(self) -> None:
        if self.codes.dim() != 2 or self.codes.dtype != torch.uint8:
            raise _mismatch("codes", self.codes, "uint8 [O, I/2]")
        check_group_size(self.num_inputs, self.group_size)
        groups = [self.num_outputs, self.num_inputs // self.group_size]
        if list(self.scales.shape) != groups or self.scales.dtype not in SCALE_DTYPES:
            raise _mismatch("scales", self.scales, f"a floating-point dtype and shape {groups}")
        if list(self.zeros.shape) != groups or self.zeros.dtype != torch.uint8:
            raise _mismatch("zeros", self.zeros, f"uint8 {groups}")

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
        """Total size of codes, scales and zeros: the memory traffic of a matmul with this weight."""
        return sum(part.nbytes for part in (self.codes, self.scales, self.zeros))

    def rows(self, start: int, end: int) -> Int4Weight:
        """Return the outputs `start` to `end`, as views."""
        codes, scales, zeros = (part[start:end] for part in (self.codes, self.scales, self.zeros))
        return Int4Weight(codes, scales, zeros, self.group_size)

    def to(self, device: torch.device | str) -> Int4Weight:
        """Return the weight on another device."""
        codes, scales, zeros = (part.to(device) for part in (self.codes, self.scales, self.zeros))
        return replace(self, codes=codes, scales=scales, zeros=zeros)


def _mismatch(name: str, tensor: Tensor, expected: str) -> LayoutError:
    return LayoutError("", field=name, value=f"{tensor.dtype} {list(tensor.shape)}", expected=expected)


def pack_nibbles(codes_OI: Tensor) -> Tensor:
    """Pack codes 0..15 [..., I] into bytes [..., I/2]; the even one of two neighbours takes the low nibble.

    Raises LayoutError if I is odd or the codes are not uint8.
    """
    if codes_OI.dtype != torch.uint8 or codes_OI.shape[-1] % 2:
        raise _mismatch("codes", codes_OI, "uint8, an even number per row")
    return codes_OI[..., 0::2] | (codes_OI[..., 1::2] << BITS)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Unpack bytes [..., I/2] to codes 0..15 [..., I]: the inverse of `pack_nibbles`."""
    return torch.stack((packed & MAX_CODE, packed >> BITS), dim=-1).flatten(-2)


def quantize(
    weight_OI: Tensor, group_size: int, *, symmetric: bool = False, dtype: torch.dtype = torch.float16
) -> Int4Weight:
    """Round a weight to 4 bits, with the range of each group.

    Asymmetric, as in the AWQ code: scale = max(max - min, 1e-5) / 15, zero = -round(min / scale) and
    code = round(w / scale) + zero, both clamped to 0..15. Symmetric: scale = max |w| / 7, codes -8..7 stored with zero
    8. A group whose range does not contain 0 is clipped at the far end.

    Computed in the weight's own dtype with round-half-to-even, as in the released code; scales are rounded to `dtype`
    first, so that codes and stored scales agree.
    Raises LayoutError if the group size does not divide the inputs, or a scale is not finite in `dtype`.
    """
    check_group_size(weight_OI.shape[-1], group_size)
    groups = weight_OI.detach().unflatten(-1, (-1, group_size))
    if symmetric:
        scales = groups.abs().amax(-1).clamp(min=_SMALLEST_RANGE) / (SYMMETRIC_ZERO - 1)
    else:
        low, high = groups.aminmax(dim=-1)
        scales = (high - low).clamp(min=_SMALLEST_RANGE) / MAX_CODE
    stored_scales = scales.to(dtype)
    if not bool(stored_scales.isfinite().all()):
        raise LayoutError(f"a weight {list(weight_OI.shape)} has values that are not finite in {dtype}")
    scales = stored_scales.to(groups.dtype)
    zeros = torch.full_like(scales, SYMMETRIC_ZERO)
    if not symmetric:
        zeros = (low / scales).round_().neg_().clamp_(0, MAX_CODE)
    codes = (groups / scales.unsqueeze(-1)).round_().add_(zeros.unsqueeze(-1)).clamp_(0, MAX_CODE)
    packed = pack_nibbles(codes.flatten(-2).to(torch.uint8))
    return Int4Weight(packed, stored_scales, zeros.to(torch.uint8), group_size)


def dequantize(weight: Int4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values [O, I], rounded once to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    codes = unpack_nibbles(weight.codes).unflatten(-1, (-1, weight.group_size)).to(wide)
    return (codes.sub_(weight.zeros.unsqueeze(-1)).mul_(weight.scales.unsqueeze(-1))).flatten(-2).to(dtype)


def concatenate(weights: Sequence[Int4Weight]) -> Int4Weight:
    """Concatenate weights along their outputs.

    Raises LayoutError unless inputs, group size and scale dtype are equal.
    """
    kinds = {(weight.num_inputs, weight.group_size, weight.scales.dtype) for weight in weights}
    if len(kinds) != 1:
        found = sorted(f"{inputs} inputs, group size {size}, {dtype} scales" for inputs, size, dtype in kinds)
        raise LayoutError("4-bit weights differ in inputs, group size or scale dtype", value=found)
    return Int4Weight(
        torch.cat([weight.codes for weight in weights]),
        torch.cat([weight.scales for weight in weights]),
        torch.cat([weight.zeros for weight in weights]),
        weights[0].group_size,
    )


MAX_DEQUANTIZED_VALUES = 2**22
"""Maximum number of values that the torch backend dequantizes at once: 2**22 need about 30 MB."""


class TorchBackend:
    """Reference backend for every device: dequantizes a chunk of outputs at a time and multiplies."""

    name = "torch"

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str:
        """Return an empty string: it is always available."""
        return ""

    def unsupported(self, num_inputs: int, num_outputs: int, group_size: int) -> str:
        """Return an empty string: every shape is supported."""
        return ""

    def max_rows(self, device: torch.device) -> int | None:
        """Return None: there is no limit."""
        return None

    def prepare(self, weight: Int4Weight, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return no tensors: `multiply` uses the stored ones."""
        return ()

    def multiply(self, x_MI: Tensor, operands: tuple[Tensor, ...], group_size: int, bias_O: Tensor | None) -> Tensor:
        """Return `x @ dequantize(weight).T + bias` [M, O] in the dtype of `x`; operands are codes, scales and zeros."""
        codes, scales, zeros = operands
        weight = Int4Weight(codes, scales, zeros, group_size)
        step = max(1, MAX_DEQUANTIZED_VALUES // weight.num_inputs)
        chunks = [
            F.linear(x_MI, dequantize(weight.rows(start, start + step), x_MI.dtype))
            for start in range(0, weight.num_outputs, step)
        ]
        y_MO = chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=-1)
        return y_MO if bias_O is None else y_MO + bias_O.to(y_MO.dtype)


BACKEND = TorchBackend()


_STORED = ("codes", "scales", "zeros")
_BITS_TYPE = {2: torch.int16, 4: torch.int32}


class Int4Backend(Protocol):
    """An implementation of matmul with 4-bit weights; `kernels.select` lists them."""

    @property
    def name(self) -> str:
        """Name in flags and logs."""

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str:
        """Return why the backend cannot run on a device with an activation dtype; empty if it can."""

    def unsupported(self, num_inputs: int, num_outputs: int, group_size: int) -> str:
        """Return why the backend does not support a weight's shape; empty if it does."""

    def max_rows(self, device: torch.device) -> int | None:
        """Return the number of activation rows above which the reference backend is faster; None if it never is."""

    def prepare(self, weight: Int4Weight, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return the tensors that `multiply` uses, created once; empty if it uses codes, scales and zeros."""

    def multiply(self, x_MI: Tensor, operands: tuple[Tensor, ...], group_size: int, bias_O: Tensor | None) -> Tensor:
        """Return `x @ weight.T + bias` [M, O] in the dtype of `x`; the caller drops columns beyond O."""


class Int4Linear(nn.Module):
    """`y = x @ dequantize(weight).T + bias` for x [..., I], in the dtype of x.

    The state contains `codes`, `scales` and `zeros` of an Int4Weight and, if there is one, `bias` [O]; tensors
    prepared by a backend are not saved. `splits` are the output sizes of the Linears that a fused layer replaces.
    Casting the module
    to another dtype leaves the scales unchanged: rounding them would change the weight.
    Raises LayoutError if the group size does not divide the inputs or the splits do not sum to the outputs.
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
            raise LayoutError("", field="splits", value=tuple(splits), expected=f"sizes that sum to {out_features}")
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        self.splits = tuple(splits) or (out_features,)
        groups = in_features // group_size
        self.register_buffer("codes", torch.zeros(out_features, in_features // 2, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.zeros(out_features, groups, dtype=scale_dtype, device=device))
        self.register_buffer("zeros", torch.zeros(out_features, groups, dtype=torch.uint8, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=scale_dtype, device=device) if bias else None)
        self.is_released = False
        self._backend: Int4Backend = BACKEND
        self._dtype = scale_dtype
        self._operands: tuple[str, ...] = _STORED

    @classmethod
    def from_weight(cls, weight: Int4Weight, bias: Tensor | None = None, splits: Sequence[int] = ()) -> Int4Linear:
        """Create a layer from an existing weight, sharing its tensors."""
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
        """Round a Linear to 4 bits as `quantize` does; the bias keeps its dtype."""
        return cls.from_weight(quantize(linear.weight, group_size, symmetric=symmetric, dtype=dtype), linear.bias)

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """Return a Linear with the dequantized weight."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(dequantize(self.weight, dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return linear

    @property
    def weight(self) -> Int4Weight:
        """The stored weight, sharing its tensors. Raises ConfigError after `release`."""
        self._check_held()
        return Int4Weight(self.codes, self.scales, self.zeros, self.group_size)

    def set_weight(self, weight: Int4Weight) -> None:
        """Replace the tensors by another copy of the same weight, such as a slice of a fused one, to save memory."""
        self.codes, self.scales, self.zeros = weight.codes, weight.scales, weight.zeros

    def release(self) -> None:
        """Free the tensors, of which another runtime has its own copy; the layer cannot be used or saved any more."""
        self.is_released = True
        for name in ("codes", "scales", "zeros"):
            setattr(self, name, getattr(self, name).to("meta"))

    def _check_held(self) -> None:
        if self.is_released:
            raise ConfigError(
                "the 4-bit weights of this model are held by onnxruntime only", hint="load it with backend='torch'"
            )

    @property
    def backend(self) -> str:
        """Name of the backend; "torch" until `use_backend` selects another."""
        return self._backend.name

    def use_backend(self, backend: Int4Backend, dtype: torch.dtype) -> None:
        """Select the backend, for activations of `dtype`.

        Tensors that it prepares are created again when the module moves to another device or loads other weights.
        Raises ConfigError if the backend cannot run here, or does not support this weight.
        """
        why = backend.unavailable(self.codes.device, dtype) or backend.unsupported(
            self.in_features, self.out_features, self.group_size
        )
        if why:
            raise ConfigError(why, field="int4 backend", value=backend.name, hint="choose another backend, or 'auto'")
        for name in set(self._operands) - set(_STORED):
            delattr(self, name)
        prepared = backend.prepare(self.weight, dtype)
        for index, tensor in enumerate(prepared):
            self.register_buffer(f"prepared_{index}", tensor, persistent=False)
        self._operands = tuple(f"prepared_{index}" for index in range(len(prepared))) or _STORED
        self._backend, self._dtype = backend, dtype

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        self._check_held()
        x_MI = x.reshape(-1, self.in_features)
        max_rows = self._backend.max_rows(x.device)
        in_range = max_rows is None or len(x_MI) <= max_rows
        backend, names = (self._backend, self._operands) if in_range else (BACKEND, _STORED)
        operands = tuple(getattr(self, name) for name in names)
        y_MO = backend.multiply(x_MI, operands, self.group_size, self.bias)
        return y_MO[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """`forward`, split into the outputs of the fused Linears (views)."""
        return self.forward(x).split(self.splits, dim=-1)

    def extra_repr(self) -> str:
        """Sizes, group size and backend."""
        fused = f", splits={self.splits}" if len(self.splits) > 1 else ""
        return f"{self.in_features}, {self.out_features}, group_size={self.group_size}{fused}, backend={self.backend}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int4Linear:
        dtype = self.scales.dtype
        # Viewed as integers, the scales are moved but not cast.
        self.scales = self.scales.view(_BITS_TYPE[dtype.itemsize])
        super()._apply(fn, recurse)
        self.scales = self.scales.view(dtype)
        self._prepare_again()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._prepare_again()

    def _prepare_again(self) -> None:
        """Prepare the backend's tensors for the current device and weight; raises if the backend cannot run there."""
        if self._backend is not BACKEND and self.codes.device.type != "meta":
            self.use_backend(self._backend, self._dtype)


@contextmanager
def reference_backend(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Use the reference backend for all 4-bit layers of a model within the context."""
    layers = [layer for layer in model.modules() if isinstance(layer, Int4Linear) and layer._backend is not BACKEND]
    previous = [(layer._backend, layer._dtype) for layer in layers]
    try:
        for layer in layers:
            layer.use_backend(BACKEND, dtype)
        yield
    finally:
        for layer, (backend, own_dtype) in zip(layers, previous, strict=True):
            layer.use_backend(backend, own_dtype)


def fuse(layers: Sequence[Int4Linear]) -> Int4Linear:
    """Fuse layers with a common input (q, k and v; gate and up) into one; `split` separates its outputs.

    If only some have a bias, the others get zeros. The new layer uses the reference backend.
    Raises LayoutError if inputs, group sizes or scale dtypes differ.
    """
    weight = concatenate([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers]
    first = next((bias for bias in biases if bias is not None), None)
    fused_bias = None
    if first is not None:
        pairs = zip(biases, layers, strict=True)
        fused_bias = torch.cat([first.new_zeros(layer.out_features) if bias is None else bias for bias, layer in pairs])
    return Int4Linear.from_weight(weight, fused_bias, [width for layer in layers for width in layer.splits])
