"""Writing .safetensors files row by row: shapes are declared first, then rows come in any order of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from vila.model.safetensors_file import SHARD_BYTES, Declared, num_bytes, plan_file, plan_shards
from vila.model.weights import SINGLES


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
        files: Mapping[str, Sequence[str]] = {self.single: list(self.declared)}
        if self.single == SINGLES[0]:
            files = plan_shards(self.declared, self.folder, self.shard_bytes)
        for file, names in files.items():
            self._open(self.folder / file, names)
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

    def _open(self, path: Path, names: Sequence[str]) -> None:
        plan = plan_file({name: self.declared[name] for name in names}, path)
        # Closed when the writer is left.
        stream = path.open("wb")
        self._streams.append(stream)
        stream.write(plan.head)
        stream.truncate(plan.size)
        for name, start in plan.starts.items():
            self._slots[name] = _Slot(stream, start, *self.declared[name], num_bytes(*self.declared[name]))
