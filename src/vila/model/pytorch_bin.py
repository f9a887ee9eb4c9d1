"""Reader for files written by torch.save (.bin, .pt), without torch.load: plain values and memory-mapped tensors.

Both formats are read: zip archives with stored members (PyTorch 1.6 and later), and the older sequence of pickles
followed by storage contents. Nothing in the pickle is executed, and all sizes are checked against the file before any
memory is allocated.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from vila.core.errors import LayoutError
from vila.core.reading import file_errors, foreign_content
from vila.core.restricted_pickle import ForbiddenPickleError, RestrictedUnpickler, load_restricted
from vila.model.dtypes import STORAGE_DTYPES, DType

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MAX_PICKLE_BYTES: Final = 32 * 2**20
_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL: Final = 1001
_EXPECTED: Final = "tensors and plain values"
_DAMAGED: Final = "it may be truncated or damaged; copy or download it again"
_ZIP: Final = b"PK\x03\x04"
_ZIP_END: Final = b"PK\x05\x06"  # start of the last 22 bytes, as the archives have no comment
_HEAD_BYTES: Final = 512
_LOCAL_HEADER_BYTES: Final = 30
_MAX_DIMENSIONS: Final = 16


@dataclass(slots=True)
class _Storage:
    """Storage in the file: `num_bytes` from offset `start`, which is -1 until the file's directory has been read."""

    key: str
    dtype: DType
    num_bytes: int
    start: int = -1


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in the file. Built from the pickle; must not be used before `_check`."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> DType:
        """Dtype of the elements."""
        return self.storage.dtype

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_aligned(self) -> bool:
        """Whether the tensor can be used in place in the mapped file."""
        return self.storage.start % self.dtype.itemsize == 0

    def read(self, mapped: torch.UntypedStorage) -> Tensor:
        """Return the tensor as a view of the mapped file, or as a copy if it is not aligned."""
        import torch

        part = mapped[self.storage.start : self.storage.start + self.storage.num_bytes]
        if not self.is_aligned:
            part = part.clone()
        return torch.empty(0, dtype=self.dtype.torch).set_(part, self.offset, self.shape, self.stride)


@dataclass(frozen=True, slots=True)
class TorchContent:
    """Content of a file, with a `StoredTensor` for each tensor."""

    path: Path
    value: Any
    tensors: tuple[StoredTensor, ...]

    @property
    def is_mapped(self) -> bool:
        """Whether all tensors are views of the mapped file."""
        return all(tensor.is_aligned for tensor in self.tensors)

    def map(self) -> torch.UntypedStorage:
        """Map the file privately: changes to tensors are not written to the file."""
        import torch

        size = self.path.stat().st_size
        with file_errors(self.path, LayoutError, kind="zip"):
            mapped: Any = torch.UntypedStorage.from_file(str(self.path), False, size)
        last = max((tensor.storage.start + tensor.storage.num_bytes for tensor in self.tensors), default=0)
        if last > size:
            raise LayoutError("truncated while reading", file=self.path, hint="copy or download it again")
        return mapped


def read_torch_file(path: Path, part: tuple[int, int] | None = None) -> TorchContent:
    """Read a file written by torch.save; tensors stay in the file until `StoredTensor.read`.

    part: offset and number of bytes, if the content is embedded in a larger file.
    Raises LayoutError for other files, for objects other than tensors and plain values (`value` names them; they are
    not executed), for compressed members, and for tensors that exceed the file.
    """
    with file_errors(path, LayoutError):
        stream = path.open("rb")
    with stream:
        size = path.stat().st_size
        begin, length = part or (0, size)
        if begin < 0 or length < 0 or begin + length > size:
            raise LayoutError("the byte range exceeds the file", file=path, value=(begin, length), hint=_DAMAGED)
        view = io.BufferedReader(_Part(stream, begin, length))
        head = view.read(_HEAD_BYTES)
        if known := foreign_content(head, "zip"):
            raise LayoutError(known[0], file=path, hint=known[1])
        value, reader = (_read_zip if head.startswith(_ZIP) else _read_legacy)(path, view, length)
    for storage in reader.storages.values():
        storage.start += begin
    for tensor in reader.tensors:
        _check(tensor, path)
    return TorchContent(path, value, tuple(reader.tensors))


class _Part(io.RawIOBase):
    """A byte range of a file as a file object."""

    def __init__(self, stream: BinaryIO, begin: int, length: int) -> None:
        self._stream, self._begin, self._length, self._position = stream, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if position < 0:
            raise OSError("negative seek position")
        self._position = position
        return position

    def readinto(self, buffer: Any, /) -> int:
        wanted = min(len(buffer), max(0, self._length - self._position))
        self._stream.seek(self._begin + self._position)
        content = self._stream.read(wanted)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


class _TensorUnpickler(RestrictedUnpickler):
    """Unpickler that builds plain values and `StoredTensor`s, with storages by key."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream, {**_NAMES, **{("torch._utils", name): self._rebuild for name in _REBUILD}})
        self.storages: dict[str, _Storage] = {}
        self.tensors: list[StoredTensor] = []

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the storage of a key; its offset is set later."""
        kind, dtype, key, _, num_elements, *view = pid if isinstance(pid, tuple) and len(pid) in (5, 6) else [None] * 5
        if kind != "storage" or not isinstance(dtype, DType) or any(one is not None for one in view):
            raise ForbiddenPickleError("an object that is not a storage")
        if not isinstance(key, str) or type(num_elements) is not int or num_elements < 0:
            raise ForbiddenPickleError("a storage without key or size")
        new = _Storage(key, dtype, num_elements * dtype.itemsize)
        known = self.storages.setdefault(key, new)
        if (known.dtype, known.num_bytes) != (new.dtype, new.num_bytes):
            raise ForbiddenPickleError(f"storage {key!r} with two sizes or dtypes")
        return known

    def build(self, instance: Any, state: Any) -> None:
        """Ignore attributes of dictionaries: `_metadata` of a state_dict, which does not concern tensors."""
        if type(instance) is not dict:
            super().build(instance, state)

    def _rebuild(self, storage: Any, offset: Any, shape: Any, stride: Any, *others: Any) -> StoredTensor:
        # others: requires_grad, hooks, and flags of conjugated or negated views.
        sizes = (*shape, *stride, offset) if isinstance(shape, tuple) and isinstance(stride, tuple) else (None,)
        if not isinstance(storage, _Storage) or any(type(size) is not int or size < 0 for size in sizes):
            raise ForbiddenPickleError("a tensor without storage or shape")
        if len(shape) != len(stride) or any(others[1:]):
            raise ForbiddenPickleError("a tensor with hooks, or a conjugated or negated view")
        tensor = StoredTensor(storage, offset, shape, stride)
        self.tensors.append(tensor)
        return tensor


_REBUILD: Final = ("_rebuild_tensor", "_rebuild_tensor_v2")
_NAMES: Final[Mapping[tuple[str, str], Any]] = {
    ("collections", "OrderedDict"): dict,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch", "Size"): tuple,
    **{(module, kind): dtype for kind, dtype in STORAGE_DTYPES.items() for module in ("torch", "torch.cuda")},
}


def _load(reader: _TensorUnpickler, path: Path) -> Any:
    return load_restricted(reader, file=path, error=LayoutError, expected=_EXPECTED, kind="zip")


def _read_zip(path: Path, stream: BinaryIO, size: int) -> tuple[Any, _TensorUnpickler]:
    with file_errors(path, LayoutError, hint=_DAMAGED, kind="zip"):
        archive = zipfile.ZipFile(stream)
    stream.seek(size - len(_ZIP_END) - 18)
    if stream.read(len(_ZIP_END)) != _ZIP_END:
        raise LayoutError("data after the end of the archive", file=path, hint=_DAMAGED)
    members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if "data.pkl" not in members or "constants.pkl" in members or len(members) < len(archive.infolist()):
        raise LayoutError("zip archive, but not of torch.save", file=path, hint="pass the file with the state_dict")
    content = _member(path, stream, size, members["data.pkl"])
    if "byteorder" in members and (order := _member(path, stream, size, members["byteorder"])) != b"little":
        raise LayoutError("", file=path, field="byteorder", value=order.decode("latin-1"), expected="little")
    pickled = io.BytesIO(content)
    reader = _TensorUnpickler(pickled)
    value = _load(reader, path)
    if pickled.read(1):
        raise LayoutError("data after the end of data.pkl", file=path, hint=_DAMAGED)
    for key, storage in reader.storages.items():
        info = members.get(f"data/{key}")
        if info is None:
            raise LayoutError("no such member", file=path, field=f"data/{key}", hint=_DAMAGED)
        storage.start = _begin(path, stream, size, info)
        if storage.num_bytes > info.file_size:
            problem = "the member is smaller than its tensors"
            expected = f"{storage.num_bytes} bytes"
            raise LayoutError(problem, file=path, field=info.filename, value=info.file_size, expected=expected)
    return value, reader


def _member(path: Path, stream: BinaryIO, size: int, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > _MAX_PICKLE_BYTES:
        expected = f"at most {_MAX_PICKLE_BYTES} bytes"
        raise LayoutError("", file=path, field=info.filename, value=info.file_size, expected=expected)
    stream.seek(_begin(path, stream, size, info))
    return stream.read(info.file_size)


def _begin(path: Path, stream: BinaryIO, size: int, info: zipfile.ZipInfo) -> int:
    """Return the offset of a member's content. Raises LayoutError unless it is stored uncompressed within the file."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
        expected = "stored members, as torch.save writes them"
        hint = "uncompressed it may exceed memory; load and save it with torch if you trust it"
        raise LayoutError("compressed or encrypted", file=path, field=info.filename, expected=expected, hint=hint)
    offset = max(0, info.header_offset)
    stream.seek(offset)
    header = stream.read(_LOCAL_HEADER_BYTES)
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    begin = offset + _LOCAL_HEADER_BYTES + name + extra
    if info.header_offset < 0 or not header.startswith(_ZIP) or begin + info.file_size > size:
        raise LayoutError("exceeds the file", file=path, field=info.filename, hint=_DAMAGED)
    return begin


def _read_legacy(path: Path, stream: BinaryIO, size: int) -> tuple[Any, _TensorUnpickler]:
    """Read the format before PyTorch 1.6: magic number, protocol, system, value, storage keys, storages."""
    stream.seek(0)
    pickled = io.BytesIO(stream.read(_MAX_PICKLE_BYTES))
    magic = _load(_TensorUnpickler(pickled), path) if pickled.getvalue()[:1] == b"\x80" else None
    if magic != _LEGACY_MAGIC:
        raise LayoutError("not a torch.save file", file=path, hint="copy or download it again")
    protocol, system = (_load(_TensorUnpickler(pickled), path) for _ in range(2))
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict) or not system.get("little_endian"):
        raise LayoutError("unknown version of torch.save, or big-endian", file=path, value=protocol)
    reader = _TensorUnpickler(pickled)
    value = _load(reader, path)
    order = _load(_TensorUnpickler(pickled), path)
    keys = order if isinstance(order, list) and all(isinstance(key, str) for key in order) else []
    if sorted(keys) != sorted(reader.storages):
        raise LayoutError("the storage list does not match the tensors", file=path, hint=_DAMAGED)
    offset = pickled.tell()
    for key in keys:
        storage = reader.storages[key]
        stream.seek(offset)
        stated = int.from_bytes(stream.read(8), "little") * storage.dtype.itemsize
        storage.start = offset + 8
        offset = storage.start + storage.num_bytes
        if stated != storage.num_bytes or offset > size:
            raise LayoutError("the storage exceeds the file", file=path, field=f"storage {key}", hint=_DAMAGED)
    if offset != size:
        raise LayoutError(f"{size - offset} bytes after the last storage", file=path, hint=_DAMAGED)
    return value, reader


def _check(tensor: StoredTensor, path: Path) -> None:
    """Raise LayoutError unless every element of the tensor is inside its storage."""
    held = tensor.storage.num_bytes // tensor.dtype.itemsize
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride, strict=True))
    count = math.prod(tensor.shape)
    # torch multiplies sizes and strides even where another size is zero, so their products must not overflow.
    products = (math.prod(max(size, 1) for size in sizes) for sizes in (tensor.shape, tensor.stride))
    if len(tensor.shape) > _MAX_DIMENSIONS or max(products) >= 2**62 or (count and (last >= held or count > held)):
        raise LayoutError(
            "the tensor has more elements than its storage",
            file=path,
            field=f"data/{tensor.storage.key}",
            value=list(tensor.shape),
            expected=f"at most {held} elements",
            hint=_DAMAGED,
        )
