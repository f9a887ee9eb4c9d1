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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vila.core.errors import LayoutError
from vila.core.files import write_json
from vila.model.pytorch_bin import STORAGE_TYPES
from vila.model.weights import INDEX_FILES, SAFETENSORS_DTYPES, SINGLE_FILES, Shape

SHARD_BYTES = 5 * 10**9
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
# Reverse of the dtype order of safetensors' own writer: wide dtypes come first in the file, so tensors are aligned.
_ORDER = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")

TensorSpecs = Mapping[str, tuple[Shape, torch.dtype]]
"""Shape and dtype of every tensor, by name."""


@dataclass(frozen=True, slots=True)
class FileLayout:
    """Layout of a .safetensors file.

    header:  first bytes of the file.
    offsets: file offset of each tensor, in file order.
    size:    size of the file in bytes.
    """

    header: bytes
    offsets: Mapping[str, int]
    size: int


def plan_file(declared: TensorSpecs, path: Path) -> FileLayout:
    """Compute the layout of one file. Raises LayoutError for a dtype that .safetensors files do not have."""
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
    return FileLayout(head, {name: len(head) + start for name, start in starts.items()}, len(head) + offset)


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


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is computed when it is written and freed afterwards."""

    shape: Shape
    dtype: torch.dtype
    compute: Callable[[], Tensor]


Writable = Tensor | LazyTensor


def write_weights(tensors: Mapping[str, Writable], folder: Path, shard_size: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or shards of at most `shard_size` bytes and their index, into an existing directory."""
    for file, names in plan_shards(_declared(tensors), folder, shard_size).items():
        write_file({name: tensors[name] for name in names}, folder / file)


def write_file(tensors: Mapping[str, Writable], path: Path) -> None:
    """Write one .safetensors file. Raises LayoutError for a dtype that .safetensors files do not have."""
    layout = plan_file(_declared(tensors), path)
    with path.open("wb") as stream:
        stream.write(layout.header)
        for name in layout.offsets:
            data = materialize(tensors[name])
            stream.write(data.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            del data


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


def _declared(tensors: Mapping[str, Writable]) -> TensorSpecs:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


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
        return "storage", STORAGE_TYPES[obj.tensor.dtype], str(obj.number), "cpu", shape.numel()


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
