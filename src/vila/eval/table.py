"""Tab-separated tables with pictures in them, as pandas reads them: quoted cells, and words that mean an empty cell.

Pictures stay in the file until they are opened.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.reading import MAX_RECORD_BYTES, bounded_lines, file_errors, foreign_content, read_head
from vila.data.formats.stored import decode_base64
from vila.data.handles import Stamp, read_span, stamp_of

EMPTY = frozenset({
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
})  # fmt: skip
"""Cells that pandas takes for empty, quoted or not, unless it is told otherwise."""


@dataclass(frozen=True, slots=True)
class TableCell:
    """Base64 text in a cell. offset, size: of the record in its file, in bytes; column: from 0."""

    path: Path
    offset: int
    size: int
    column: int
    where: str
    stamp: Stamp | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """File, line and column."""
        return self.where

    def read(self) -> bytes:
        """Read and decode. Raises DataError if the file has changed or the cell is not base64."""
        record = read_span(self.path, self.offset, self.size, self.stamp).decode("utf-8-sig")
        return decode_base64(next(_reader(iter([record])))[self.column], file=None, record=self.where)


@dataclass(frozen=True)
class Table:
    """A table in memory. rows: cells by column; those of picture columns are `TableCell`, equal ones for equal text."""

    path: Path
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]

    def need(self, *columns: str) -> None:
        """Raise DataError naming the columns that the table lacks."""
        if lacking := [column for column in columns if column not in self.columns]:
            raise DataError(
                f"{self.path}: has no column {', '.join(lacking)} (it has {', '.join(self.columns)}); "
                "is it another release?"
            )


def read_table(path: Path, pictures: tuple[str, ...] = ()) -> Table:
    """Read the whole table. pictures: columns that hold base64 text, which is left in the file.

    Raises DataError with file and line for a row with more or fewer cells than the header, text that is not UTF-8, a
    quoted cell that does not end, and a column name that occurs twice.
    """
    csv.field_size_limit(MAX_RECORD_BYTES)
    stamp = stamp_of(path)
    with file_errors(path):
        head = read_head(path)
    if known := foreign_content(head):
        raise DataError(known[0], file=path, hint=known[1])
    records = _records(path)
    header, *_ = next(records, ([], 0, 0, 0))
    if len(header) < 2:
        raise DataError(file=path, value=", ".join(header), expected="a table with tabs between its columns")
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise DataError("occurs twice in the header", file=path, field=twice)
    seen: dict[bytes, TableCell] = {}
    rows = []
    for cells, line, offset, size in records:
        if len(cells) != len(header):
            raise DataError(
                f"{len(cells)} cells where the header has {len(header)}",
                file=path,
                record=f"line {line}",
                hint="was the file cut? download it again",
            )
        row: dict[str, Any] = dict(zip(header, cells, strict=True))
        for name in pictures:
            if row.get(name):
                cell = TableCell(path, offset, size, header.index(name), f"{path} line {line} {name}", stamp)
                row[name] = seen.setdefault(hashlib.blake2b(row[name].encode()).digest(), cell)
        rows.append(row)
    return Table(path, tuple(header), rows)


def _records(path: Path) -> Iterator[tuple[list[str], int, int, int]]:
    """Yield cells, line, offset and size in bytes of each record; blank lines are skipped."""
    position = 0
    ended = False

    def lines() -> Iterator[str]:
        nonlocal position, ended
        with path.open("rb") as stream:
            for number, line in bounded_lines(stream, path):
                position += len(line)
                with file_errors(path, record=f"line {number}"):
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield text
        ended = True

    reader = _reader(lines())
    while True:
        offset, line = position, reader.line_num + 1
        with file_errors(path, record=f"line {line}"):
            cells = next(reader, None)
        if cells is None:
            return
        if ended:
            # The reader takes the end of the file for the end of a quoted cell, and all rows in it for its text.
            raise DataError(
                "a quoted cell does not end",
                file=path,
                record=f"line {line}",
                hint="was the file cut? download it again",
            )
        if cells:
            yield cells, line, offset, position - offset


def _reader(lines: Iterator[str]) -> Any:
    return csv.reader(lines, delimiter="\t")
