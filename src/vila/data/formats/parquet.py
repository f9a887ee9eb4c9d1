"""Rows of parquet files: a column of a row group is decoded when it is asked for, and the last few are kept."""

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
from vila.data.formats.stored import Keys, decode_base64, name_of, written
from vila.data.handles import Stamp, changed, stamp_of

CACHE_BYTES = 256 << 20
"""Decoded columns that one process keeps. At least two stay, however large."""
MAX_FILES = 16


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
        """The bytes. Raises DataError when the file has changed or the cell holds nothing."""
        value = read_cell(self.path, self.row, self.column, self.place, self.stamp)
        if isinstance(value, bytes):
            return value
        return decode_base64(value, file=self.path, record=self.row, field=written((self.column, *self.place)))


def scan_parquet(path: Path, advanced: Callable[[int], None]) -> Iterator[np.ndarray]:
    """First row and number of rows of every row group, uint64 [k, 2]. Raises DataError for what is not parquet."""
    metadata = _open(path).metadata
    counts = np.array([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)], dtype=np.uint64)
    advanced(path.stat().st_size)
    yield np.stack([np.cumsum(counts) - counts, counts], axis=1).astype(np.uint64).reshape(-1, 2)


def column_names(path: Path) -> tuple[str, ...]:
    """Names of the columns of a file. Raises DataError for what is not parquet."""
    return tuple(_open(path).schema_arrow.names)


def read_row(path: Path, row: int, columns: tuple[str, ...], stamp: Stamp) -> dict[str, Any]:
    """The values of a row in plain types; bytes stay where they are, as `ParquetCell`. Raises DataError."""
    return {
        column: _plain(_scalar(path, row, column, stamp), ParquetCell(path, row, column, (), stamp))
        for column in columns
    }


def read_cell(path: Path, row: int, column: str, place: Keys, stamp: Stamp | None) -> Any:
    """The value at a place of a row. Raises DataError when there is none."""
    scalar = _scalar(path, row, column, stamp or stamp_of(path))
    for key in place:
        try:
            scalar = scalar[key]
        except (LookupError, TypeError) as error:
            raise DataError("holds nothing", file=path, record=row, field=written((column, *place))) from error
    return scalar.as_py()


def _plain(scalar: Any, here: ParquetCell) -> Any:
    import pyarrow as pa

    if not scalar.is_valid:
        return None
    kind = scalar.type
    if isinstance(scalar, pa.ExtensionScalar):
        return _plain(scalar.value, here)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return here
    if pa.types.is_struct(kind):
        return {name: _plain(scalar[name], _inside(here, name)) for name in scalar}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [_plain(scalar[number], _inside(here, number)) for number in range(len(scalar))]
    return scalar.as_py()


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
    import pyarrow as pa

    try:
        return opened.read_row_group(group, columns=[column], use_threads=False)[column]
    except KeyError as error:
        known = ", ".join(opened.schema_arrow.names)
        raise DataError(f"{path}: no column {column!r}; it has {known}") from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} row group {group}: cannot be read ({error}); copy or download it again") from error


def _open(path: Path) -> Any:
    pa, pq = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a whole parquet file ({error}); copy or download it again") from error


_STATE = _State()


def _start_anew() -> None:
    global _STATE
    _STATE = _State()


os.register_at_fork(after_in_child=_start_anew)
