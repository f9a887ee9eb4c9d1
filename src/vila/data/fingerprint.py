"""Stamps of files: size, time and content hash, which tell whether a file is still the one that a run began with.

Files of a set that is not larger than WHOLE_BYTES are hashed whole. Of larger sets (shards of terabytes) each file is
hashed at 16 evenly spaced pieces of 64 KiB, its first and last bytes among them: 1 MiB a file. A file whose size and
time are unchanged is not read again, so checking a large data set costs a `stat` for each file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from vila.core.errors import DataError
from vila.core.reading import file_errors

WHOLE_BYTES = 2 * 2**30
_PIECES = 16
_PIECE_BYTES = 64 * 2**10
_BLOCK_BYTES = 2**20
_THREADS = 8


class FileFingerprint(NamedTuple):
    """State of a file.

    pieces: how many pieces `sha256` is of; 0: the whole file.
    """

    size: int
    mtime_ns: int
    pieces: int
    sha256: str


class FileChange(NamedTuple):
    """A file that differs; what of it, before and now."""

    name: str
    before: str
    now: str


def fingerprint_files(files: Mapping[str, Path]) -> dict[str, FileFingerprint]:
    """Return the stamps of files by name. Raises DataError naming one that cannot be read."""
    sizes = {name: _state(path)[0] for name, path in files.items()}
    sampled = sum(sizes.values()) > WHOLE_BYTES
    wanted = {name: _PIECES if sampled and size > _PIECES * _PIECE_BYTES else 0 for name, size in sizes.items()}
    with ThreadPoolExecutor(_THREADS, "stamp") as pool:
        return dict(zip(files, pool.map(_stamp, files.values(), wanted.values()), strict=True))


def compare_files(
    before: Mapping[str, FileFingerprint], files: Mapping[str, Path]
) -> tuple[list[FileChange], dict[str, FileFingerprint]]:
    """Compare files with their stamps: the changes, and the stamps of those that are the same, with their time of now.

    A file that was copied or touched has another time and the same content: it is the same.
    Raises DataError naming a file that cannot be read.
    """
    changes = [FileChange(name, "there", "missing") for name in before if name not in files]
    changes += [FileChange(name, "not there", "new") for name in files if name not in before]
    same: dict[str, FileFingerprint] = {}
    for name in (name for name in files if name in before):
        was, (size, mtime_ns) = before[name], _state(files[name])
        if size != was.size:
            changes.append(FileChange(name, f"{was.size:,} bytes", f"{size:,} bytes"))
            continue
        now = was if mtime_ns == was.mtime_ns else _stamp(files[name], was.pieces)
        if now.sha256 != was.sha256:
            changes.append(FileChange(name, f"sha256 {was.sha256[:16]}", f"sha256 {now.sha256[:16]}"))
        else:
            same[name] = now
    return changes, same


def _state(path: Path) -> tuple[int, int]:
    with file_errors(path, DataError):
        found = path.stat()
    return found.st_size, found.st_mtime_ns


def _stamp(path: Path, pieces: int) -> FileFingerprint:
    size, mtime_ns = _state(path)
    digest = hashlib.sha256()
    with file_errors(path, DataError), path.open("rb") as stream:
        for offset, length in _spans(size, pieces):
            stream.seek(offset)
            digest.update(stream.read(length))
    return FileFingerprint(size, mtime_ns, pieces, digest.hexdigest())


def _spans(size: int, pieces: int) -> Iterator[tuple[int, int]]:
    """Offset and length of what is hashed: all blocks of the file, or evenly spaced pieces from first to last byte."""
    if not pieces:
        yield from ((offset, _BLOCK_BYTES) for offset in range(0, size, _BLOCK_BYTES))
        return
    for number in range(pieces):
        yield (size - _PIECE_BYTES) * number // (pieces - 1), _PIECE_BYTES
