"""The rounded Linears of a block in a file, for work that goes on after it was killed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vila.core.errors import LayoutError
from vila.core.files import atomic_path
from vila.kernels.int4_layout import Int4Weight

_HEADER = "vila_rounded_block"
_PARTS = ("codes", "scales", "zeros")


def write_weights(weights: Mapping[str, Int4Weight], key: str, path: Path) -> None:
    """Write a block's weights and the key of what they follow from; the file is whole or absent."""
    tensors = {
        f"{name}/{part}": getattr(weight, part).cpu().contiguous()
        for name, weight in weights.items()
        for part in _PARTS
    }
    sizes = {name: weight.group_size for name, weight in weights.items()}
    with atomic_path(path) as part:
        save_file(tensors, part, metadata={_HEADER: json.dumps({"key": key, "group_sizes": sizes}, sort_keys=True)})


def read_weights(path: Path) -> tuple[dict[str, Int4Weight], str]:
    """A block's weights and their key. Raises LayoutError naming the file when it is no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            weights = {
                name: Int4Weight(**{part: file.get_tensor(f"{name}/{part}") for part in _PARTS}, group_size=size)
                for name, size in header["group_sizes"].items()
            }
    except (OSError, SafetensorError, LookupError, ValueError) as error:
        raise LayoutError(f"{path}: no block that was rounded before ({error}); remove it, it is made again") from error
    return weights, header["key"]
