"""Records of data files by number, whatever holds them: JSON, tar or parquet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from vila.core.errors import MISSING, DataError
from vila.core.events import SILENT, Events
from vila.core.types import Stored
from vila.data.formats.parquet import ParquetCell, column_names, read_row, scan_parquet
from vila.data.formats.scan_json import parse_record, scan_json
from vila.data.formats.scan_tar import read_members, scan_tar
from vila.data.formats.stored import Base64Field, FileSlice, Keys
from vila.data.handles import Stamp, read_span
from vila.data.index import Index, open_index


@dataclass(frozen=True, slots=True)
class Row:
    """One record.

    value:   its content; empty for a tar sample without JSON.
    file:    data file that it is in.
    record:  number in the file, from 0; of a tar sample "key KEY".
    name:    id of the sample if the record has no id of its own.
    members: the other files of a tar sample by extension ("0.jpg" for KEY.0.jpg); `in_shard`: it is one.
    stored:  location of the bytes, or the base64 text, at the end of keys.
    unloaded: columns of a table that are not in `value`; `peek` reads one of them.
    """

    value: Mapping[str, Any]
    file: Path
    record: int | str
    name: str
    stored: Callable[[Keys], Stored]
    members: Mapping[str, FileSlice] = field(default_factory=dict)
    in_shard: bool = False
    unloaded: tuple[str, ...] = ()
    peek: Callable[[str], Any] = lambda column: None

    def fault(
        self,
        problem: str = "",
        *,
        field: str | None = None,
        value: Any = MISSING,
        expected: str | None = None,
        hint: str | None = None,
    ) -> DataError:
        """Return the error for this record, with its file and number. The arguments are those of `VilaError`."""
        return DataError(
            problem, file=self.file, record=self.record, field=field, value=value, expected=expected, hint=hint
        )

    def read_text(self, extension: str) -> str:
        """Read the text of a member. Raises DataError if it is missing or not UTF-8."""
        if extension not in self.members:
            raise missing_member(self, extension)
        try:
            return self.members[extension].read().decode()
        except UnicodeDecodeError as error:
            raise self.fault(
                f"not UTF-8 text (byte {error.start})", field=f"member {extension}", hint="save it as UTF-8"
            ) from error


def missing_member(row: Row, extension: str, field: str | None = None) -> DataError:
    """Return the error for a member that a record names and the shard does not hold."""
    members = ", ".join(sorted(row.members)) or "none"
    return row.fault(f"no member {extension!r} in the shard; the sample has {members}", field=field)


class Rows(Protocol):
    """The records of one file."""

    path: Path

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Row: ...

    def place(self, number: int) -> tuple[str, int]:
        """Return the file and the number of a record in it."""


class _FileRows:
    """Records that are numbered as they lie in their file."""

    path: Path

    def place(self, number: int) -> tuple[str, int]:
        """Return the file and the number of a record in it."""
        return str(self.path), number


class JsonRows(_FileRows):
    """Records of a JSON list or of JSON lines."""

    def __init__(self, path: Path, events: Events = SILENT) -> None:
        self.path = path
        self._index = open_index(path, "json", scan_json, events)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> Row:
        """Read record `number`. Raises DataError with file and record."""
        offset, size = self._index[number]
        raw = read_span(self.path, offset, size, self._index.stamp)
        stored = partial(_base64, FileSlice(self.path, offset, size, str(self.path), self._index.stamp), number)
        return Row(parse_record(raw, self.path, number), self.path, number, f"{self.path.stem}/{number}", stored)


class TarRows(_FileRows):
    """Samples of a tar shard."""

    def __init__(self, path: Path, events: Events = SILENT) -> None:
        self.path = path
        self._index = open_index(path, "tar", scan_tar, events)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> Row:
        """Read sample `number`; `value` is the member `json` if there is one. Raises DataError with shard and key."""
        stamp = self._index.stamp
        key, found = read_members(self.path, *self._index[number], stamp)
        record = f"key {key}"
        members = {m.extension: FileSlice(self.path, m.offset, m.size, f"{self.path} {m.name}", stamp) for m in found}
        text = members.pop("json", None)
        value = {} if text is None else parse_record(text.read(), self.path, record)
        stored = partial(_base64, text or FileSlice(self.path, 0, 0, str(self.path), stamp), record)
        return Row(value, self.path, record, f"{self.path.stem}/{key}", stored, members, in_shard=True)


class ParquetRows(_FileRows):
    """Rows of a parquet file; columns that are not asked for are not read."""

    def __init__(self, path: Path, columns: tuple[str, ...] = (), events: Events = SILENT) -> None:
        """columns: those of interest, all when empty; ones that the file lacks are left out."""
        self.path = path
        self._index: Index = open_index(path, "parquet", scan_parquet, events)
        table = self._index.table()
        self._length = int(table[:, 1].sum()) if len(table) else 0
        known = column_names(path)
        self._columns = tuple(name for name in known if not columns or name in columns)
        self._unloaded = tuple(name for name in known if name not in self._columns)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> Row:
        """Read record `number`; bytes in it are `ParquetCell`s. Raises DataError with file and record."""
        value = read_row(self.path, number, self._columns, self._index.stamp)
        stored = partial(_cell, self.path, number, self._index.stamp)
        name, peek = f"{self.path.stem}/{number}", partial(_column, self.path, number, self._index.stamp)
        return Row(value, self.path, number, name, stored, unloaded=self._unloaded, peek=peek)


def _base64(text: FileSlice, record: int | str, keys: Keys) -> Stored:
    return Base64Field(text.path, text.offset, text.size, keys, record, text.stamp)


def _cell(path: Path, row: int, stamp: Stamp, keys: Keys) -> Stored:
    return ParquetCell(path, row, str(keys[0]), keys[1:], stamp)


def _column(path: Path, row: int, stamp: Stamp, column: str) -> Any:
    return read_row(path, row, (column,), stamp)[column]


def open_rows(path: Path, columns: tuple[str, ...] = (), events: Events = SILENT) -> Rows:
    """The records of a file, told by the end of its name. Raises DataError."""
    if path.suffix == ".tar":
        return TarRows(path, events)
    if path.suffix == ".parquet":
        return ParquetRows(path, columns, events)
    return JsonRows(path, events)
