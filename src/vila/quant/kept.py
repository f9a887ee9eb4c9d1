"""Finished blocks of long work on disk, so that what was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from vila.core.errors import CheckpointError
from vila.core.files import remove_partials
from vila.quant.result import Search, load_search, save_search

_KEY = "key"
_Found = TypeVar("_Found")


class KeptBlocks(Generic[_Found]):
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


def read_block(path: Path) -> tuple[Search, str]:
    """A block's search and its key."""
    found = load_search(path)
    return Search(found.scales, found.clips), str(found.facts.get(_KEY))


def write_block(found: Search, key: str, path: Path) -> None:
    """Write a block's search with its key."""
    save_search(Search(found.scales, found.clips, {_KEY: key}), path)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data
