"""Finished blocks of long work on disk, so that what was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
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
    """A folder with a file for each finished block.

    Each file carries a key: a hash of all that its content follows from (settings, calibration, the embedded rows and
    the weights of the blocks up to it), so nothing is taken over from another run.
    """

    def __init__(
        self,
        folder: Path,
        start: Any,
        embedded: Tensor,
        read: Callable[[Path], tuple[_Found, str]],
        write: Callable[[_Found, str, Path], None],
    ) -> None:
        """start: plain values that decide the result. embedded: the rows as the first block sees them.

        read, write: a block's result and its key, from and to a file.
        """
        self.folder = folder
        self._read, self._write = read, write
        self._key = hashlib.sha256(json.dumps(start, sort_keys=True).encode())
        self._key.update(_bytes(embedded))
        remove_partials(folder)

    def enter(self, index: int, block: nn.Module) -> _Found | None:
        """Go on to the next block, whose weights become a part of the key: what was found in it before, or None.

        Raises CheckpointError for a file of another run.
        """
        for name, tensor in block.state_dict().items():
            self._key.update(name.encode())
            self._key.update(_bytes(tensor))
        path = self._path(index)
        if not path.is_file():
            return None
        found, key = self._read(path)
        if key != self._key.hexdigest():
            raise CheckpointError(
                f"{self.folder}: block {index} was made from another model, with another calibration or other "
                "settings; remove the folder to start again, or write the result elsewhere"
            )
        return found

    def save(self, index: int, found: _Found) -> None:
        """Keep what was found in the block that was entered; the file is whole or absent."""
        self._write(found, self._key.hexdigest(), self._path(index))

    def remove(self) -> None:
        """Delete the folder: the whole result is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"


def read_search_block(path: Path) -> tuple[AwqSearch, str]:
    """A block's search and its key."""
    found = load_search(path)
    return AwqSearch(found.scales, found.clips), str(found.facts.get(_KEY))


def write_search_block(found: AwqSearch, key: str, path: Path) -> None:
    """Write a block's search with its key."""
    save_search(AwqSearch(found.scales, found.clips, {_KEY: key}), path)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


# --- kept_weights
# Rounded Linears of a block in a file; lets an interrupted quantization resume.


_HEADER = "vila_rounded_block"
_PARTS = ("codes", "scales", "zeros")


def write_int4_block(weights: Mapping[str, Int4Weight], key: str, path: Path) -> None:
    """Write a block's weights and the key of what they follow from; the file is whole or absent."""
    tensors = {
        f"{name}/{part}": getattr(weight, part).cpu().contiguous()
        for name, weight in weights.items()
        for part in _PARTS
    }
    sizes = {name: weight.group_size for name, weight in weights.items()}
    with atomic_path(path) as part:
        save_file(tensors, part, metadata={_HEADER: json.dumps({"key": key, "group_sizes": sizes}, sort_keys=True)})


def read_int4_block(path: Path) -> tuple[dict[str, Int4Weight], str]:
    """Read a block's weights and their key. Raises LayoutError with the file's name for any other file."""
    hint = "remove it; the block is rounded again"
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
