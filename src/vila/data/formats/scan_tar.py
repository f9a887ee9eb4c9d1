"""Finds the samples of tar shards: members that share the name up to the first dot of the base name, as WebDataset
groups them (https://github.com/webdataset/webdataset, "The WebDataset Format")."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vila.core.errors import DataError
from vila.data.handles import Stamp, read_span

_FLUSH = 4096
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")


class Member(NamedTuple):
    """A file inside a tar: the extension behind its key, its whole name, where its bytes lie."""

    extension: str
    name: str
    offset: int
    size: int


def scan_tar(path: Path, advanced: Callable[[int], None]) -> Iterator[np.ndarray]:
    """Offset of the first header and size in bytes of every sample, uint64 [k, 2] at a time.

    Raises DataError naming shard and member for a shard that is cut, a sample whose members do not stand together,
    a member that stands twice, and members that are not files.
    """
    found: list[tuple[int, int]] = []
    seen: set[str] = set()
    key, start, end, done = "", 0, 0, 0
    names: set[str] = set()
    size = path.stat().st_size
    with path.open("rb") as stream:
        for info, begin in _infos(path, stream, size):
            split = split_name(info.name)
            if split is None:
                continue
            if split[0] != key:
                if key:
                    found.append((start, end - start))
                if split[0] in seen:
                    raise DataError(
                        f"{path}: member {info.name!r} stands apart from the others of sample {split[0]!r}; "
                        "write the members of a sample one after the other (tar --sort=name)"
                    )
                key, start = split[0], begin
                seen.add(key)
                names.clear()
                if len(found) == _FLUSH:
                    advanced(start - done)
                    done = start
                    yield np.array(found, dtype=np.uint64)
                    found.clear()
            if split[1] in names:
                raise DataError(f"{path}: member {info.name!r} stands twice")
            names.add(split[1])
            end = info.offset_data + (info.size + 511) // 512 * 512
    if key:
        found.append((start, end - start))
    advanced(size - done)
    if found:
        yield np.array(found, dtype=np.uint64)


def _infos(path: Path, stream: io.BufferedReader, size: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Every member that is a file, and where its first header begins."""
    last = "the beginning"
    begin = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined] # else the whole table of contents stays in memory
                if info.isreg():
                    if info.offset_data + info.size > size:
                        raise _cut(path, f"inside member {info.name!r}", size)
                    yield info, begin
                elif not info.isdir():
                    raise DataError(f"{path}: member {info.name!r} is a link or a device; a shard holds plain files")
                last, begin = f"member {info.name!r}", tar.offset
            stream.seek(tar.offset)
            if stream.read(512) != bytes(512):
                raise _cut(path, f"after {last}", tar.offset)
    except DataError:
        raise
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise _cut(path, f"after {last}", size, str(error)) from error


def _cut(path: Path, place: str, offset: int, reason: str = "no end-of-archive mark") -> DataError:
    return DataError(
        f"{path}: the shard is cut or damaged {place} (byte {offset}: {reason}); copy or download it again"
    )


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case extension of a member, or None for files that belong to no sample (hidden, without a dot)."""
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension:
        return None
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def read_members(path: Path, offset: int, size: int, stamp: Stamp) -> tuple[str, list[Member]]:
    """Key and members of the sample in a span that `scan_tar` gave; reads headers only. Raises DataError."""
    key, members = "", []
    with tarfile.TarFile(fileobj=_Span(path, offset, size, stamp), mode="r") as tar:  # type: ignore[arg-type]
        while (info := tar.next()) is not None:
            split = split_name(info.name)
            if info.isreg() and split is not None:
                key = split[0]
                members.append(Member(split[1], info.name, offset + info.offset_data, info.size))
    if not members:
        raise DataError(f"{path}: no members at byte {offset}; the file has changed since it was indexed")
    return key, members


class _Span:
    """A part of a file as a file that can be read and moved about in."""

    def __init__(self, path: Path, offset: int, size: int, stamp: Stamp) -> None:
        self.name = str(path)
        self._path, self._offset, self._size, self._stamp = path, offset, size, stamp
        self._at = 0

    def read(self, size: int) -> bytes:
        size = max(0, min(size, self._size - self._at))
        content = read_span(self._path, self._offset + self._at, size, self._stamp)
        self._at += size
        return content

    def seek(self, place: int) -> int:
        self._at = place
        return place

    def tell(self) -> int:
        return self._at
