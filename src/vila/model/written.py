"""Weights into .safetensors files, one tensor at a time: memory holds no more than the one that is being written.

The bytes are those that safetensors' own writer gives.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vila.core.errors import LayoutError
from vila.core.files import write_json
from vila.model.weights import DTYPES, INDEXES, SINGLES, Shape

SHARD_BYTES = 5 * 10**9
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Made:
    """A tensor that is computed when its turn to be written comes, and forgotten afterwards."""

    shape: Shape
    dtype: torch.dtype
    make: Callable[[], Tensor]


Writable = Tensor | Made


def write_weights(tensors: Mapping[str, Writable], folder: Path, shard_size: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or shards of at most `shard_size` bytes and their index, into an existing directory."""
    shards: list[dict[str, Writable]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = num_bytes(tensor)
        if shards[-1] and filled + size > shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    if len(shards) == 1:
        write_file(shards[0], folder / SINGLES[0])
        return
    where = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(shard, folder / name)
        where.update(dict.fromkeys(shard, name))
    total = sum(map(num_bytes, tensors.values()))
    write_json(folder / INDEXES[0], {"metadata": {"total_size": total}, "weight_map": where})


def write_file(tensors: Mapping[str, Writable], path: Path) -> None:
    """Write one .safetensors file. Raises LayoutError for a type of number that such files do not know."""
    # Wide types first: every tensor is then aligned, whatever the sizes of those before it.
    names = sorted(tensors, key=lambda name: (-_type_order(tensors[name].dtype, name, path), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        end = offset + num_bytes(tensors[name])
        kind = _NAMES[tensors[name].dtype]
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            made = finished(tensors[name])
            stream.write(made.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            del made


def finished(tensor: Writable) -> Tensor:
    """The tensor itself, computed now if need be. Raises RuntimeError when it is not what was announced."""
    if isinstance(tensor, Tensor):
        return tensor.detach()
    made = tensor.make().detach()
    if tuple(made.shape) != tuple(tensor.shape) or made.dtype != tensor.dtype:
        found, wanted = f"{made.dtype} {list(made.shape)}", f"{tensor.dtype} {list(tensor.shape)}"
        raise RuntimeError(f"{found} was made where {wanted} was announced")
    return made


def num_bytes(tensor: Writable) -> int:
    """Size of a tensor in the file."""
    return torch.Size(tensor.shape).numel() * tensor.dtype.itemsize


def in_half(tensors: Mapping[str, Writable]) -> dict[str, Writable]:
    """Floating tensors in float16, cast when they are written; the others as they are.

    Writing raises LayoutError naming a tensor with values that float16 does not hold.
    """
    return {name: _half(name, tensor) if tensor.dtype.is_floating_point else tensor for name, tensor in tensors.items()}


def _half(name: str, tensor: Writable) -> Writable:
    if tensor.dtype == torch.float16:
        return tensor

    def make() -> Tensor:
        half = finished(tensor).to(torch.float16)
        if not bool(half.isfinite().all()):
            raise LayoutError(
                f"{name} has values past 65504, the largest that float16 holds, which this layout stores; "
                "keep this model in the native layout"
            )
        return half

    return Made(tuple(tensor.shape), torch.float16, make)


def _type_order(dtype: torch.dtype, name: str, path: Path) -> int:
    if dtype not in _NAMES:
        raise LayoutError(f"{path}: {name} has type {dtype}; .safetensors files hold {', '.join(_NAMES.values())}")
    return _ORDER.index(_NAMES[dtype])


# The order in which safetensors' own writer puts types, the first last.
_ORDER = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
