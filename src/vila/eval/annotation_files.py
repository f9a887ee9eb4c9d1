"""Streaming readers of JSON: one long array object by object, and files of rows that are a list or JSON lines.

Annotation files of gigabytes need little memory; every file is read to its last character.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from vila.core.errors import DataError
from vila.core.reading import (
    MAX_RECORD_BYTES,
    bounded_lines,
    file_errors,
    foreign_content,
    lone_surrogate,
    parse_json,
    read_head,
)
from vila.data.formats.detect import json_lines_problem
from vila.data.readers.index import FileVersion, file_version, read_span
from vila.data.readers.media_refs import decode_base64

_CHUNK = 1 << 20
_HEAD = 1 << 16
_AFTER_VALUE = ",:]} \t\r\n"
_SPACE = re.compile(r"[ \t\r\n]*")
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_DECODER = json.JSONDecoder()
_LONGEST_TOKEN = 16
_BOM = b"\xef\xbb\xbf"


def iter_array(path: Path, key: str = "", *, surrogates: bool = False) -> Iterator[Any]:
    """Yield the values of the array at the top of the file, or of the one under `key` of the object at the top.

    surrogates: accept text with half a surrogate pair.
    Raises DataError with the file if it is not JSON, is cut, has no such array or more than one, if text follows its
    value, or if a value is over MAX_RECORD_BYTES.
    """
    with file_errors(path):
        head = read_head(path)
        if known := foreign_content(head):
            raise DataError(known[0], file=path, hint=known[1])
        stream = path.open(encoding="utf-8-sig")
    with stream:
        yield from _Reader(stream, path, surrogates).array(key)


def iter_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield location ("FILE row 3" of a list, "FILE line 3" of JSON lines, from 1) and value of every row of a file.

    A line that is damaged gives a DataError as its value, and the next lines follow. Text with half a surrogate pair
    is accepted. Raises DataError if the file is absent, is neither a list nor JSON lines, or is a damaged list.
    """
    with file_errors(path):
        head = read_head(path, _HEAD)
    if head and (known := foreign_content(head)):
        raise DataError(known[0], file=path, hint=known[1])
    text = head.removeprefix(_BOM)
    if text.lstrip().startswith(b"["):
        for number, row in enumerate(iter_array(path, surrogates=True), start=1):
            yield f"{path} row {number}", row
        return
    if fault := json_lines_problem(text, cut=len(head) == _HEAD):
        raise DataError(fault[0], file=path, hint=fault[1])
    with path.open("rb") as stream:
        for number, line in bounded_lines(stream, path):
            if line.strip(b" \t\r\n"):
                try:
                    value = parse_json(line, file=path, record=f"line {number}", surrogates=True)
                except DataError as error:
                    value = error
                yield f"{path} line {number}", value


class _Reader:
    """Walks through a file with one part of it in memory."""

    def __init__(self, stream: TextIO, path: Path, surrogates: bool) -> None:
        self._stream, self._path, self._surrogates = stream, path, surrogates
        self._text, self._place, self._before = "", 0, 0

    def array(self, key: str) -> Iterator[Any]:
        """Yield the values of the array, and read the rest of the file."""
        if not key:
            yield from self._values("an array")
        elif self._next() != "{":
            raise DataError(f"expected an object with {key!r}", file=self._path)
        else:
            self._place += 1
            yield from self._member(key)
        if self._next(last=True):
            raise self._broken("text follows the value")

    def _member(self, key: str) -> Iterator[Any]:
        """Yield the values of one member of an object, over the others."""
        found = 0
        while self._next() != "}":
            name = self._value()
            if self._next() != ":":
                raise self._broken("expected : after a name")
            self._place += 1
            if name != key:
                self._skip()
            elif found:
                raise self._broken(f"{key!r} occurs twice")
            else:
                found += 1
                yield from self._values(f"an array under {key!r}")
            if self._next() == ",":
                self._place += 1
        self._place += 1
        if not found:
            raise DataError(f"has no {key!r}", file=self._path, hint="is it the file of another release?")

    def _values(self, what: str) -> Iterator[Any]:
        if self._next() != "[":
            raise DataError(f"expected {what}", file=self._path)
        self._place += 1
        if self._next() == "]":
            self._place += 1
            return
        while True:
            yield self._value()
            scored = self._next()
            self._place += 1
            if scored == "]":
                return
            if scored != ",":
                raise self._broken(f"expected , or ] but found {scored!r}")

    def _skip(self) -> None:
        """Go behind a value; an array element by element, as it may be longer than memory."""
        if self._next() == "[":
            for _ in self._values(""):
                pass
        else:
            self._value()

    def _next(self, *, last: bool = False) -> str:
        """Return the next character that is not white space, which stays unread; last: "" at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self._place)
            self._place = match.end() if match else self._place
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more(_CHUNK):
                if last:
                    return ""
                raise self._broken("the file ends early")

    def _value(self) -> Any:
        self._next()
        size = _CHUNK
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                # An error well before the end of what was read is no value that was cut there.
                is_cut = error.pos + _LONGEST_TOKEN >= len(self._text) or error.msg.startswith("Unterminated")
                if not is_cut or not self._more(size):
                    raise self._broken(error.msg) from error
            except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
                raise self._broken(str(error)) from error
            else:
                # "-3." at the end of what was read is the beginning of a number, and reads as -3.
                if (end < len(self._text) and self._text[end] in _AFTER_VALUE) or not self._more(size):
                    self._check(value, end)
                    self._place = end
                    return value
            if len(self._text) - self._place > MAX_RECORD_BYTES:
                raise self._broken(f"a value longer than {MAX_RECORD_BYTES:,} characters")
            size *= 2

    def _check(self, value: Any, end: int) -> None:
        if not self._surrogates and _ESCAPED_HALF.search(self._text, self._place, end):
            text = lone_surrogate(value)
            if text is not None:
                raise self._broken(f"half a surrogate pair in the text {text!r}")

    def _more(self, size: int) -> bool:
        with file_errors(self._path):
            chunk = self._stream.read(size)
        if chunk:
            self._before += self._place
            self._text, self._place = self._text[self._place :] + chunk, 0
        return bool(chunk)

    def _broken(self, reason: str) -> DataError:
        return DataError(f"not whole JSON near character {self._before + self._place}: {reason}", file=self._path)


# --- table
# Tab-separated tables with pictures in them, as pandas reads them: quoted cells, and words that mean an empty cell.


EMPTY_CELLS = frozenset({
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
    location: str
    stamp: FileVersion | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """File, line and column."""
        return self.location

    def read(self) -> bytes:
        """Read and decode. Raises DataError if the file has changed or the cell is not base64."""
        record = read_span(self.path, self.offset, self.size, self.stamp).decode("utf-8-sig")
        return decode_base64(next(_reader(iter([record])))[self.column], file=None, record=self.location)


@dataclass(frozen=True)
class AnnotationTable:
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


def read_table(path: Path, pictures: tuple[str, ...] = ()) -> AnnotationTable:
    """Read the whole table. pictures: columns that hold base64 text, which is left in the file.

    Raises DataError with file and line for a row with more or fewer cells than the header, text that is not UTF-8, a
    quoted cell that does not end, and a column name that occurs twice.
    """
    csv.field_size_limit(MAX_RECORD_BYTES)
    stamp = file_version(path)
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
    return AnnotationTable(path, tuple(header), rows)


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
