"""Weights into a file of torch.save, one tensor at a time; torch.save itself wants all of them in memory.

Such a file is a zip archive that compresses nothing, PyTorch's own form since 1.6: data.pkl is a pickled dictionary
whose tensors name their storages, and each storage is a member of its own. It names no function but those of tensors.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vila.model.safetensors_file import num_bytes
from vila.model.torch_file import STORAGE_TYPES
from vila.model.written import Writable, finished

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
                made = finished(tensor).cpu().contiguous()
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
