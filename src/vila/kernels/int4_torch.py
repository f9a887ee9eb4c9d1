"""The product with a 4-bit weight in plain torch: what every other backend is held against, and runs on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vila.kernels.int4_layout import Int4Weight, dequantize

# M rows  I inputs  O outputs

# Values of a weight that exist at once outside their 4 bits; 2**22 are about 30 MB with what unpacking needs.
PIECE_VALUES = 2**22


class TorchProduct:
    """Rounds the weight to the type of the activations, a piece of the outputs at a time, and multiplies."""

    name = "torch"

    def missing(self, device: torch.device, dtype: torch.dtype) -> str:
        """Nothing: it runs everywhere."""
        return ""

    def refusal(self, num_inputs: int, num_outputs: int, group_size: int) -> str:
        """Nothing: it takes every shape."""
        return ""

    def most_rows(self, device: torch.device) -> int | None:
        """None: this is the reference."""
        return None

    def prepare(self, weight: Int4Weight, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Nothing: it reads the storage itself."""
        return ()

    def multiply(self, x_MI: Tensor, operands: tuple[Tensor, ...], group_size: int, bias_O: Tensor | None) -> Tensor:
        """`x @ dequantize(weight).T + bias` [M, O] in the type of `x`; operands are codes, scales and zeros."""
        codes, scales, zeros = operands
        weight = Int4Weight(codes, scales, zeros, group_size)
        step = max(1, PIECE_VALUES // weight.num_inputs)
        pieces = [
            F.linear(x_MI, dequantize(weight.rows(start, start + step), x_MI.dtype))
            for start in range(0, weight.num_outputs, step)
        ]
        y_MO = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
        return y_MO if bias_O is None else y_MO + bias_O.to(y_MO.dtype)


PRODUCT = TorchProduct()
