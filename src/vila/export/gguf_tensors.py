"""Tensors of GGUF files: encoding of float32 rows, INT4 codes copied to Q4_1, writing in chunks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from torch import Tensor

from vila.core.errors import LayoutError
from vila.export.source import ExportSource
from vila.kernels.int4 import Int4Weight, dequantize, pack_nibbles, unpack_nibbles
from vila.kernels.packings import half_scales
from vila.model.int4_weights import read_packed

TensorType = GGMLQuantizationType
Describe = Callable[[GGUFWriter], None]


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to be written.

    chunks: returns its rows in chunks, float32, or uint8 for data that is encoded as `type` already.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    chunks: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        values, size = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // values * size

    def tofile(self, stream: BinaryIO) -> None:
        """Write all values; GGUFWriter uses only `nbytes` and `tofile` of an array.

        Raises LayoutError for a value that is not finite in float16.
        """
        written = 0
        for chunk in self.chunks():
            data = chunk.numpy() if chunk.dtype == torch.uint8 else encode(chunk, self.type, self.name)
            stream.write(data.data)
            written += data.nbytes
        if written != self.nbytes:
            raise RuntimeError(f"{self.name}: wrote {written} bytes, declared {self.nbytes}")


def encode(rows: Tensor, type_: TensorType, name: str) -> np.ndarray[Any, Any]:
    """Encode float32 rows as a tensor type. Raises LayoutError for a value that is not finite in float16."""
    if type_ == TensorType.F32:
        return np.ascontiguousarray(rows.float().numpy())
    half = rows.to(torch.float16)
    if not bool(half.isfinite().all()):
        raise LayoutError("has values that are not finite in float16", field=name, hint="repair the model")
    if type_ == TensorType.F16:
        return np.ascontiguousarray(half.numpy())
    blocks: np.ndarray[Any, Any] = quantize(np.ascontiguousarray(rows.float().numpy()), type_)
    return np.ascontiguousarray(blocks)


def choose_type(wanted: TensorType, shape: Sequence[int]) -> TensorType:
    """Return `wanted` for matrices whose rows are whole blocks of it, F16 for other matrices, F32 for vectors."""
    if len(shape) < 2:
        return TensorType.F32
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else TensorType.F16


def write_gguf(path: Path, architecture: str, describe: Describe, tensors: Sequence[GgufTensor]) -> None:
    """Write a file, holding one chunk of rows in memory. describe: adds the metadata."""
    writer = GGUFWriter(path, architecture)
    try:
        describe(writer)
        writer.add_quantization_version(2)
        for tensor in tensors:
            # With an explicit raw_dtype, GGUFWriter takes the shape as that of the values.
            half = np.dtype(np.float16)
            writer.add_tensor_info(tensor.name, tensor.shape, half, tensor.nbytes, raw_dtype=tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor)  # type: ignore[arg-type]  # duck typing: nbytes and tofile
    finally:
        writer.close()


# INT4 models: their codes are copied to Q4_1, or their values written as F16, without another quantization.

# O outputs  I inputs

BLOCK = 32
_KEEPS = ("f16", "q4_1")


def kept_int4_problems(source: ExportSource, precision: str) -> list[str]:
    """Return why the INT4 weights of a model cannot be stored in a precision without quantizing them again."""
    held = source.int4
    if not held:
        return []
    if precision not in _KEEPS:
        return [f"the INT4 model would be quantized again; use {' or '.join(_KEEPS)}"]
    sizes = sorted({weight.group_size for weight in held.values() if weight.group_size % BLOCK})
    if precision == "q4_1" and sizes:
        return [f"group size {sizes[0]} is not a multiple of {BLOCK}; use f16"]
    return []


def int4_chunks(source: ExportSource, name: str, type_: TensorType) -> Iterator[Tensor]:
    """Yield an INT4 Linear in one chunk: float32 [O, I], or encoded as Q4_1, uint8 [O, I / 32 * 20]."""
    for _, weight in read_packed({name: source.int4[name]}):
        yield q4_1_blocks(weight) if type_ == TensorType.Q4_1 else dequantize(weight)


def q4_1_blocks(weight: Int4Weight) -> Tensor:
    """Encode INT4 codes as Q4_1 blocks of 32 weights, uint8 [O, I / 32 * 20].

    A block is a float16 scale, a float16 minimum -zero * scale, and 16 bytes; byte j has inputs j (low) and j + 16.
    Rounding the minimum to float16 changes values by at most 0.4 % of a quantization step.
    Raises LayoutError for a scale that is not finite in float16.
    """
    scales = half_scales(weight.scales)
    minimum = (-weight.zeros.float() * scales.float()).to(torch.float16)
    heads = torch.stack([scales, minimum], dim=-1).repeat_interleave(weight.group_size // BLOCK, dim=1)
    halves = unpack_nibbles(weight.codes).unflatten(-1, (-1, 2, BLOCK // 2))
    codes = pack_nibbles(halves.transpose(-1, -2).flatten(-2))
    return torch.cat([heads.contiguous().view(torch.uint8), codes], dim=-1).flatten(1)
