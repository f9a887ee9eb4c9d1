"""Reading checkpoints of `torch.distributed.checkpoint` without running what they hold.

Their tensors are read as weights only; their index is a pickle, which here may build the few classes that an index is
made of and nothing else.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from vila.core.errors import CheckpointError

_RECORDS = (
    Metadata,
    MetadataIndex,
    StorageMeta,
    ChunkStorageMetadata,
    TensorStorageMetadata,
    TensorProperties,
    _StorageInfo,
)
_ALLOWED = {
    *((record.__module__, record.__name__) for record in _RECORDS),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch", "Size"),
    *(("torch", name) for name in ("float32", "float64", "bfloat16", "float16", "uint8", "int64", "int32", "bool")),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "Path"),
}


# The one written in Python: only there can the filling of objects be restricted too.
_Unpickler: Any = pickle._Unpickler


class _IndexReader(_Unpickler):
    dispatch: ClassVar = dict(_Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        # Names with dots would reach through an allowed class to anything.
        if (module.replace("pathlib._local", "pathlib"), name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no index needs; nothing of it was run")
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it asks for a persistent object, which no index needs")

    def load_build(self) -> None:
        # Otherwise it could set attributes of classes and functions, which all of this process share.
        if (kind := type(self.stack[-2])) not in _RECORDS:
            raise pickle.UnpicklingError(f"it changes a {kind.__name__}, which is no record of an index")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


class TensorReader(FileSystemReader):
    """Reads tensors, and only those."""

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index. Raises CheckpointError for one that asks for code, or lists anything but tensors, and OSError."""
        if self._index is None:
            file = Path(self.path) / ".metadata"
            try:
                with file.open("rb") as stream:
                    index = _IndexReader(stream).load()
                problem = _problem(index, Path(self.path).resolve())
            except OSError:
                raise
            except Exception as error:  # a program that is broken on purpose may fail in any way
                kind = "" if isinstance(error, pickle.UnpicklingError) else f"{type(error).__name__}: "
                reason = f"{kind}{error}"[:200]
                raise CheckpointError(f"{file}: not an index of tensors ({reason}); {_REMEDY}") from error
            if problem:
                raise CheckpointError(f"{file}: {problem}; {_REMEDY}")
            index.storage_meta = StorageMeta(load_id=self.load_id)
            self._index = index
        return self._index


_REMEDY = "delete that checkpoint to go on without it"


def _problem(index: Any, folder: Path) -> str:
    """Why an index is not one of tensors in files of its own folder; empty when it is."""
    if type(index) is not Metadata:
        return f"not an index of tensors but a {type(index).__name__}"
    for name, one in index.state_dict_metadata.items():
        if type(name) is not str or type(one) is not TensorStorageMetadata or type(one.size) is not torch.Size:
            # Anything else would be unpickled without restriction.
            return f"{name!r} is not a tensor; such entries are not read"
    for place, info in index.storage_data.items():
        if type(place) is not MetadataIndex or type(info) is not _StorageInfo or type(info.relative_path) is not str:
            return f"{place!r} does not lie in a file"
        if info.transform_descriptors:
            return f"{info.relative_path!r} is compressed; such files are not read"
        if not (folder / info.relative_path).resolve().is_relative_to(folder):
            return f"{info.relative_path!r} lies outside of the checkpoint; refused"
    return ""
