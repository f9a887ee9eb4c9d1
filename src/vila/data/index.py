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
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vila.core.errors import DataError
from vila.core.events import SILENT, Events, task
from vila.core.files import atomic_path, cache_dir
from vila.core.reading import parse_json
from vila.data.handles import Stamp, changed, forget, read_span, stamp_of

VERSION = 2
_HEADER = 4096
_CHUNK = 1 << 20
_ROW = struct.Struct("<QQ")

Scan = Callable[[Path, Callable[[int], None]], Iterable[np.ndarray]]
"""Reads a data file once: yields uint64 [k, 2] in order, and reports the bytes it has gone through."""


class Index:
    """Rows of two numbers for each record of a data file. Holds no table in memory; cheap to pickle."""

    def __init__(self, path: Path, file: Path, stamp: Stamp, length: int) -> None:
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
    stamp = stamp_of(path)
    place = os.path.realpath(path)
    digest = hashlib.sha256(f"{kind}\0{place}".encode(errors="surrogateescape")).hexdigest()[:32]
    file = index_folder() / f"{digest}.index"
    # The path is for readers; cut, so that it fits whatever its characters are.
    header = {"version": VERSION, "kind": kind, "path": place[-200:], "size": stamp.size, "mtime_ns": stamp.mtime_ns}
    found = read_header(file)
    if found is None or header.items() - found.items() or _checksum(file) != found["crc32"]:
        _build(path, file, header, scan, events)
        if stamp_of(path) != stamp:
            raise changed(path)
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
