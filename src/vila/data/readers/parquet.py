"""Records of parquet files. Columns of a row group are decoded when needed and cached; footers are checked first."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, Final

import numpy as np

from vila.core.errors import DataError
from vila.core.optional import require
from vila.core.reading import file_errors
from vila.data.readers.index import FileVersion, changed_file_error, file_version
from vila.data.readers.media_refs import Keys, decode_base64, key_path, value_name

_MAGIC = b"PAR1"
_MAX_DEPTH = 32
_HINT: Final = "copy or download it again"

# Field numbers in parquet.thrift.
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

    The footer is parsed here, because pyarrow aborts the process on some damaged footers.
    Raises DataError if the file is cut or damaged, if a column is outside of it, or if several parquet files were
    concatenated (the footer describes the last one only).
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
                    raise _damaged(path, "a column is outside of the file", record=f"row group {number}")
                end = max(end, last)
        # Bytes that belong to no column are those of the writer, or of files before the last one, whose columns have
        # offsets from its own start.
        if end < footer:
            with mmap(stream.fileno(), 0, access=ACCESS_READ) as content:
                if content.find(_MAGIC * 2, 0, footer - end + len(_MAGIC)) >= 0:
                    problem = "several parquet files were concatenated; only the last one could be read"
                    raise DataError(problem, file=path, hint="use the original files")
    return counts


def _end_of(column: dict[int, Any]) -> int | None:
    """Return the end of a column's pages and indexes, None if their positions are impossible."""
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


def _damaged(path: Path, problem: str, record: str | None = None) -> DataError:
    return DataError(f"the parquet file is damaged: {problem}", file=path, record=record, hint=_HINT)


class _Compact:
    """Reader of Thrift's compact protocol. Raises ValueError or LookupError for damaged input."""

    def __init__(self, raw: bytes) -> None:
        self._raw, self._at, self._depth = raw, 0, 0
        self._readers: Mapping[int, Callable[[], Any]] = {
            1: lambda: True, 2: lambda: False, 3: self._byte, 4: self._integer, 5: self._integer, 6: self._integer,
            7: lambda: self._bytes(8), 8: lambda: self._bytes(self._varint()), 9: self._list, 10: self._list,
            11: self._map, 12: self.struct,
        }  # fmt: skip

    def struct(self, name: str = "") -> dict[int, Any]:
        """Read a struct as values by field number. name: key of `_SKIPPED`, whose fields are left out."""
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


CACHE_BYTES = 256 << 20
"""Bytes of decoded columns that a process caches; at least two columns, however large."""


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """Bytes, or base64 text, in a parquet file.

    row: number of the record, from 0 over the whole file. keys: path from the column's value to the bytes.
    """

    path: Path
    row: int
    column: str
    keys: Keys = ()
    version: FileVersion | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """File, record, column and key path."""
        return value_name(self.path, self.row, (self.column, *self.keys))

    def read(self) -> bytes:
        """Read the bytes. Raises DataError if the file has changed or the cell is empty."""
        value = read_cell(self.path, self.row, self.column, self.keys, self.version)
        if isinstance(value, bytes):
            return value
        return decode_base64(value, file=self.path, record=self.row, field=key_path((self.column, *self.keys)))


def scan_parquet(path: Path, advanced: Callable[[int], None]) -> Iterator[np.ndarray]:
    """Yield first record and number of records of every row group, uint64 [k, 2].

    Raises DataError if the file is not parquet, or as `row_group_sizes` does.
    """
    _open(path)
    counts = row_group_sizes(path)
    advanced(path.stat().st_size)
    yield np.stack([np.cumsum([0, *counts])[: len(counts)], counts], axis=1).astype(np.uint64).reshape(-1, 2)


def column_names(path: Path) -> tuple[str, ...]:
    """Return the column names of a file. Raises DataError if it is not parquet."""
    return tuple(_schema(path).names)


def schema_record(path: Path) -> dict[str, Any]:
    """Return an example record with an empty value of each column's type, from the footer alone."""
    import pyarrow as pa

    def example(kind: Any) -> Any:
        if pa.types.is_struct(kind):
            return {field.name: example(field.type) for field in kind}
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            return [example(kind.value_type)]
        return b"" if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else ""

    schema = _schema(path)
    with file_errors(path, kind="parquet", hint=_HINT):
        return {field.name: example(field.type) for field in schema}


def _schema(path: Path) -> Any:
    opened = _open(path)
    with file_errors(path, kind="parquet", hint=_HINT):
        return opened.schema_arrow


def read_row(path: Path, row: int, columns: tuple[str, ...], version: FileVersion) -> dict[str, Any]:
    """Read a record as plain Python values; bytes become `ParquetCell` references. Raises DataError."""
    value = {}
    for column in columns:
        scalar = _scalar(path, row, column, version)
        with file_errors(path, record=row, kind="parquet", hint=_HINT):
            value[column] = _plain(scalar, ParquetCell(path, row, column, (), version))
    return value


def read_cell(path: Path, row: int, column: str, keys: Keys, version: FileVersion | None) -> Any:
    """Read the value at a key path of a column. Raises DataError if there is none."""
    scalar = _scalar(path, row, column, version or file_version(path))
    for key in keys:
        try:
            scalar = scalar[key]
        except (LookupError, TypeError) as error:
            raise DataError("is empty", file=path, record=row, field=key_path((column, *keys))) from error
    with file_errors(path, record=row, kind="parquet", hint=_HINT):
        return scalar.as_py()


def _plain(scalar: Any, here: ParquetCell) -> Any:
    import pyarrow as pa

    if not scalar.is_valid:
        return None
    kind = scalar.type
    if isinstance(scalar, pa.ExtensionScalar | pa.DictionaryScalar):
        return _plain(scalar.value, here)
    if any(is_bytes(kind) for is_bytes in _bytes_types(pa)):
        return here
    if pa.types.is_struct(kind):
        return {name: _plain(scalar[name], _inside(here, name)) for name in scalar}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [_plain(scalar[number], _inside(here, number)) for number in range(len(scalar))]
    return scalar.as_py()


def _bytes_types(pa: Any) -> tuple[Callable[[Any], bool], ...]:
    kinds = pa.types
    return kinds.is_binary, kinds.is_large_binary, kinds.is_fixed_size_binary, kinds.is_binary_view


def _inside(cell: ParquetCell, key: str | int) -> ParquetCell:
    return ParquetCell(cell.path, cell.row, cell.column, (*cell.keys, key), cell.version)


def _scalar(path: Path, row: int, column: str, version: FileVersion) -> Any:
    starts = _opened(path, version)[1]
    group = int(np.searchsorted(starts, row, side="right")) - 1
    return _DECODED.read(path, version, group, column)[row - int(starts[group])]


@lru_cache(maxsize=16)
def _opened(path: Path, version: FileVersion) -> tuple[Any, np.ndarray]:
    """Return an open file and the first record of each row group."""
    if file_version(path) != version:
        raise changed_file_error(path)
    opened = _open(path)
    counts = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
    return opened, np.cumsum([0, *counts[:-1]])


class _Columns:
    """Cache of decoded columns; the least recently used are dropped."""

    def __init__(self) -> None:
        self._columns: OrderedDict[tuple[Path, FileVersion, int, str], Any] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def read(self, path: Path, version: FileVersion, group: int, column: str) -> Any:
        key = (path, version, group, column)
        with self._lock:
            if key not in self._columns:
                values = _read_column(path, _opened(path, version)[0], group, column)
                self._columns[key] = values
                self._bytes += values.nbytes
                while self._bytes > CACHE_BYTES and len(self._columns) > 2:
                    _, gone = self._columns.popitem(last=False)
                    self._bytes -= gone.nbytes
            self._columns.move_to_end(key)
            return self._columns[key]


def _read_column(path: Path, opened: Any, group: int, column: str) -> Any:
    names = opened.schema_arrow.names
    if names.count(column) != 1:
        problem = f"{names.count(column)} columns have this name" if column in names else "no such column"
        raise DataError(problem, file=path, field=column, expected=f"one of {', '.join(names)}")
    with file_errors(path, record=f"row group {group}", kind="parquet", hint=_HINT):
        values = opened.read_row_group(group, columns=[column], use_threads=False)[column]
        expected = opened.metadata.row_group(group).num_rows
    if len(values) != expected:
        raise DataError(
            f"row group {group} contains {len(values)} of {expected} values", file=path, field=column, hint=_HINT
        )
    return values


def _open(path: Path) -> Any:
    _, pq = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
    with file_errors(path, kind="parquet", hint=_HINT):
        return pq.ParquetFile(path)


_DECODED = _Columns()


def _reset_after_fork() -> None:
    """Open files again: locks that another thread held at the moment of the fork are never released in the child."""
    global _DECODED
    _opened.cache_clear()
    _DECODED = _Columns()


os.register_at_fork(after_in_child=_reset_after_fork)
