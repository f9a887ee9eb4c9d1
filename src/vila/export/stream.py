"""Writing .safetensors files row by row: shapes are declared first, then rows come in any order of tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from vila.core.files import write_json
from vila.model.weights import INDEXES, SINGLES

Declared = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of every tensor that will be written, by name."""

SHARD_BYTES = 5 * 10**9
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass
class _Slot:
    """Where a tensor lies in a file, and how much of it is written."""

    stream: BinaryIO
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    size: int
    done: int = 0


@dataclass
class SafetensorsWriter:
    """Tensors of one file called `single`, or of shards of about `shard_bytes` with their index, in `folder`.

    Used in a `with`; leaving it without an error checks that every declared tensor is whole.
    """

    folder: Path
    declared: Declared
    single: str = SINGLES[0]
    shard_bytes: int = SHARD_BYTES
    _slots: dict[str, _Slot] = field(default_factory=dict, init=False)
    _streams: list[BinaryIO] = field(default_factory=list, init=False)

    def __enter__(self) -> SafetensorsWriter:
        shards = _shards(self.declared, self.shard_bytes if self.single == SINGLES[0] else None)
        names = [self.single]
        if len(shards) > 1:
            names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
            weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            total = sum(map(self._size, self.declared))
            write_json(self.folder / INDEXES[0], {"metadata": {"total_size": total}, "weight_map": weight_map})
        for name, shard in zip(names, shards, strict=True):
            self._open(self.folder / name, shard)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for stream in self._streams:
            stream.close()
        unfinished = [name for name, slot in self._slots.items() if slot.done != slot.size]
        if kind is None and unfinished:
            raise RuntimeError(f"{self.folder}: {len(unfinished)} tensors are not whole: {', '.join(unfinished[:5])}")

    def append(self, name: str, rows: Tensor) -> None:
        """Write the next rows of a tensor. Raises ValueError for another type, other rows, or more than declared."""
        slot = self._slots[name]
        if rows.dtype != slot.dtype or rows.shape[1:] != slot.shape[1:]:
            raise ValueError(
                f"{name}: rows are {rows.dtype} {list(rows.shape)}, declared is {slot.dtype} {list(slot.shape)}"
            )
        if slot.done + rows.nbytes > slot.size:
            raise ValueError(f"{name}: more rows than the {slot.shape[0] if slot.shape else 1} that were declared")
        flat = rows.detach().cpu().contiguous().flatten().view(torch.uint8)
        slot.stream.seek(slot.start + slot.done)
        slot.stream.write(flat.numpy().data)
        slot.done += rows.nbytes

    def _size(self, name: str) -> int:
        shape, dtype = self.declared[name]
        return torch.Size(shape).numel() * dtype.itemsize

    def _open(self, path: Path, names: list[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        # Wide types first: every tensor is then aligned, whatever the sizes of those before it.
        ordered = sorted(names, key=lambda name: -self.declared[name][1].itemsize)
        starts = {}
        for name in ordered:
            shape, dtype = self.declared[name]
            starts[name] = offset
            end = offset + self._size(name)
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        # Closed when the writer is left.
        stream = path.open("wb")
        self._streams.append(stream)
        stream.write(struct.pack("<Q", len(text)) + text)
        begin = stream.tell()
        stream.truncate(begin + offset)
        for name in ordered:
            self._slots[name] = _Slot(stream, begin + starts[name], *self.declared[name], self._size(name))


def _shards(declared: Declared, limit: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (shape, dtype) in declared.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if limit is not None and shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
