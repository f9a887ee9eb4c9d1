"""The footer of a parquet file, checked against the file: positions, sizes and counts.

pyarrow ends the process on some damaged column metadata, and reads the last one of several joined files without a word;
so the few fields that matter are read here, from Thrift's compact protocol
(https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

from vila.core.errors import DataError
from vila.core.reading import file_errors

_MAGIC = b"PAR1"
_MAX_DEPTH = 32
_CHUNK = 1 << 20
_HINT: Final = "copy or download it again"

# Numbers of the fields in parquet.thrift.
_NUM_ROWS, _ROW_GROUPS = 3, 4
_COLUMNS, _GROUP_ROWS = 1, 3
_METADATA, _FILE_PATH, _INDEXES = 3, 1, ((4, 5), (6, 7))
_COMPRESSED_SIZE, _DATA_PAGE, _DICTIONARY_PAGE, _BLOOM_FILTER = 7, 9, 11, (14, 15)
_SKIPPED: Mapping[str, frozenset[int]] = {
    "file": frozenset({2, 5, 7}),  # schema, key-value metadata, column orders
    "column": frozenset({2, 3, 8, 12, 13}),  # encodings, path, key-value metadata, statistics, encoding statistics
}


def row_group_sizes(path: Path) -> list[int]:
    """Return the number of records of each row group.

    Raises DataError for a file that is cut or damaged, for columns that are not in it, and for parquet files that were
    joined, of which the footer knows the last one alone.
    """
    with file_errors(path, kind="parquet", hint=_HINT), path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 8))
        tail = stream.read(8)
        footer = size - 8 - int.from_bytes(tail[:4], "little")
        if size < 12 or tail[4:] != _MAGIC or footer < len(_MAGIC):
            raise _damaged(path, "no footer at its end")
        stream.seek(footer)
        facts = _Compact(stream.read(size - 8 - footer)).struct("file")
        groups = facts.get(_ROW_GROUPS, [])
        counts = [group[_GROUP_ROWS] for group in groups]
        if any(count < 0 for count in counts) or sum(counts) != facts[_NUM_ROWS]:
            raise _damaged(path, f"{facts[_NUM_ROWS]} records, but row groups of {counts[:8]}")
        end = len(_MAGIC)
        for number, group in enumerate(groups):
            for column in group[_COLUMNS]:
                last = _end_of(column)
                if last is None or not len(_MAGIC) <= last <= footer:
                    raise _damaged(path, f"a column of row group {number} lies outside the file")
                end = max(end, last)
        # Bytes that belong to no column may be a writer's own.
        if end < footer and _holds(stream, footer, _MAGIC * 2):
            raise DataError(
                "several parquet files were joined; only the last one could be read",
                file=path,
                hint="give each file by itself",
            )
    return counts


def _holds(stream: BinaryIO, end: int, wanted: bytes) -> bool:
    """Whether `wanted` occurs before byte `end`."""
    stream.seek(0)
    tail = b""
    while stream.tell() < end and (chunk := stream.read(min(_CHUNK, end - stream.tell()))):
        if wanted in tail + chunk:
            return True
        tail = chunk[-len(wanted) + 1 :]
    return False


def _end_of(column: dict[int, Any]) -> int | None:
    """Return the end of a column's pages and indexes, None for a place that cannot be."""
    facts = column[_METADATA]
    if column.get(_FILE_PATH):
        return None
    pages = [facts[key] for key in (_DATA_PAGE, _DICTIONARY_PAGE) if facts.get(key)]
    begin, size = min(pages), facts[_COMPRESSED_SIZE]
    spans = [(begin, size)]
    spans += [(column[start], column[length]) for start, length in _INDEXES if column.get(start)]
    start, length = _BLOOM_FILTER
    spans += [(facts[start], facts.get(length, 0))] if facts.get(start) else []
    if any(begin < len(_MAGIC) or size < 0 for begin, size in spans):
        return None
    return int(max(begin + size for begin, size in spans))


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(f"the parquet file is damaged: {problem}", file=path, hint=_HINT)


class _Compact:
    """Reader of Thrift's compact protocol. Raises ValueError or LookupError for what is cut or damaged."""

    def __init__(self, raw: bytes) -> None:
        self._raw, self._at, self._depth = raw, 0, 0
        self._readers: Mapping[int, Callable[[], Any]] = {
            1: lambda: True, 2: lambda: False, 3: self._byte, 4: self._integer, 5: self._integer, 6: self._integer,
            7: lambda: self._bytes(8), 8: lambda: self._bytes(self._varint()), 9: self._list, 10: self._list,
            11: self._map, 12: self.struct,
        }  # fmt: skip

    def struct(self, name: str = "") -> dict[int, Any]:
        """Read a struct: values by the number of their field. name: for `_SKIPPED`, those fields are left out."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        found: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            column = number == _METADATA and name == "chunk"
            value = self.struct("column") if column and head & 15 == 12 else self._value(head & 15, name, number)
            if number not in _SKIPPED.get(name, ()):
                found[number] = value
        self._depth -= 1
        return found

    def _value(self, kind: int, name: str, number: int) -> Any:
        if kind == 9 and (name, number) == ("file", _ROW_GROUPS):
            return self._list("group")
        if kind == 9 and (name, number) == ("group", _COLUMNS):
            return self._list("chunk")
        if kind not in self._readers:
            raise ValueError(f"a value of the unknown type {kind}")
        return self._readers[kind]()

    def _list(self, name: str = "") -> list[Any]:
        head = self._byte()
        size = self._varint() if head >> 4 == 15 else head >> 4
        kind = head & 15
        if size > len(self._raw) - self._at:
            raise ValueError("a list that is longer than the footer")
        if kind == 12:
            return [self.struct(name) for _ in range(size)]
        read = self._byte if kind in (1, 2) else self._readers[kind]
        return [read() for _ in range(size)]

    def _map(self) -> None:
        size = self._varint()
        if size > len(self._raw) - self._at:
            raise ValueError("a map that is longer than the footer")
        kinds = self._byte() if size else 0
        for _ in range(size):
            self._readers[kinds >> 4]()
            self._readers[kinds & 15]()

    def _byte(self) -> int:
        value = self._raw[self._at]
        self._at += 1
        return value

    def _bytes(self, size: int) -> bytes:
        value = self._raw[self._at : self._at + size]
        if len(value) != size:
            raise ValueError("cut short")
        self._at += size
        return value

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number of over 64 bits")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
