"""INT4 matmul in Triton: a matrix-vector kernel for up to 8 activation rows, a tiled kernel for more.

Both read `Int4Weight` as stored and unpack in registers. Products of float16 and bfloat16 activations accumulate in
float32. With TRITON_INTERPRET=1, set before this module is imported, the kernels run on a CPU, slowly, for tests.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila.kernels.int4 import Int4Weight

# M activation rows  I inputs  O outputs  G group size

VECTOR_ROWS = 8


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class VectorTile:
    """Tile of one program of the matrix-vector kernel: `outputs` rows by about `inputs` inputs."""

    outputs: int
    inputs: int = 1024
    num_warps: int = 4

    @classmethod
    def of_rows(cls, num_rows: int) -> VectorTile:
        """Return the largest tested tile that Triton 3.6 compiles for sm_90 without register spilling."""
        return cls(outputs=8 if num_rows <= 4 else 4)


@dataclass(frozen=True)
class MatrixTile:
    """Tile of one program of the tiled kernel; a step along the inputs stays within a group."""

    outputs: int = 64
    inputs: int = 64
    num_warps: int = 4
    num_stages: int = 3


@triton.jit
def _eight(x):
    """Split [A, B, C, 8] into eight tensors [A, B, C], in order; stays in registers if one thread holds all eight."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2], 2, 2, 2)))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _code(words, index: tl.constexpr):
    """Code `index` of each word as float32, by bit manipulation of 2**23, which avoids the slow integer conversion."""
    return (((words >> (4 * index)) & 0xF) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _vector_kernel(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, bias_ptr, y_ptr,
    num_rows, num_outputs,
    NUM_GROUPS: tl.constexpr, GROUP_WORDS: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    NUM_WORDS: tl.constexpr = NUM_GROUPS * GROUP_WORDS
    rows = tl.arange(0, ROWS)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    lanes = tl.arange(0, GROUP_WORDS)
    eighths = tl.arange(0, 8)
    total = tl.zeros((ROWS, OUTPUTS, GROUPS, GROUP_WORDS), dtype=tl.float32)
    for start in range(0, NUM_GROUPS, GROUPS):
        groups = start + tl.arange(0, GROUPS)
        word_index = groups[:, None] * GROUP_WORDS + lanes[None, :]
        inside = (outputs[:, None] < num_outputs) & (groups[None, :] < NUM_GROUPS)
        words = tl.load(
            words_ptr + outputs[:, None, None] * NUM_WORDS + word_index[None, :, :], mask=inside[:, :, None], other=0
        )
        group_index = outputs[:, None] * NUM_GROUPS + groups[None, :]
        scale = tl.load(scales_ptr + group_index, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(zeros_ptr + group_index, mask=inside, other=0).to(tl.float32)
        x_index = (rows[:, None, None] * NUM_WORDS + word_index[None, :, :])[:, :, :, None] * 8 + eighths
        x_inside = (rows[:, None] < num_rows) & (groups[None, :] < NUM_GROUPS)
        x = tl.load(x_ptr + x_index, mask=x_inside[:, :, None, None], other=0.0).to(tl.float32)
        x0, x1, x2, x3, x4, x5, x6, x7 = _eight(x)
        # The zero is subtracted once per word: sum (code - zero) x = sum code x - zero sum x.
        sums = ((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7))
        part = _code(words, 0)[None, :, :, :] * x0[:, None, :, :]
        part += _code(words, 1)[None, :, :, :] * x1[:, None, :, :]
        part += _code(words, 2)[None, :, :, :] * x2[:, None, :, :]
        part += _code(words, 3)[None, :, :, :] * x3[:, None, :, :]
        part += _code(words, 4)[None, :, :, :] * x4[:, None, :, :]
        part += _code(words, 5)[None, :, :, :] * x5[:, None, :, :]
        part += _code(words, 6)[None, :, :, :] * x6[:, None, :, :]
        part += _code(words, 7)[None, :, :, :] * x7[:, None, :, :]
        total += (part - zero[None, :, :, None] * sums[:, None, :, :]) * scale[None, :, :, None]
    y = tl.sum(tl.reshape(total, (ROWS, OUTPUTS, GROUPS * GROUP_WORDS)), axis=2)
    if HAS_BIAS:
        y += tl.load(bias_ptr + outputs, mask=outputs < num_outputs, other=0.0).to(tl.float32)[None, :]
    y_index = rows[:, None] * num_outputs + outputs[None, :]
    tl.store(y_ptr + y_index, y, mask=(rows[:, None] < num_rows) & (outputs[None, :] < num_outputs))


@triton.jit
def _matrix_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, y_ptr,
    num_rows, num_outputs,
    NUM_INPUTS: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    # int64, as 2**31 activation values are only 200,000 rows of 11,008.
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    row_inside = rows[:, None] < num_rows
    output_inside = outputs < num_outputs
    NUM_GROUPS: tl.constexpr = NUM_INPUTS // GROUP
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for start in range(0, NUM_INPUTS, INPUTS):
        inputs = start + tl.arange(0, INPUTS)
        pairs = start // 2 + tl.arange(0, INPUTS // 2)
        packed_index = outputs[:, None] * (NUM_INPUTS // 2) + pairs[None, :]
        packed = tl.load(codes_ptr + packed_index, mask=output_inside[:, None], other=0).to(tl.int32)
        codes = tl.interleave(packed & 0xF, packed >> 4)
        group_index = outputs * NUM_GROUPS + start // GROUP
        scale = tl.load(scales_ptr + group_index, mask=output_inside, other=0.0).to(tl.float32)
        zero = tl.load(zeros_ptr + group_index, mask=output_inside, other=0).to(tl.int32)
        x = tl.load(x_ptr + rows[:, None] * NUM_INPUTS + inputs[None, :], mask=row_inside, other=0.0)
        weight = ((codes - zero[:, None]).to(tl.float32) * scale[:, None]).to(x.dtype)
        # Triton 3.6's interpreter would multiply the bits of bfloat16 as integers.
        if WIDE:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias_ptr + outputs, mask=output_inside, other=0.0).to(tl.float32)[None, :]
    y_index = rows[:, None] * num_outputs + outputs[None, :]
    tl.store(y_ptr + y_index, total, mask=row_inside & output_inside[None, :])


def multiply_vectors(
    x_MI: Tensor, weight: Int4Weight, bias_O: Tensor | None = None, *, tile: VectorTile | None = None
) -> Tensor:
    """Return `x @ weight.T + bias` [M, O] for at most VECTOR_ROWS rows: every byte of the weight is read once."""
    num_rows, num_groups = x_MI.shape[0], weight.num_inputs // weight.group_size
    tile = tile or VectorTile.of_rows(num_rows)
    y_MO = x_MI.new_empty(num_rows, weight.num_outputs)
    groups = max(1, min(tile.inputs // weight.group_size, triton.next_power_of_2(num_groups)))
    _vector_kernel[(triton.cdiv(weight.num_outputs, tile.outputs),)](
        x_MI.contiguous(), weight.codes.flatten().view(torch.int32), weight.scales, weight.zeros,
        weight.scales if bias_O is None else bias_O, y_MO,
        num_rows, weight.num_outputs,
        NUM_GROUPS=num_groups, GROUP_WORDS=weight.group_size // 8, HAS_BIAS=bias_O is not None,
        ROWS=triton.next_power_of_2(num_rows), OUTPUTS=tile.outputs, GROUPS=groups,
        num_warps=tile.num_warps,
    )  # fmt: skip
    return y_MO


def multiply_matrix(
    x_MI: Tensor, weight: Int4Weight, bias_O: Tensor | None = None, *, tile: MatrixTile | None = None
) -> Tensor:
    """Return `x @ weight.T + bias` [M, O] for any number of rows, on tensor cores; weights are cast to x's dtype."""
    tile = tile or MatrixTile()
    num_rows = x_MI.shape[0]
    y_MO = x_MI.new_empty(num_rows, weight.num_outputs)
    rows = min(64, max(16, triton.next_power_of_2(num_rows)))
    _matrix_kernel[(triton.cdiv(num_rows, rows), triton.cdiv(weight.num_outputs, tile.outputs))](
        x_MI.contiguous(), weight.codes, weight.scales, weight.zeros,
        weight.scales if bias_O is None else bias_O, y_MO,
        num_rows, weight.num_outputs,
        NUM_INPUTS=weight.num_inputs, GROUP=weight.group_size, HAS_BIAS=bias_O is not None, WIDE=_is_interpreted(),
        ROWS=rows, OUTPUTS=tile.outputs, INPUTS=min(tile.inputs, weight.group_size),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y_MO


@torch.library.custom_op("vila::int4_triton", mutates_args=())
def _multiply(
    x_MI: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bias_O: Tensor | None, group_size: int
) -> Tensor:
    """Dispatch by number of rows; a custom operator, so that torch.compile does not trace into it."""
    weight = Int4Weight(codes.contiguous(), scales.contiguous(), zeros.contiguous(), group_size)
    if x_MI.shape[0] == 0:
        return x_MI.new_empty(0, weight.num_outputs)
    with torch.cuda.device_of(x_MI):
        if x_MI.shape[0] <= VECTOR_ROWS:
            return multiply_vectors(x_MI, weight, bias_O)
        return multiply_matrix(x_MI, weight, bias_O)


@_multiply.register_fake
def _(x_MI: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bias_O: Tensor | None, group_size: int) -> Tensor:
    return x_MI.new_empty(x_MI.shape[0], codes.shape[0])


class TritonBackend:
    """Our kernels, on CUDA from compute capability 8.0, or on a CPU under Triton's interpreter."""

    name = "triton"

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str:
        """Return why the kernels cannot run on a device with an activation dtype; empty if they can."""
        interpreted = _is_interpreted()
        if dtype not in (torch.float16, torch.bfloat16) and not (interpreted and dtype == torch.float32):
            return f"the Triton kernels need float16 or bfloat16 activations, not {dtype}"
        if device.type == "cpu" and interpreted:
            return ""
        if device.type != "cuda":
            return f"the Triton kernels need CUDA, not {device.type} (TRITON_INTERPRET=1 interprets them, for tests)"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "the Triton kernels need compute capability 8.0 or higher"
        return ""

    def unsupported(self, num_inputs: int, num_outputs: int, group_size: int) -> str:
        """Return why the kernels do not support a weight's shape; empty if they do."""
        if group_size < 16 or group_size & (group_size - 1):
            return f"group size {group_size}; the Triton kernels support powers of two from 16"
        return ""

    def max_rows(self, device: torch.device) -> int | None:
        """Return None: there is a kernel for many rows."""
        return None

    def prepare(self, weight: Int4Weight, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return no tensors: the kernels use the stored ones."""
        return ()

    def multiply(self, x_MI: Tensor, operands: tuple[Tensor, ...], group_size: int, bias_O: Tensor | None) -> Tensor:
        """Return `x @ weight.T + bias` [M, O] in the dtype of `x`; operands are codes, scales and zeros."""
        codes, scales, zeros = operands
        y_MO: Tensor = _multiply(x_MI, codes, scales, zeros, bias_O, group_size)
        return y_MO


BACKEND = TritonBackend()
