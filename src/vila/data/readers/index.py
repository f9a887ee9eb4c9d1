"""Index of a data file: the byte range of every record, built once and cached on disk. Reads of byte ranges.

An index is a file in `cache_dir()/index`: a header of 4096 bytes (JSON, padded with spaces) and two little-endian
uint64 for each record. The header has size and time of the data file and a CRC-32 of the entries; if any of them
differs, the index is built again. Entries are read with `pread`, not mapped: pages of a mapping that were touched count
as memory of the process, and an epoch in random order touches all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vila.core.errors import DataError
from vila.core.files import atomic_path, cache_dir
from vila.core.progress import SILENT, Events, task
from vila.core.reading import parse_json

MAX_OPEN = 64
"""Number of files that a process keeps open; the least recently read is closed first."""


class FileVersion(NamedTuple):
    """Size and modification time of a file; another version of the file has other values."""

    size: int
    mtime_ns: int


def file_version(path: Path) -> FileVersion:
    """Return size and time of a file. Raises DataError if it does not exist or is a directory."""
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    if path.is_dir():
        raise DataError("is a directory", file=path, expected="a file")
    return FileVersion(found.st_size, found.st_mtime_ns)


class _Handle:
    """A file descriptor that is closed with its last reference."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


_handle = lru_cache(maxsize=MAX_OPEN)(_Handle)


def read_span(path: Path, offset: int, size: int, version: FileVersion | None = None) -> bytes:
    """Read exactly `size` bytes from `offset`. Thread-safe; shares no file position with threads or child processes.

    version: expected version of the file, None for any.
    Raises DataError if the file does not exist, is too short or has changed.
    """
    try:
        handle = _handle(path)
        found = os.fstat(handle.number)
        if version is not None and version != (found.st_size, found.st_mtime_ns):
            # The handle may be older than the index: open the file again.
            _handle.cache_clear()
            handle = _handle(path)
            found = os.fstat(handle.number)
            if version != (found.st_size, found.st_mtime_ns):
                raise changed_file_error(path)
        # Check the size before allocating memory for it.
        missing = offset + size - found.st_size
        content = _read(handle.number, offset, size) if missing <= 0 else b""
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(content) != size:
        problem = f"the file ends {max(missing, 0) or size - len(content)} bytes too early, before byte {offset + size}"
        raise DataError(problem, file=path, hint="copy or download it again")
    return content


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(error.strerror or str(error) if path.exists() else "no such file", file=path)


def _read(number: int, offset: int, size: int) -> bytes:
    content = os.pread(number, size, offset)
    while len(content) < size and (more := os.pread(number, size - len(content), offset + len(content))):
        content += more
    return content


def changed_file_error(path: Path) -> DataError:
    """Return the error for a file that was written to after it was opened."""
    hint = "wait until its writer has finished, then retry"
    return DataError("the file has changed since it was opened", file=path, hint=hint)


VERSION = 2
_HEADER = 4096
_CHUNK = 1 << 20
_ENTRY = struct.Struct("<QQ")

Scan = Callable[[Path, Callable[[int], None]], Iterable[np.ndarray]]
"""Scans a data file once: yields uint64 [k, 2] in order, and reports the number of bytes scanned."""


class Index:
    """Two numbers for each record of a data file, usually offset and size. Not held in memory; cheap to pickle."""

    def __init__(self, path: Path, file: Path, version: FileVersion, length: int) -> None:
        """path: data file. file: index file. version: of the data file when it was indexed."""
        self.path, self.file, self.version, self._length = path, file, version, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> tuple[int, int]:
        """Read the entry of record `number`. Raises IndexError outside range(len), DataError without the index file."""
        if not 0 <= number < self._length:
            raise IndexError(f"record {number} is outside range({self._length}) of {self.path}")
        first, second = _ENTRY.unpack(read_span(self.file, _HEADER + number * _ENTRY.size, _ENTRY.size))
        return first, second

    def table(self) -> np.ndarray:
        """Read all entries, uint64 [N, 2]."""
        raw = read_span(self.file, _HEADER, self._length * _ENTRY.size)
        return np.frombuffer(raw, dtype="<u8").reshape(-1, 2)


def index_folder() -> Path:
    """Return the directory of index files."""
    return cache_dir() / "index"


def open_index(path: Path, kind: str, scan: Scan, events: Events = SILENT) -> Index:
    """Open the index of a data file; build it if it is missing or damaged, or if the data file has changed.

    kind: identifies the scan; each kind of a data file has its own index.
    Processes may build the same index at once: each writes a temporary file and renames it.
    Raises DataError if the data file is missing, cannot be scanned, or changes during the scan.
    """
    version = file_version(path)
    real = os.path.realpath(path)
    digest = hashlib.sha256(f"{kind}\0{real}".encode(errors="surrogateescape")).hexdigest()[:32]
    file = index_folder() / f"{digest}.index"
    # The path is for humans; cut to fit the header whatever its characters are.
    header = {"version": VERSION, "kind": kind, "path": real[-200:], **version._asdict()}
    found = read_header(file)
    if found is None or header.items() - found.items() or _checksum(file) != found["crc32"]:
        _build(path, file, header, scan, events)
        if file_version(path) != version:
            raise changed_file_error(path)
        found = read_header(file)
    if found is None:
        raise DataError(f"the index of {path} was removed while it was opened", file=file, hint="start again")
    # A cached handle of a replaced index file would give the old entries.
    _handle.cache_clear()
    return Index(path, file, version, found["length"])


def read_header(file: Path) -> dict[str, Any] | None:
    """Return the header of an index file, None if it is missing, cut or not an index."""
    try:
        with file.open("rb") as stream:
            found = parse_json(stream.read(_HEADER), file=file, surrogates=True)
        size = file.stat().st_size
    except (OSError, DataError):
        return None
    if not isinstance(found, dict) or not all(type(found.get(key)) is int for key in ("length", "crc32")):
        return None
    whole = size == _HEADER + found["length"] * _ENTRY.size
    return found if whole and all(isinstance(value, str | int) for value in found.values()) else None


def _checksum(file: Path) -> int:
    """Return the CRC-32 of the entries: a flipped bit would cut records at the wrong bytes."""
    total = 0
    with file.open("rb") as stream:
        stream.seek(_HEADER)
        while chunk := stream.read(_CHUNK):
            total = zlib.crc32(chunk, total)
    return total


def _build(path: Path, file: Path, header: dict[str, Any], scan: Scan, events: Events) -> None:
    name = f"index {path.name}"
    length = checksum = 0
    with task(events, name, header["size"], "bytes"), atomic_path(file) as part, part.open("wb") as stream:
        stream.write(b" " * _HEADER)
        for entries in scan(path, lambda amount: events.advanced(name, amount)):
            content = np.ascontiguousarray(entries, dtype="<u8").tobytes()
            checksum = zlib.crc32(content, checksum)
            stream.write(content)
            length += len(entries)
        stream.seek(0)
        stream.write(json.dumps({**header, "length": length, "crc32": checksum}).encode().ljust(_HEADER))
