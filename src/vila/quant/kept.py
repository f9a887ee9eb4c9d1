"""Finished blocks of a search on disk, so that one which was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vila.core.errors import CheckpointError
from vila.core.files import remove_partials
from vila.quant.result import Search, load_search, save_search

_KEY = "key"


class KeptBlocks:
    """A folder with a file for each finished block.

    Each file carries a key: a hash of all that its content follows from (settings, calibration, the embedded rows and
    the weights of the blocks up to it), so nothing is taken over from another run.
    """

    def __init__(self, folder: Path, start: Any, embedded: Tensor) -> None:
        """start: plain values that decide the result. embedded: the rows as the first block sees them."""
        self.folder = folder
        self._key = hashlib.sha256(json.dumps(start, sort_keys=True).encode())
        self._key.update(_bytes(embedded))
        remove_partials(folder)

    def enter(self, index: int, block: nn.Module) -> Search | None:
        """Go on to the next block, whose weights become a part of the key: what was found in it before, or None.

        Raises CheckpointError for a file of another run.
        """
        for name, tensor in block.state_dict().items():
            self._key.update(name.encode())
            self._key.update(_bytes(tensor))
        path = self._path(index)
        if not path.is_file():
            return None
        found = load_search(path)
        if found.facts.get(_KEY) != self._key.hexdigest():
            raise CheckpointError(
                f"{self.folder}: block {index} was searched in another model, with another calibration or other "
                "settings; remove the folder to start again, or write the result elsewhere"
            )
        return Search(found.scales, found.clips)

    def save(self, index: int, found: Search) -> None:
        """Keep what was found in the block that was entered; the file is whole or absent."""
        save_search(Search(found.scales, found.clips, {_KEY: self._key.hexdigest()}), self._path(index))

    def remove(self) -> None:
        """Delete the folder: the whole result is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data
