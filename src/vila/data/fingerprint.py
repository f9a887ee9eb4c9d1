"""Fingerprints of files (size, time, content hash) that detect whether the input files of a run have changed.

Files of a set of at most WHOLE_BYTES are hashed completely. In larger sets each file is hashed at 16 evenly spaced
samples of 64 KiB, including its first and last bytes. A file whose size and time are unchanged is not read again, so
checking a large data set costs one `stat` per file.
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
    """Size, modification time and content hash of a file.

    pieces: number of sampled blocks that `sha256` covers; 0: the whole file.
    """

    size: int
    mtime_ns: int
    pieces: int
    sha256: str


class FileChange(NamedTuple):
    """A changed file, and what differs: before and now."""

    name: str
    before: str
    now: str


def fingerprint_files(files: Mapping[str, Path]) -> dict[str, FileFingerprint]:
    """Return the fingerprints of files by name. Raises DataError naming a file that cannot be read."""
    sizes = {name: _state(path)[0] for name, path in files.items()}
    sampled = sum(sizes.values()) > WHOLE_BYTES
    wanted = {name: _PIECES if sampled and size > _PIECES * _PIECE_BYTES else 0 for name, size in sizes.items()}
    with ThreadPoolExecutor(_THREADS, "fingerprint") as pool:
        return dict(zip(files, pool.map(_fingerprint, files.values(), wanted.values()), strict=True))


def compare_files(
    before: Mapping[str, FileFingerprint], files: Mapping[str, Path]
) -> tuple[list[FileChange], dict[str, FileFingerprint]]:
    """Compare files with their fingerprints; return the changes, and the current fingerprints of unchanged files.

    A file that was copied or touched has another time and the same content, so it is unchanged.
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
        now = was if mtime_ns == was.mtime_ns else _fingerprint(files[name], was.pieces)
        if now.sha256 != was.sha256:
            changes.append(FileChange(name, f"sha256 {was.sha256[:16]}", f"sha256 {now.sha256[:16]}"))
        else:
            same[name] = now
    return changes, same


def _state(path: Path) -> tuple[int, int]:
    with file_errors(path, DataError):
        found = path.stat()
    return found.st_size, found.st_mtime_ns


def _fingerprint(path: Path, pieces: int) -> FileFingerprint:
    size, mtime_ns = _state(path)
    digest = hashlib.sha256()
    with file_errors(path, DataError), path.open("rb") as stream:
        for offset, length in _spans(size, pieces):
            stream.seek(offset)
            digest.update(stream.read(length))
    return FileFingerprint(size, mtime_ns, pieces, digest.hexdigest())


def _spans(size: int, pieces: int) -> Iterator[tuple[int, int]]:
    """Yield offset and length of the parts to hash: all blocks, or evenly spaced samples from first to last byte."""
    if not pieces:
        yield from ((offset, _BLOCK_BYTES) for offset in range(0, size, _BLOCK_BYTES))
        return
    for number in range(pieces):
        yield (size - _PIECE_BYTES) * number // (pieces - 1), _PIECE_BYTES
