"""Write weights as .safetensors files (with shards and index) or a torch.save file, one tensor at a time.

Peak memory is one tensor; the bytes of the files are those of safetensors' own writer.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vila.core.errors import LayoutError
from vila.core.files import write_json
from vila.model.dtypes import SAFETENSORS_DTYPES, STORAGE_DTYPES
from vila.model.weights import INDEX_FILES, SINGLE_FILES, Shape

SHARD_BYTES = 5 * 10**9
_NAMES = {dtype.torch: name for name, dtype in SAFETENSORS_DTYPES.items()}
_STORAGE_TYPES = {dtype.torch: getattr(torch, name) for name, dtype in STORAGE_DTYPES.items()}
# Reverse of the dtype order of safetensors' own writer: wide dtypes come first in the file, so tensors are aligned.
_ORDER = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")

TensorSpecs = Mapping[str, tuple[Shape, torch.dtype]]
"""Shape and dtype of every tensor, by name."""


def plan_file(declared: TensorSpecs, path: Path) -> tuple[bytes, dict[str, int], int]:
    """Return header, offset of each tensor and size of a .safetensors file, all in bytes.

    Raises LayoutError for a dtype that such files do not have.
    """
    for name, (_, dtype) in declared.items():
        if dtype not in _NAMES:
            raise LayoutError("", file=path, field=name, value=str(dtype), expected=", ".join(_NAMES.values()))
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
    return head, {name: len(head) + start for name, start in starts.items()}, len(head) + offset


def plan_shards(declared: TensorSpecs, folder: Path, limit: int = SHARD_BYTES) -> dict[str, Sequence[str]]:
    """Assign tensors to files of at most `limit` bytes and write the shard index; returns tensor names by file name."""
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
    """Return the size of a tensor in a file."""
    return torch.Size(shape).numel() * dtype.itemsize


@dataclass
class _TensorRegion:
    """Byte range of a tensor in a file, and the number of bytes written."""

    stream: BinaryIO
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    size: int
    done: int = 0


@dataclass
class SafetensorsWriter:
    """Streaming writer of safetensors files: shapes are declared first, then rows are appended in any tensor order.

    Writes one file named `single`, or shards of about `shard_bytes` with an index, to `folder`. Use it in a `with`
    statement; its end checks that every declared tensor is complete.
    """

    folder: Path
    declared: TensorSpecs
    single: str = SINGLE_FILES[0]
    shard_bytes: int = SHARD_BYTES
    _regions: dict[str, _TensorRegion] = field(default_factory=dict, init=False)
    _streams: list[BinaryIO] = field(default_factory=list, init=False)

    def __enter__(self) -> SafetensorsWriter:
        files: Mapping[str, Sequence[str]] = {self.single: list(self.declared)}
        if self.single == SINGLE_FILES[0]:
            files = plan_shards(self.declared, self.folder, self.shard_bytes)
        for file, names in files.items():
            self._open(self.folder / file, names)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for stream in self._streams:
            stream.close()
        unfinished = [name for name, region in self._regions.items() if region.done != region.size]
        if kind is None and unfinished:
            raise RuntimeError(f"{self.folder}: {len(unfinished)} tensors are incomplete: {', '.join(unfinished[:5])}")

    def append(self, name: str, rows: Tensor) -> None:
        """Write the next rows of a tensor. Raises ValueError for another dtype or shape, or more rows than declared."""
        region = self._regions[name]
        if rows.dtype != region.dtype or rows.shape[1:] != region.shape[1:]:
            raise ValueError(
                f"{name}: rows are {rows.dtype} {list(rows.shape)}, declared is {region.dtype} {list(region.shape)}"
            )
        if region.done + rows.nbytes > region.size:
            raise ValueError(f"{name}: more rows than the declared {region.shape[0] if region.shape else 1}")
        flat = rows.detach().cpu().contiguous().flatten().view(torch.uint8)
        region.stream.seek(region.start + region.done)
        region.stream.write(flat.numpy().data)
        region.done += rows.nbytes

    def _open(self, path: Path, names: Sequence[str]) -> None:
        header, offsets, size = plan_file({name: self.declared[name] for name in names}, path)
        stream = path.open("wb")  # closed in __exit__
        self._streams.append(stream)
        stream.write(header)
        stream.truncate(size)
        for name, start in offsets.items():
            self._regions[name] = _TensorRegion(stream, start, *self.declared[name], num_bytes(*self.declared[name]))


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is computed when it is written and freed afterwards."""

    shape: Shape
    dtype: torch.dtype
    compute: Callable[[], Tensor]


Writable = Tensor | LazyTensor


def write_weights(tensors: Mapping[str, Writable], folder: Path, shard_size: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or shards of at most `shard_size` bytes and their index, into an existing directory."""
    declared = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with SafetensorsWriter(folder, declared, shard_bytes=shard_size) as writer:
        for name, tensor in tensors.items():
            writer.append(name, materialize(tensor))


def materialize(tensor: Writable) -> Tensor:
    """Return the tensor, computing it if needed. Raises RuntimeError if its shape or dtype is not the declared one."""
    if isinstance(tensor, Tensor):
        return tensor.detach()
    computed = tensor.compute().detach()
    if tuple(computed.shape) != tuple(tensor.shape) or computed.dtype != tensor.dtype:
        found, declared = f"{computed.dtype} {list(computed.shape)}", f"{tensor.dtype} {list(tensor.shape)}"
        raise RuntimeError(f"computed {found}, declared {declared}")
    return computed


def as_float16(tensors: Mapping[str, Writable]) -> dict[str, Writable]:
    """Return floating-point tensors as float16, cast when they are written; other tensors unchanged.

    Writing raises LayoutError for a tensor with values outside the range of float16.
    """
    return {name: _half(name, tensor) if tensor.dtype.is_floating_point else tensor for name, tensor in tensors.items()}


def _half(name: str, tensor: Writable) -> Writable:
    if tensor.dtype == torch.float16:
        return tensor

    def compute() -> Tensor:
        half = materialize(tensor).to(torch.float16)
        if not bool(half.isfinite().all()):
            problem = "values exceed 65504, the largest float16 number"
            raise LayoutError(problem, field=name, hint="save this model in the native layout")
        return half

    return LazyTensor(tuple(tensor.shape), torch.float16, compute)


_ALIGNMENT = 64
_HEADER_BYTES = 30
_PADDING_ID = 0x4246  # zip extra field that torch.save uses for padding
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_torch_file(tensors: Mapping[str, Writable], path: Path) -> None:
    """Write tensors by name as torch.save does, with one storage per tensor and no timestamps."""
    with path.open("wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "data.pkl", _pickled(tensors))
        _add(archive, "byteorder", b"little")
        for number, tensor in enumerate(tensors.values()):
            info = _member(archive, f"data/{number}")
            info.file_size = num_bytes(tensor.shape, tensor.dtype)
            with archive.open(info, "w") as member:
                data = materialize(tensor).cpu().contiguous()
                member.write(data.flatten().view(torch.uint8).numpy().data)
                del data
        _add(archive, "version", b"3\n")


@dataclass(frozen=True)
class _Storage:
    number: int
    tensor: Writable


@dataclass(frozen=True)
class _PickledTensor:
    """Pickled in place of a tensor."""

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
        return "storage", _STORAGE_TYPES[obj.tensor.dtype], str(obj.number), "cpu", shape.numel()


def _pickled(tensors: Mapping[str, Writable]) -> bytes:
    stream = io.BytesIO()
    stand_ins = {
        name: _PickledTensor(_Storage(number, tensor)) for number, (name, tensor) in enumerate(tensors.items())
    }
    _Pickler(stream, protocol=2).dump(stand_ins)
    return stream.getvalue()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(_member(archive, name), content)


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """A member whose content starts at a multiple of 64 bytes, so that it can be memory-mapped."""
    info = zipfile.ZipInfo(f"archive/{name}", _EPOCH)
    begin = archive.fp.tell() + _HEADER_BYTES + len(info.filename) + 4  # type: ignore[union-attr]
    padding = -begin % _ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING_ID, padding) + b"Z" * padding
    return info
