"""Weights into .safetensors files, one tensor at a time: memory holds no more than the one that is being written."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vila.core.errors import LayoutError
from vila.core.files import write_json
from vila.model.pytorch_bin import STORAGE_TYPES
from vila.model.weights import INDEX_FILES, SAFETENSORS_DTYPES, SINGLE_FILES, Shape

# --- safetensors_file
# How tensors lie in .safetensors files: in what order, behind which header, and in how many shards.


SHARD_BYTES = 5 * 10**9
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
# The order in which safetensors' own writer puts types, the first last: wide types first, so all tensors are aligned.
_ORDER = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")

TensorSpecs = Mapping[str, tuple[Shape, torch.dtype]]
"""Shape and type of every tensor, by name."""


@dataclass(frozen=True, slots=True)
class FileLayout:
    """`head`: the first bytes of a file. `starts`: where each tensor begins, in the order in which they lie there."""

    header: bytes
    offsets: Mapping[str, int]
    size: int


def plan_file(declared: TensorSpecs, path: Path) -> FileLayout:
    """Where tensors go in one file. Raises LayoutError for a type of number that such files do not know."""
    for name, (_, dtype) in declared.items():
        if dtype not in _NAMES:
            raise LayoutError(f"{path}: {name} has type {dtype}; .safetensors files hold {', '.join(_NAMES.values())}")
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset, starts = 0, {}
    for name in sorted(declared, key=lambda name: (-_ORDER.index(_NAMES[declared[name][1]]), name)):
        shape, dtype = declared[name]
        starts[name], end = offset, offset + num_bytes(shape, dtype)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return FileLayout(head, {name: len(head) + start for name, start in starts.items()}, len(head) + offset)


def plan_shards(declared: TensorSpecs, folder: Path, limit: int = SHARD_BYTES) -> dict[str, Sequence[str]]:
    """Names of the tensors of each file of a folder, at most `limit` bytes in each; the index of shards is written."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (shape, dtype) in declared.items():
        size = num_bytes(shape, dtype)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE_FILES[0]: shards[0]}
    files = {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}
    total = sum(num_bytes(*declared[name]) for name in declared)
    where = {name: file for file, shard in files.items() for name in shard}
    write_json(folder / INDEX_FILES[0], {"metadata": {"total_size": total}, "weight_map": where})
    return dict(files)


def num_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Size of a tensor in a file."""
    return torch.Size(shape).numel() * dtype.itemsize


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is computed when its turn to be written comes, and forgotten afterwards."""

    shape: Shape
    dtype: torch.dtype
    compute: Callable[[], Tensor]


Writable = Tensor | LazyTensor


def write_weights(tensors: Mapping[str, Writable], folder: Path, shard_size: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or shards of at most `shard_size` bytes and their index, into an existing directory."""
    for file, names in plan_shards(_declared(tensors), folder, shard_size).items():
        write_file({name: tensors[name] for name in names}, folder / file)


def write_file(tensors: Mapping[str, Writable], path: Path) -> None:
    """Write one .safetensors file. Raises LayoutError for a type of number that such files do not know."""
    layout = plan_file(_declared(tensors), path)
    with path.open("wb") as stream:
        stream.write(layout.header)
        for name in layout.offsets:
            made = materialize(tensors[name])
            stream.write(made.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            del made


def materialize(tensor: Writable) -> Tensor:
    """The tensor itself, computed now if need be. Raises RuntimeError when it is not what was announced."""
    if isinstance(tensor, Tensor):
        return tensor.detach()
    made = tensor.compute().detach()
    if tuple(made.shape) != tuple(tensor.shape) or made.dtype != tensor.dtype:
        found, wanted = f"{made.dtype} {list(made.shape)}", f"{tensor.dtype} {list(tensor.shape)}"
        raise RuntimeError(f"{found} was made where {wanted} was announced")
    return made


def as_float16(tensors: Mapping[str, Writable]) -> dict[str, Writable]:
    """Floating tensors in float16, cast when they are written; the others as they are.

    Writing raises LayoutError naming a tensor with values that float16 does not hold.
    """
    return {name: _half(name, tensor) if tensor.dtype.is_floating_point else tensor for name, tensor in tensors.items()}


def _half(name: str, tensor: Writable) -> Writable:
    if tensor.dtype == torch.float16:
        return tensor

    def make() -> Tensor:
        half = materialize(tensor).to(torch.float16)
        if not bool(half.isfinite().all()):
            raise LayoutError(
                f"{name} has values past 65504, the largest that float16 holds, which this layout stores; "
                "keep this model in the native layout"
            )
        return half

    return LazyTensor(tuple(tensor.shape), torch.float16, make)


def _declared(tensors: Mapping[str, Writable]) -> TensorSpecs:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


# --- torch_written
# Weights into a file of torch.save, one tensor at a time; torch.save itself wants all of them in memory.


_ALIGNMENT = 64
_HEADER_BYTES = 30
_PADDING_ID = 0x4246  # the field that torch.save itself pads with
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_torch_file(tensors: Mapping[str, Writable], path: Path) -> None:
    """Write the tensors by their names. No storage is shared, and nothing in the file depends on when it is written."""
    with path.open("wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "data.pkl", _pickled(tensors))
        _add(archive, "byteorder", b"little")
        for number, tensor in enumerate(tensors.values()):
            info = _member(archive, f"data/{number}")
            info.file_size = num_bytes(tensor.shape, tensor.dtype)
            with archive.open(info, "w") as member:
                made = materialize(tensor).cpu().contiguous()
                member.write(made.flatten().view(torch.uint8).numpy().data)
                del made
        _add(archive, "version", b"3\n")


@dataclass(frozen=True)
class _Storage:
    number: int
    tensor: Writable


@dataclass(frozen=True)
class _Shell:
    """What is pickled as a tensor."""

    storage: _Storage

    def __reduce__(self) -> tuple[Any, ...]:
        shape = torch.Size(self.storage.tensor.shape)
        strides = torch.empty(shape, device="meta").stride()
        hooks: OrderedDict[str, Any] = OrderedDict()
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, tuple(shape), strides, False, hooks)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        shape = torch.Size(obj.tensor.shape)
        return "storage", STORAGE_TYPES[obj.tensor.dtype], str(obj.number), "cpu", shape.numel()


def _pickled(tensors: Mapping[str, Writable]) -> bytes:
    stream = io.BytesIO()
    shells = {name: _Shell(_Storage(number, tensor)) for number, (name, tensor) in enumerate(tensors.items())}
    _Pickler(stream, protocol=2).dump(shells)
    return stream.getvalue()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(_member(archive, name), content)


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """A member whose content will begin at a multiple of 64 bytes, so that it can be mapped."""
    info = zipfile.ZipInfo(f"archive/{name}", _EPOCH)
    begin = archive.fp.tell() + _HEADER_BYTES + len(info.filename) + 4  # type: ignore[union-attr]
    padding = -begin % _ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING_ID, padding) + b"Z" * padding
    return info
