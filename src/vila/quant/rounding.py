"""What INT4 rounding leaves of a weight, as the search tries it thousands of times: nothing is packed or stored."""

from __future__ import annotations

from torch import Tensor

# O output channels  I input channels  G groups of a row

_TINY = 1e-5


def fake_quantize(weight_OI: Tensor, group_size: int, symmetric: bool = False) -> Tensor:
    """A new tensor: the weight after INT4 rounding, in its own number type.

    Asymmetric: codes 0 to 15 between the least and the greatest value of a group, which need not enclose 0.
    Symmetric: codes -8 to 7, the greatest magnitude of a group at 7. Rounding is half to even. This is the arithmetic
    of the storage, `vila.kernels.int4_layout.quantize`, but for the number type of the scales.
    """
    groups = weight_OI.unflatten(-1, (-1, group_size))
    if symmetric:
        scale = groups.abs().amax(-1, keepdim=True).clamp_(min=_TINY).div_(7)
        return groups.div(scale).round_().clamp_(-8, 7).mul_(scale).flatten(-2)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low).clamp_(min=_TINY).div_(15)
    zero = low.div_(scale).round_().neg_().clamp_(0, 15)
    return groups.div(scale).round_().add_(zero).clamp_(0, 15).sub_(zero).mul_(scale).flatten(-2)
