"""Dtypes of weights in files, known without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class DType:
    """A dtype of torch: its name, bytes per element, and whether elements are floating-point numbers."""

    name: str
    itemsize: int
    is_floating_point: bool = False

    def __str__(self) -> str:
        return f"torch.{self.name}"

    @property
    def torch(self) -> torch.dtype:
        """The dtype as torch's object."""
        import torch

        return cast("torch.dtype", getattr(torch, self.name))


FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = (
    DType(name, size, True) for name, size in (("float64", 8), ("float32", 4), ("float16", 2), ("bfloat16", 2))
)
INT64, INT32, INT16, INT8 = (DType(f"int{8 * size}", size) for size in (8, 4, 2, 1))
UINT8, BOOL = DType("uint8", 1), DType("bool", 1)

SAFETENSORS_DTYPES = {
    "F64": FLOAT64,
    "F32": FLOAT32,
    "F16": FLOAT16,
    "BF16": BFLOAT16,
    "I64": INT64,
    "I32": INT32,
    "I16": INT16,
    "I8": INT8,
    "U8": UINT8,
    "BOOL": BOOL,
}
"""Dtypes by their names in .safetensors files."""
STORAGE_DTYPES = {
    "DoubleStorage": FLOAT64,
    "FloatStorage": FLOAT32,
    "HalfStorage": FLOAT16,
    "BFloat16Storage": BFLOAT16,
    "LongStorage": INT64,
    "IntStorage": INT32,
    "ShortStorage": INT16,
    "CharStorage": INT8,
    "ByteStorage": UINT8,
    "BoolStorage": BOOL,
}
"""Dtypes by the storage classes that name them in files written by torch.save."""
