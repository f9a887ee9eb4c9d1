"""Per-block results on disk; lets an interrupted quantization resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vila.core.errors import CheckpointError, LayoutError
from vila.core.files import atomic_path, remove_partials
from vila.core.reading import file_errors
from vila.kernels.int4 import Int4Weight
from vila.quant.awq_cache import AwqSearch, load_search, save_search

_KEY = "key"
_Found = TypeVar("_Found")


class BlockResumeState(Generic[_Found]):
    """Directory with one file per finished block; without a directory, nothing is stored.

    Each file has a key, a hash of everything its content depends on: settings, calibration, embeddings and the weights
    of all blocks up to this one. Files of other runs are rejected.
    """

    def __init__(
        self,
        folder: Path | None,
        settings: Any,
        embedded: Tensor,
        read: Callable[[Path], tuple[_Found, str]],
        write: Callable[[_Found, str, Path], None],
    ) -> None:
        """Open the directory.

        settings:    plain values that decide the result.
        embedded:    input of the first block.
        read, write: read and write a block's result with its key.
        """
        self.folder = folder
        self._read, self._write = read, write
        self._key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        if folder is not None:
            self._key.update(_bytes(embedded))
            remove_partials(folder)

    def enter(self, index: int, block: nn.Module) -> _Found | None:
        """Add the weights of the next block to the key; return the block's stored result, or None.

        Raises CheckpointError for a file of another run.
        """
        if self.folder is None:
            return None
        for name, tensor in block.state_dict().items():
            self._key.update(name.encode())
            self._key.update(_bytes(tensor))
        path = self.folder / _file(index)
        if not path.is_file():
            return None
        found, key = self._read(path)
        if key != self._key.hexdigest():
            raise CheckpointError(
                "the resume state is of another model, calibration or other settings",
                file=path,
                hint="delete its directory to start over, or choose another output",
            )
        return found

    def save(self, index: int, found: _Found) -> None:
        """Store the result of the block that was entered last, atomically."""
        if self.folder is not None:
            self._write(found, self._key.hexdigest(), self.folder / _file(index))


def _file(index: int) -> str:
    return f"{index:05d}.safetensors"


def read_search_block(path: Path) -> tuple[AwqSearch, str]:
    """Read a block's search and its key."""
    found = load_search(path)
    return AwqSearch(found.scales, found.clips), str(found.settings.get(_KEY))


def write_search_block(found: AwqSearch, key: str, path: Path) -> None:
    """Write a block's search with its key."""
    save_search(AwqSearch(found.scales, found.clips, {_KEY: key}), path)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


_HEADER = "vila_rounded_block"
_PARTS = ("codes", "scales", "zeros")


def write_int4_block(weights: Mapping[str, Int4Weight], key: str, path: Path) -> None:
    """Write a block's INT4 weights with its key, atomically."""
    tensors = {
        f"{name}/{part}": getattr(weight, part).cpu().contiguous()
        for name, weight in weights.items()
        for part in _PARTS
    }
    sizes = {name: weight.group_size for name, weight in weights.items()}
    with atomic_path(path) as part:
        save_file(tensors, part, metadata={_HEADER: json.dumps({"key": key, "group_sizes": sizes}, sort_keys=True)})


def read_int4_block(path: Path) -> tuple[dict[str, Int4Weight], str]:
    """Read a block's INT4 weights and its key. Raises LayoutError for any other file."""
    hint = "delete it; the block is rounded again"
    with file_errors(path, LayoutError, hint=hint), safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {})[_HEADER])
        weights = {}
        for name, size in header["group_sizes"].items():
            parts = {part: file.get_tensor(f"{name}/{part}") for part in _PARTS}
            try:
                weights[name] = Int4Weight(**parts, group_size=size)
            except LayoutError as error:
                raise LayoutError(str(error), file=path, field=name, hint=hint) from error
        return weights, header["key"]
