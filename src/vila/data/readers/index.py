"""Byte ranges of the records of a data file: a table of spans, built once and stored beside other caches.

An index is one file below `cache_dir()/index`: a header of 4096 bytes (JSON, padded with spaces) and a row of two
little-endian uint64 for each record. The header holds size and time of the data file and a CRC-32 of the rows; an index
that differs in any of them is built anew. A row is read from the disk when it is needed, not mapped: pages of a mapping
that were touched count as memory of the process, and an epoch in random order touches all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vila.core.errors import DataError
from vila.core.files import atomic_path, cache_dir
from vila.core.progress import SILENT, Events, task
from vila.core.reading import parse_json

# --- handles
# Open files of this process, few at a time, and reads that notice when a file is not the one that was indexed.


MAX_OPEN = 64
"""Files that one process keeps open; the one not read for longest is closed first."""


class FileVersion(NamedTuple):
    """What tells one state of a file from another."""

    size: int
    mtime_ns: int


def file_version(path: Path) -> FileVersion:
    """Size and time of a file. Raises DataError when it is not there or not a file."""
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    if path.is_dir():
        raise DataError("a directory, expected a file", file=path)
    return FileVersion(found.st_size, found.st_mtime_ns)


class _Handle:
    """A file descriptor that is closed when nobody reads from it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class _Handles:
    def __init__(self) -> None:
        self._open: OrderedDict[Path, _Handle] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, path: Path) -> _Handle:
        with self._lock:
            handle = self._open.get(path)
            if handle is None:
                handle = self._open[path] = _Handle(path)
                while len(self._open) > MAX_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
            return handle

    def forget(self, path: Path) -> None:
        with self._lock:
            self._open.pop(path, None)


_HANDLES = _Handles()


def _start_anew() -> None:
    global _HANDLES
    _HANDLES = _Handles()


# A lock that another thread held at the moment of the fork would never be released in the child.
os.register_at_fork(after_in_child=_start_anew)


def read_span(path: Path, offset: int, size: int, stamp: FileVersion | None = None) -> bytes:
    """Exactly `size` bytes from `offset`. Threads may call it; no position is shared between them or with children.

    stamp: what the file was when `offset` was noted.
    Raises DataError when the file is not there, is shorter, or is not what it was.
    """
    try:
        handle = _HANDLES[path]
        found = os.fstat(handle.number)
        if stamp is not None and stamp != (found.st_size, found.st_mtime_ns):
            # The handle may be older than the index; a fresh one decides.
            forget(path)
            handle = _HANDLES[path]
            found = os.fstat(handle.number)
            if stamp != (found.st_size, found.st_mtime_ns):
                raise changed_file_error(path)
        # Sizes that are wrong are refused before memory is taken for them.
        missing = offset + size - found.st_size
        content = _read(handle.number, offset, size) if missing <= 0 else b""
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(content) != size:
        raise DataError(
            f"ends {max(missing, 0) or size - len(content)} bytes before byte {offset + size}",
            file=path,
            hint="copy or download it again",
        )
    return content


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(error.strerror or str(error) if path.exists() else "no such file", file=path)


def forget(path: Path) -> None:
    """Open `path` anew at its next reading."""
    _HANDLES.forget(path)


def _read(number: int, offset: int, size: int) -> bytes:
    content = os.pread(number, size, offset)
    while len(content) < size and (more := os.pread(number, size - len(content), offset + len(content))):
        content += more
    return content


def changed_file_error(path: Path) -> DataError:
    """The error for a file that was written to after it was indexed."""
    return DataError(
        "the file has changed since it was opened", file=path, hint="let its writer finish, then start again"
    )


VERSION = 2
_HEADER = 4096
_CHUNK = 1 << 20
_ROW = struct.Struct("<QQ")

Scan = Callable[[Path, Callable[[int], None]], Iterable[np.ndarray]]
"""Reads a data file once: yields uint64 [k, 2] in order, and reports the bytes it has gone through."""


class Index:
    """Rows of two numbers for each record of a data file. Holds no table in memory; cheap to pickle."""

    def __init__(self, path: Path, file: Path, stamp: FileVersion, length: int) -> None:
        """path: the data file. file: the index file. stamp: what the data file was when it was indexed."""
        self.path, self.file, self.stamp, self._length = path, file, stamp, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> tuple[int, int]:
        """The row of record `number`, from 0. Raises IndexError outside range(len), DataError without its file."""
        if not 0 <= number < self._length:
            raise IndexError(f"record {number} is outside range({self._length}) of {self.path}")
        first, second = _ROW.unpack(read_span(self.file, _HEADER + number * _ROW.size, _ROW.size))
        return first, second

    def table(self) -> np.ndarray:
        """All rows as uint64 [N, 2], in memory."""
        raw = read_span(self.file, _HEADER, self._length * _ROW.size)
        return np.frombuffer(raw, dtype="<u8").reshape(-1, 2)


def index_folder() -> Path:
    """Return the folder that indexes are stored in."""
    return cache_dir() / "index"


def open_index(path: Path, kind: str, scan: Scan, events: Events = SILENT) -> Index:
    """Open the index of a data file; build it if there is none, or if it is damaged or the file has changed since.

    kind: what was indexed and how; another kind of the same file is another index.
    Two processes may build at once: each writes a file of its own, and the last one to finish stays.
    Raises DataError if the file is absent, cannot be scanned, or changes meanwhile.
    """
    stamp = file_version(path)
    place = os.path.realpath(path)
    digest = hashlib.sha256(f"{kind}\0{place}".encode(errors="surrogateescape")).hexdigest()[:32]
    file = index_folder() / f"{digest}.index"
    # The path is for readers; cut, so that it fits whatever its characters are.
    header = {"version": VERSION, "kind": kind, "path": place[-200:], "size": stamp.size, "mtime_ns": stamp.mtime_ns}
    found = read_header(file)
    if found is None or header.items() - found.items() or _checksum(file) != found["crc32"]:
        _build(path, file, header, scan, events)
        if file_version(path) != stamp:
            raise changed_file_error(path)
        found = read_header(file)
    if found is None:
        raise DataError(f"the index of {path} was removed while it was opened", file=file, hint="start again")
    # A handle from before the file was replaced would still give the old rows.
    forget(file)
    return Index(path, file, stamp, found["length"])


def read_header(file: Path) -> dict[str, Any] | None:
    """Return the header of an index file, or None if it is absent, cut or no index."""
    try:
        with file.open("rb") as stream:
            found = parse_json(stream.read(_HEADER), file=file, surrogates=True)
        size = file.stat().st_size
    except (OSError, DataError):
        return None
    if not isinstance(found, dict) or not all(type(found.get(key)) is int for key in ("length", "crc32")):
        return None
    whole = size == _HEADER + found["length"] * _ROW.size
    return found if whole and all(isinstance(value, str | int) for value in found.values()) else None


def _checksum(file: Path) -> int:
    """CRC-32 of the rows: a flipped bit would cut records at the wrong bytes."""
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
        for rows in scan(path, lambda amount: events.advanced(name, amount)):
            content = np.ascontiguousarray(rows, dtype="<u8").tobytes()
            checksum = zlib.crc32(content, checksum)
            stream.write(content)
            length += len(rows)
        stream.seek(0)
        stream.write(json.dumps({**header, "length": length, "crc32": checksum}).encode().ljust(_HEADER))
