"""Rounded Linears of a block in a file; lets an interrupted quantization resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from vila.core.errors import LayoutError
from vila.core.files import atomic_path
from vila.core.reading import file_errors
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
