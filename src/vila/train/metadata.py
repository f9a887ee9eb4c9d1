"""Reading checkpoints of `torch.distributed.checkpoint` without running what they hold.

Their tensors are read as weights only; their index is a pickle, which here may build the few classes that an index is
made of and nothing else.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta

from vila.core.errors import CheckpointError

_INDEX = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_INDEX, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata")),
    *((_INDEX, name) for name in ("TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    *(("torch", name) for name in ("float32", "float64", "bfloat16", "float16", "uint8", "int64", "int32", "bool")),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "Path"),
}


class _IndexReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Names with dots would reach through an allowed class to anything.
        if (module.replace("pathlib._local", "pathlib"), name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no index needs; nothing of it was run")
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it asks for a persistent object, which no index needs")


class TensorReader(FileSystemReader):
    """Reads tensors, and only those."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index. Raises CheckpointError for one that asks for code, or lists anything but tensors."""
        file = Path(self.path) / ".metadata"
        try:
            with file.open("rb") as stream:
                index = _IndexReader(stream).load()
        except OSError:
            raise
        except Exception as error:  # a program that is broken on purpose may fail in any way
            raise CheckpointError(f"{file}: not an index of tensors ({error})") from error
        if not isinstance(index, Metadata):
            raise CheckpointError(f"{file}: not an index of tensors but a {type(index).__name__}")
        others = [name for name, one in index.state_dict_metadata.items() if isinstance(one, BytesStorageMetadata)]
        if others:
            raise CheckpointError(f"{file}: {others[0]!r} is not a tensor; such entries are not read")
        folder = Path(self.path).resolve()
        for info in (index.storage_data or {}).values():
            if not (folder / info.relative_path).resolve().is_relative_to(folder):
                raise CheckpointError(f"{file}: {info.relative_path!r} lies outside of the checkpoint; refused")
        index.storage_meta = index.storage_meta or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index
