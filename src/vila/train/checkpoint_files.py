"""Files of a checkpoint: a manifest with size and SHA-256 of each, and a reader that executes no pickled code."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

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
from vila.core.files import sha256_file, write_text
from vila.core.reading import Fields, file_errors
from vila.core.restricted_pickle import RestrictedUnpickler, load_restricted
from vila.model.pytorch_bin import StoredTensor, read_torch_file
from vila.train.fsdp import World

MANIFEST = "manifest.json"


class FileDigest(TypedDict):
    """Size and hexadecimal SHA-256 of a file."""

    bytes: int
    sha256: str


def digest_files(folder: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """Return the digests of files of a directory by name."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in names}


def write_manifest(folder: Path, files: Mapping[str, FileDigest]) -> None:
    """Write `manifest.json` into a directory."""
    write_text(folder / MANIFEST, _encoded(files))


def check_files(folder: Path, world: World) -> None:
    """Compare the files of a checkpoint with its manifest; each rank checks some of them. Every rank calls it.

    Files that are not in the manifest are ignored. Every rank raises the same CheckpointError, naming the first file
    that is missing or differs.
    """
    files = world.run_on_main(partial(read_manifest, folder))
    names = sorted(files)[world.process.rank :: world.process.world_size]
    problems = world.all_gather_object(_first_difference(folder, {name: files[name] for name in names}))
    if problem := next(filter(None, problems), None):
        raise problem


def read_manifest(folder: Path) -> dict[str, FileDigest]:
    """Read `manifest.json`. Raises CheckpointError if it is missing or not as `write_manifest` writes it."""
    path = folder / MANIFEST
    entries = Fields.of_file(path, CheckpointError).section("files")
    files: dict[str, FileDigest] = {}
    for name in entries:
        entry = entries.section(name)
        if Path(name).name != name:
            raise entries.refusal(name, "not the name of a file in this directory")
        files[name] = {"bytes": entry.integer("bytes", maximum=2**62), "sha256": entry.text("sha256")}
    if path.read_bytes() != _encoded(files).encode():
        raise CheckpointError("the manifest was modified after it was written", file=path)
    return files


def _first_difference(folder: Path, files: Mapping[str, FileDigest]) -> CheckpointError | None:
    for name, wanted in files.items():
        try:
            with file_errors(folder / name, CheckpointError):
                found = digest_files(folder, [name])[name]
        except CheckpointError as error:
            return error
        for field in ("bytes", "sha256"):
            if found[field] != wanted[field]:
                return CheckpointError(
                    "the file was changed",
                    file=folder / name, field=field, value=found[field], expected=str(wanted[field]),
                )  # fmt: skip
    return None


def _encoded(files: Mapping[str, FileDigest]) -> str:
    return json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n"


# Reader for checkpoints of `torch.distributed.checkpoint`.

_REMEDY = "delete that checkpoint to resume without it"
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
    """Builds the record classes of a checkpoint index, and nothing else."""

    def build(self, instance: Any, state: Any) -> None:
        """Set the attributes of a record. Other objects, such as classes, are shared by the process and rejected."""
        if type(instance) not in _RECORDS:
            super().build(instance, state)
        elif (fill := getattr(type(instance), "__setstate__", None)) is not None:
            fill(instance, state)
        else:
            vars(instance).update(state)

    def is_key(self, value: Any) -> bool:
        """Accept a MetadataIndex with plain attributes as a key, too."""
        if type(value) is not MetadataIndex:
            return super().is_key(value)
        kinds = [type(getattr(value, part, None)) for part in ("fqn", "offset", "index")]
        return kinds[0] is str and kinds[1] in (type(None), torch.Size) and kinds[2] in (type(None), int)


class TensorReader(FileSystemReader):
    """Reads tensors only; never calls `torch.load`."""

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index. Raises CheckpointError if it requests code or lists anything but tensors; OSError."""
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
        """Fill the tensors of the plan. Raises LayoutError for file sections that are not tensors."""
        for item in plan.items:
            source = self._tensor(self.storage_data[item.storage_index])
            for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                source = source.narrow(dimension, start, length)
            target = planner.resolve_tensor(item).detach()
            if target.shape != source.shape:
                raise CheckpointError(
                    "a tensor has another shape",
                    file=Path(self.path),
                    field=item.dest_index.fqn,
                    value=list(source.shape),
                    expected=str(list(target.shape)),
                    hint=_REMEDY,
                )
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


def _problem(index: Any, folder: Path) -> str:
    """Return why an index is not valid: entries must be tensors in files of its own directory. Empty if it is."""
    if type(index) is not Metadata:
        return f"not an index of tensors but a {type(index).__name__}"
    for name, one in index.state_dict_metadata.items():
        if type(name) is not str or type(one) is not TensorStorageMetadata or type(one.size) is not torch.Size:
            # Other entries would be unpickled without restriction.
            return f"{name!r} is not a tensor"
    for location, info in index.storage_data.items():
        if type(location) is not MetadataIndex or type(info) is not _StorageInfo or type(info.relative_path) is not str:
            return f"{location!r} has no file"
        if type(info.offset) is not int or type(info.length) is not int:
            return f"{location!r} has no offset and length in its file"
        if info.transform_descriptors:
            return f"{info.relative_path!r} is compressed, which is not supported"
        if not (folder / info.relative_path).resolve().is_relative_to(folder):
            return f"{info.relative_path!r} is outside of the checkpoint"
    return ""
