"""Records of parquet files: a column of a row group is decoded when it is needed, and the last few stay in memory."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vila.core.errors import DataError
from vila.core.optional import require
from vila.core.reading import file_errors
from vila.data.formats.parquet_footer import row_group_sizes
from vila.data.formats.stored import Keys, decode_base64, name_of, written
from vila.data.handles import Stamp, changed, stamp_of

CACHE_BYTES = 256 << 20
"""Decoded columns that one process keeps. At least two stay, however large."""
MAX_FILES = 16
_AGAIN = "copy or download it again"


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """Bytes, or base64 text, in a parquet file.

    row: counted from 0 over the whole file. place: the way from the column's value to the bytes.
    """

    path: Path
    row: int
    column: str
    place: Keys = ()
    stamp: Stamp | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """File, record, column and place."""
        return name_of(self.path, self.row, (self.column, *self.place))

    def read(self) -> bytes:
        """Read the bytes. Raises DataError if the file has changed or the cell holds nothing."""
        value = read_cell(self.path, self.row, self.column, self.place, self.stamp)
        if isinstance(value, bytes):
            return value
        return decode_base64(value, file=self.path, record=self.row, field=written((self.column, *self.place)))


def scan_parquet(path: Path, advanced: Callable[[int], None]) -> Iterator[np.ndarray]:
    """Yield first record and number of records of every row group, uint64 [k, 2].

    Raises DataError for what is not parquet and for what `row_group_sizes` refuses.
    """
    _open(path)
    counts = row_group_sizes(path)
    advanced(path.stat().st_size)
    yield np.stack([np.cumsum([0, *counts])[: len(counts)], counts], axis=1).astype(np.uint64).reshape(-1, 2)


def column_names(path: Path) -> tuple[str, ...]:
    """Return the names of the columns of a file. Raises DataError for what is not parquet."""
    return tuple(_schema(path).names)


def schema_record(path: Path) -> dict[str, Any]:
    """Return a record with the columns of a file and values of their types, from the footer alone."""
    import pyarrow as pa

    def example(kind: Any) -> Any:
        if pa.types.is_struct(kind):
            return {field.name: example(field.type) for field in kind}
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            return [example(kind.value_type)]
        return b"" if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else ""

    schema = _schema(path)
    with file_errors(path, kind="parquet", hint=_AGAIN):
        return {field.name: example(field.type) for field in schema}


def _schema(path: Path) -> Any:
    opened = _open(path)
    with file_errors(path, kind="parquet", hint=_AGAIN):
        return opened.schema_arrow


def read_row(path: Path, row: int, columns: tuple[str, ...], stamp: Stamp) -> dict[str, Any]:
    """Read the values of a record in plain types; bytes stay in the file, as `ParquetCell`. Raises DataError."""
    value = {}
    for column in columns:
        scalar = _scalar(path, row, column, stamp)
        with file_errors(path, record=row, kind="parquet", hint=_AGAIN):
            value[column] = _plain(scalar, ParquetCell(path, row, column, (), stamp))
    return value


def read_cell(path: Path, row: int, column: str, place: Keys, stamp: Stamp | None) -> Any:
    """Read the value at a place of a record. Raises DataError if there is none."""
    scalar = _scalar(path, row, column, stamp or stamp_of(path))
    for key in place:
        try:
            scalar = scalar[key]
        except (LookupError, TypeError) as error:
            raise DataError("holds nothing", file=path, record=row, field=written((column, *place))) from error
    with file_errors(path, record=row, kind="parquet", hint=_AGAIN):
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
    return ParquetCell(cell.path, cell.row, cell.column, (*cell.place, key), cell.stamp)


def _scalar(path: Path, row: int, column: str, stamp: Stamp) -> Any:
    starts = _STATE.starts(path, stamp)
    group = int(np.searchsorted(starts, row, side="right")) - 1
    return _STATE.column(path, group, column, stamp)[row - int(starts[group])]


class _State:
    """Files and columns of one process, the least recently used going first."""

    def __init__(self) -> None:
        self._files: OrderedDict[tuple[Path, Stamp], tuple[Any, np.ndarray]] = OrderedDict()
        self._columns: OrderedDict[tuple[Path, Stamp, int, str], Any] = OrderedDict()
        self._bytes = 0
        self._lock = threading.RLock()

    def starts(self, path: Path, stamp: Stamp) -> np.ndarray:
        return self._file(path, stamp)[1]

    def column(self, path: Path, group: int, column: str, stamp: Stamp) -> Any:
        key = (path, stamp, group, column)
        with self._lock:
            if key not in self._columns:
                values = _read_column(path, self._file(path, stamp)[0], group, column)
                self._columns[key] = values
                self._bytes += values.nbytes
                while self._bytes > CACHE_BYTES and len(self._columns) > 2:
                    _, gone = self._columns.popitem(last=False)
                    self._bytes -= gone.nbytes
            self._columns.move_to_end(key)
            return self._columns[key]

    def _file(self, path: Path, stamp: Stamp) -> tuple[Any, np.ndarray]:
        with self._lock:
            key = (path, stamp)
            if key not in self._files:
                if stamp_of(path) != stamp:
                    raise changed(path)
                opened = _open(path)
                counts = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
                self._files[key] = opened, np.cumsum([0, *counts[:-1]])
                while len(self._files) > MAX_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(key)
            return self._files[key]


def _read_column(path: Path, opened: Any, group: int, column: str) -> Any:
    names = opened.schema_arrow.names
    if names.count(column) != 1:
        problem = f"{names.count(column)} columns have this name" if column in names else "no such column"
        raise DataError(problem, file=path, field=column, expected=f"one of {', '.join(names)}")
    with file_errors(path, record=f"row group {group}", kind="parquet", hint=_AGAIN):
        values = opened.read_row_group(group, columns=[column], use_threads=False)[column]
        expected = opened.metadata.row_group(group).num_rows
    if len(values) != expected:
        raise DataError(
            f"row group {group} holds {len(values)} of {expected} values", file=path, field=column, hint=_AGAIN
        )
    return values


def _open(path: Path) -> Any:
    _, pq = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
    with file_errors(path, kind="parquet", hint=_AGAIN):
        return pq.ParquetFile(path)


_STATE = _State()


def _start_anew() -> None:
    global _STATE
    _STATE = _State()


os.register_at_fork(after_in_child=_start_anew)
