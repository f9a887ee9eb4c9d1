"""Checkpoints of `torch.distributed.checkpoint`, read without running anything in them.

Their index is a pickle, which here may build the few classes that an index is made of and nothing else; their tensors
are parts of files, which are read by `vila.model.torch_file`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future
from torch.serialization import _get_layout

from vila.core.errors import CheckpointError
from vila.core.reading import file_errors
from vila.core.restricted_pickle import RestrictedUnpickler, load_restricted
from vila.model.torch_file import StoredTensor, read_torch_file

_RECORDS = (
    Metadata,
    MetadataIndex,
    StorageMeta,
    ChunkStorageMetadata,
    TensorStorageMetadata,
    TensorProperties,
    _StorageInfo,
)
_PATHS = ("PosixPath", "WindowsPath", "Path")
_DTYPES = ("float32", "float64", "bfloat16", "float16", "uint8", "int64", "int32", "bool")
_NAMES: dict[tuple[str, str], Any] = {
    **{(record.__module__, record.__name__): record for record in _RECORDS},
    (Metadata.__module__, "_MEM_FORMAT_ENCODING"): _MEM_FORMAT_ENCODING,
    ("torch", "Size"): torch.Size,
    **{("torch", name): getattr(torch, name) for name in _DTYPES},
    ("torch.serialization", "_get_layout"): _get_layout,
    # Python 3.13 moved them to pathlib._local.
    **{(module, name): Path for module in ("pathlib", "pathlib._local") for name in _PATHS},
}


class _IndexUnpickler(RestrictedUnpickler):
    """Builds the records of an index."""

    def build(self, instance: Any, state: Any) -> None:
        """Fill a record. Anything else, a class for example, is shared by the whole process."""
        if type(instance) not in _RECORDS:
            super().build(instance, state)
        elif (fill := getattr(type(instance), "__setstate__", None)) is not None:
            fill(instance, state)
        else:
            vars(instance).update(state)

    def is_key(self, value: Any) -> bool:
        """Also a place of a tensor, if its own parts are plain."""
        if type(value) is not MetadataIndex:
            return super().is_key(value)
        kinds = [type(getattr(value, part, None)) for part in ("fqn", "offset", "index")]
        return kinds[0] is str and kinds[1] in (type(None), torch.Size) and kinds[2] in (type(None), int)


class TensorReader(FileSystemReader):
    """Reads tensors, and only those; `torch.load` is not called."""

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index. Raises CheckpointError for one that asks for code, or lists anything but tensors; OSError."""
        if self._index is None:
            file = Path(self.path) / ".metadata"
            reader = _IndexUnpickler(io.BytesIO(file.read_bytes()), _NAMES)
            with file_errors(file, CheckpointError, hint=_REMEDY):
                index = load_restricted(
                    reader, file=file, error=CheckpointError, expected="an index of tensors", hint=_REMEDY
                )
                problem = _problem(index, Path(self.path).resolve())
            if problem:
                raise CheckpointError(problem, file=file, hint=_REMEDY)
            index.storage_meta = StorageMeta(load_id=self.load_id)
            self._index = index
        return self._index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors of the plan. Raises LayoutError for parts of the files that hold anything but a tensor."""
        for item in plan.items:
            source = self._tensor(self.storage_data[item.storage_index])
            for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                source = source.narrow(dimension, start, length)
            target = planner.resolve_tensor(item).detach()
            if target.shape != source.shape:
                problem = f"{item.dest_index.fqn} has shape {list(source.shape)}, not {list(target.shape)}"
                raise CheckpointError(problem, file=Path(self.path), hint=_REMEDY)
            target.copy_(source)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _tensor(self, info: _StorageInfo) -> torch.Tensor:
        content = read_torch_file(Path(self.path) / info.relative_path, (info.offset, info.length))
        if not isinstance(content.value, StoredTensor):
            raise CheckpointError("not a tensor", file=content.path, hint=_REMEDY)
        return content.value.read(content.map())


_REMEDY = "delete that checkpoint to go on without it"


def _problem(index: Any, folder: Path) -> str:
    """Return why an index is not one of tensors in files of its own folder; empty when it is."""
    if type(index) is not Metadata:
        return f"not an index of tensors but a {type(index).__name__}"
    for name, one in index.state_dict_metadata.items():
        if type(name) is not str or type(one) is not TensorStorageMetadata or type(one.size) is not torch.Size:
            # Anything else would be unpickled without restriction.
            return f"{name!r} is not a tensor; such entries are not read"
    for place, info in index.storage_data.items():
        if type(place) is not MetadataIndex or type(info) is not _StorageInfo or type(info.relative_path) is not str:
            return f"{place!r} does not lie in a file"
        if type(info.offset) is not int or type(info.length) is not int:
            return f"{place!r} has no place in its file"
        if info.transform_descriptors:
            return f"{info.relative_path!r} is compressed; such files are not read"
        if not (folder / info.relative_path).resolve().is_relative_to(folder):
            return f"{info.relative_path!r} lies outside of the checkpoint; refused"
    return ""
