"""INT4 matmul with PyTorch's own kernels, on CPU and CUDA.

The kernels need the codes in their own order, so a layer stores them twice, and scales in the activation dtype, which
costs accuracy in bfloat16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vila.kernels.int4 import BITS, MAX_CODE, Int4Weight, unpack_nibbles

# M activation rows  I inputs  O outputs  G group size

_GROUP_SIZES = (32, 64, 128, 256)
_TYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16,),
}
# The kernels need full tiles of outputs; padded rows of zeros are removed from the result.
_OUTPUT_TILE = 16
_INNER_TILES = 2
# The kernels compute (code - 8) * scale + offset.
_MIDDLE = 8


class AtenBackend:
    """`_weight_int4pack_mm` of PyTorch; on CUDA only in bfloat16 and from compute capability 8.0."""

    name = "aten"

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str:
        """Return why the kernels cannot run on a device with an activation dtype; empty if they can."""
        types = _TYPES.get(device.type)
        if types is None:
            return f"PyTorch has no INT4 kernel on {device.type}"
        if dtype not in types:
            return f"PyTorch's INT4 kernel on {device.type} needs {' or '.join(map(str, types))}, not {dtype}"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return "PyTorch's INT4 kernel needs compute capability 8.0 or higher"
        return ""

    def unsupported(self, num_inputs: int, num_outputs: int, group_size: int) -> str:
        """Return why the kernels do not support a weight's shape; empty if they do."""
        if group_size not in _GROUP_SIZES:
            return f"group size {group_size}; PyTorch's INT4 kernel supports {', '.join(map(str, _GROUP_SIZES))}"
        return ""

    def max_rows(self, device: torch.device) -> int | None:
        """Return 4 on a CPU, where the kernel reads the weight once per row."""
        return 4 if device.type == "cpu" else None

    def prepare(self, weight: Int4Weight, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return the codes in the kernels' order, and scales and offsets [I/G, O, 2] in `dtype`."""
        padding = -weight.num_outputs % _OUTPUT_TILE
        codes, scales, zeros = (F.pad(part, (0, 0, 0, padding)) for part in (weight.codes, weight.scales, weight.zeros))
        if codes.device.type == "cpu":
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_nibbles(codes).int(), _INNER_TILES)
        else:
            # On CUDA the even input of a byte is in the high nibble.
            swapped = ((codes & MAX_CODE) << BITS) | (codes >> BITS)
            packed = torch.ops.aten._convert_weight_to_int4pack(swapped, _INNER_TILES)
        wide = scales.float()
        offsets = (_MIDDLE - zeros.float()) * wide
        return packed, torch.stack((wide, offsets), dim=-1).transpose(0, 1).to(dtype).contiguous()

    def multiply(self, x_MI: Tensor, operands: tuple[Tensor, ...], group_size: int, bias_O: Tensor | None) -> Tensor:
        """Return `x @ weight.T + bias` in the dtype of `x`, [M, O] or wider if outputs are padded to a full tile."""
        packed, scales_and_offsets = operands
        if x_MI.shape[0] == 0:
            return x_MI.new_empty(0, scales_and_offsets.shape[1])
        ops = torch.ops.aten
        kernel = ops._weight_int4pack_mm_for_cpu if x_MI.device.type == "cpu" else ops._weight_int4pack_mm
        y_MO: Tensor = kernel(x_MI.contiguous(), packed, group_size, scales_and_offsets)
        if bias_O is None:
            return y_MO
        return y_MO[:, : bias_O.shape[0]] + bias_O.to(y_MO.dtype)


BACKEND = AtenBackend()
