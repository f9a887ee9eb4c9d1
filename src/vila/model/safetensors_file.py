"""How tensors lie in .safetensors files: in what order, behind which header, and in how many shards.

The bytes are those that safetensors' own writer gives.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vila.core.errors import LayoutError
from vila.core.files import write_json
from vila.model.weights import DTYPES, INDEXES, SINGLES, Shape

SHARD_BYTES = 5 * 10**9
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The order in which safetensors' own writer puts types, the first last: wide types first, so all tensors are aligned.
_ORDER = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")

Declared = Mapping[str, tuple[Shape, torch.dtype]]
"""Shape and type of every tensor, by name."""


@dataclass(frozen=True, slots=True)
class Plan:
    """`head`: the first bytes of a file. `starts`: where each tensor begins, in the order in which they lie there."""

    head: bytes
    starts: Mapping[str, int]
    size: int


def plan_file(declared: Declared, path: Path) -> Plan:
    """Where tensors go in one file. Raises LayoutError for a type of number that such files do not know."""
    for name, (_, dtype) in declared.items():
        if dtype not in _NAMES:
            raise LayoutError(f"{path}: {name} has type {dtype}; .safetensors files hold {', '.join(_NAMES.values())}")
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset, starts = 0, {}
    for name in sorted(declared, key=lambda name: (-_ORDER.index(_NAMES[declared[name][1]]), name)):
        shape, dtype = declared[name]
        starts[name], end = offset, offset + num_bytes(shape, dtype)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return Plan(head, {name: len(head) + start for name, start in starts.items()}, len(head) + offset)


def plan_shards(declared: Declared, folder: Path, limit: int = SHARD_BYTES) -> dict[str, Sequence[str]]:
    """Names of the tensors of each file of a folder, at most `limit` bytes in each; the index of shards is written."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (shape, dtype) in declared.items():
        size = num_bytes(shape, dtype)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLES[0]: shards[0]}
    files = {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}
    total = sum(num_bytes(*declared[name]) for name in declared)
    where = {name: file for file, shard in files.items() for name in shard}
    write_json(folder / INDEXES[0], {"metadata": {"total_size": total}, "weight_map": where})
    return dict(files)


def num_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Size of a tensor in a file."""
    return torch.Size(shape).numel() * dtype.itemsize
