"""Writing GGUF files tensor by tensor and run by run; the `gguf` package writes the header and rounds to blocks."""

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

Kind = GGMLQuantizationType
Describe = Callable[[GGUFWriter], None]


@dataclass(frozen=True)
class GgufTensor:
    """A tensor on its way into a file.

    runs: its rows from the first to the last, in float32, or as uint8 where they are bytes of the kind already.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    runs: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the file."""
        values, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // values * size

    def tofile(self, stream: BinaryIO) -> None:
        """Write all values; the one thing besides `nbytes` that the package asks of an array.

        Raises LayoutError when a value does not fit the kind.
        """
        written = 0
        for run in self.runs():
            data = run.numpy() if run.dtype == torch.uint8 else encode(run, self.kind, self.name)
            stream.write(data.data)
            written += data.nbytes
        if written != self.nbytes:
            raise RuntimeError(f"{self.name}: {written} bytes were made of it, {self.nbytes} were declared")


def encode(run: Tensor, kind: Kind, name: str) -> np.ndarray[Any, Any]:
    """Rows in float32 as the bytes of a kind. Raises LayoutError when a value is not finite in it."""
    if kind == Kind.F32:
        return np.ascontiguousarray(run.float().numpy())
    half = run.to(torch.float16)
    if not bool(half.isfinite().all()):
        raise LayoutError(f"{name}: has values that do not fit float16, which this file stores; repair the model")
    if kind == Kind.F16:
        return np.ascontiguousarray(half.numpy())
    blocks: np.ndarray[Any, Any] = quantize(np.ascontiguousarray(run.float().numpy()), kind)
    return np.ascontiguousarray(blocks)


def fitting(kind: Kind, shape: Sequence[int]) -> Kind:
    """`kind` for a matrix whose rows are whole blocks of it, F16 for another matrix, F32 for vectors."""
    if len(shape) < 2:
        return Kind.F32
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else Kind.F16


def write_gguf(path: Path, architecture: str, describe: Describe, tensors: Sequence[GgufTensor]) -> None:
    """Write one file. `describe` adds the metadata; no more than a run of rows is ever in memory."""
    writer = GGUFWriter(path, architecture)
    try:
        describe(writer)
        writer.add_quantization_version(2)
        for tensor in tensors:
            # With an explicit kind the package takes the shape as that of the values.
            half = np.dtype(np.float16)
            writer.add_tensor_info(tensor.name, tensor.shape, half, tensor.nbytes, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor)  # type: ignore[arg-type]  # it only asks for nbytes and tofile
    finally:
        writer.close()
