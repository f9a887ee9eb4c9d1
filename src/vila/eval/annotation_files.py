"""Readers of annotation files: streamed JSON arrays, JSON lines, and tab-separated tables with base64 images.

Files of gigabytes need little memory, and every file is read to its end, so that damage is found.
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

_CHUNK_CHARS = 1 << 20
_HEAD_BYTES = 1 << 16
_AFTER_VALUE = ",:]} \t\r\n"
_SPACE = re.compile(r"[ \t\r\n]*")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_DECODER = json.JSONDecoder()
_MAX_TOKEN_CHARS = 16
_BOM = b"\xef\xbb\xbf"
OTHER_RELEASE = "is it the file of another release?"
TRUNCATED = "was the file truncated? download it again"


def iter_array(path: Path, key: str = "", *, surrogates: bool = False) -> Iterator[Any]:
    """Yield the elements of the top-level array, or of the array under `key` of the top-level object.

    surrogates: accept text with unpaired surrogates.
    Raises DataError with the file if it is not JSON, is truncated, lacks the array or has it twice, has text after its
    value, or has a value over MAX_RECORD_BYTES.
    """
    _checked_head(path)
    with file_errors(path):
        stream = path.open(encoding="utf-8-sig")
    with stream:
        yield from _Reader(stream, path, surrogates).array(key)


def iter_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield label ("row 3" of a JSON list, "line 3" of JSON lines, from 1) and value of every record.

    A damaged line yields a DataError as its value, and the next lines follow. Unpaired surrogates are accepted.
    Raises DataError if the file is absent, is neither a list nor JSON lines, or is a damaged list.
    """
    head = _checked_head(path, _HEAD_BYTES, accept_empty=True)
    text = head.removeprefix(_BOM)
    if text.lstrip().startswith(b"["):
        for number, value in enumerate(iter_array(path, surrogates=True), start=1):
            yield f"row {number}", value
        return
    if problem := json_lines_problem(text, cut=len(head) == _HEAD_BYTES):
        raise DataError(problem[0], file=path, hint=problem[1])
    with path.open("rb") as stream:
        for number, line in bounded_lines(stream, path):
            if line.strip(b" \t\r\n"):
                record = f"line {number}"
                try:
                    value = parse_json(line, file=path, record=record, surrogates=True)
                except DataError as error:
                    value = error
                yield record, value


def _checked_head(path: Path, size: int = 512, *, accept_empty: bool = False) -> bytes:
    """Return the first bytes of a file. Raises DataError if they are those of an archive, a web page and so on."""
    with file_errors(path):
        head = read_head(path, size)
    if not (accept_empty and not head) and (known := foreign_content(head)):
        raise DataError(known[0], file=path, hint=known[1])
    return head


class _Reader:
    """Incremental JSON parser; holds one part of the file in memory."""

    def __init__(self, stream: TextIO, path: Path, surrogates: bool) -> None:
        self._stream, self._path, self._surrogates = stream, path, surrogates
        self._text, self._position, self._consumed = "", 0, 0

    def array(self, key: str) -> Iterator[Any]:
        """Yield the elements of the array, then read the rest of the file."""
        if not key:
            yield from self._values("an array")
        elif self._next() != "{":
            raise DataError(file=self._path, expected=f"an object with {key!r}")
        else:
            self._position += 1
            yield from self._member(key)
        if self._next(last=True):
            raise self._error("text after the value")

    def _member(self, key: str) -> Iterator[Any]:
        """Yield the elements of the array at `key` of an object."""
        found = 0
        while self._next() != "}":
            name = self._value()
            if self._next() != ":":
                raise self._error("expected : after a key")
            self._position += 1
            if name != key:
                self._skip()
            elif found:
                raise self._error(f"{key!r} occurs twice")
            else:
                found += 1
                yield from self._values(f"an array under {key!r}")
            if self._next() == ",":
                self._position += 1
        self._position += 1
        if not found:
            raise DataError("missing", file=self._path, field=key, hint=OTHER_RELEASE)

    def _values(self, what: str) -> Iterator[Any]:
        if self._next() != "[":
            raise DataError(file=self._path, expected=what)
        self._position += 1
        if self._next() == "]":
            self._position += 1
            return
        while True:
            yield self._value()
            delimiter = self._next()
            self._position += 1
            if delimiter == "]":
                return
            if delimiter != ",":
                raise self._error(f"expected , or ] but found {delimiter!r}")

    def _skip(self) -> None:
        """Skip a value; arrays element by element, as they may be larger than memory."""
        if self._next() == "[":
            for _ in self._values(""):
                pass
        else:
            self._value()

    def _next(self, *, last: bool = False) -> str:
        """Return the next character that is not white space without consuming it; last: "" at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._more(_CHUNK_CHARS):
                if last:
                    return ""
                raise self._error("unexpected end of the file")

    def _value(self) -> Any:
        self._next()
        size = _CHUNK_CHARS
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                # A truncated value fails near the end of the text that was read.
                is_cut = error.pos + _MAX_TOKEN_CHARS >= len(self._text) or error.msg.startswith("Unterminated")
                if not is_cut or not self._more(size):
                    raise self._error(error.msg) from error
            except (RecursionError, ValueError) as error:  # nested too deeply, or too many digits
                raise self._error(str(error)) from error
            else:
                # "-3." at the end of the text that was read parses as -3, but the number may continue.
                if (end < len(self._text) and self._text[end] in _AFTER_VALUE) or not self._more(size):
                    self._check(value, end)
                    self._position = end
                    return value
            if len(self._text) - self._position > MAX_RECORD_BYTES:
                raise self._error(f"a value of more than {MAX_RECORD_BYTES:,} characters")
            size *= 2

    def _check(self, value: Any, end: int) -> None:
        if not self._surrogates and _ESCAPED_SURROGATE.search(self._text, self._position, end):
            text = lone_surrogate(value)
            if text is not None:
                raise self._error(f"unpaired surrogate in {text!r}")

    def _more(self, size: int) -> bool:
        with file_errors(self._path):
            chunk = self._stream.read(size)
        if chunk:
            self._consumed += self._position
            self._text, self._position = self._text[self._position :] + chunk, 0
        return bool(chunk)

    def _error(self, reason: str) -> DataError:
        return DataError(f"invalid JSON near character {self._consumed + self._position}: {reason}", file=self._path)


# Tab-separated tables in the dialect of pandas: quoted cells, and words that mean an empty cell.

EMPTY_CELLS = frozenset({
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
})  # fmt: skip
"""Cells that pandas reads as missing values by default, quoted or not."""


@dataclass(frozen=True, slots=True)
class TableCell:
    """Reference to base64 data in a cell. offset, size: bytes of the record in its file; column: from 0."""

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
        """Read and decode the data. Raises DataError if the file has changed or the cell is not base64."""
        record = read_span(self.path, self.offset, self.size, self.stamp).decode("utf-8-sig")
        return decode_base64(next(_reader(iter([record])))[self.column], file=None, record=self.location)


@dataclass(frozen=True)
class AnnotationTable:
    """Table in memory. rows: cells by column name; those of image columns are `TableCell`, shared for equal text."""

    path: Path
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]

    def require_columns(self, *columns: str) -> None:
        """Raise DataError naming the columns that the table lacks."""
        if missing := [column for column in columns if column not in self.columns]:
            raise DataError(
                f"no column {', '.join(missing)} (columns: {', '.join(self.columns)})",
                file=self.path,
                hint=OTHER_RELEASE,
            )


def read_table(path: Path, image_columns: tuple[str, ...] = ()) -> AnnotationTable:
    """Read a table. image_columns: columns with base64 data, which stays in the file.

    Raises DataError with file and line for a row whose number of cells differs from the header, text that is not UTF-8,
    an unterminated quoted cell, and a repeated column name.
    """
    csv.field_size_limit(MAX_RECORD_BYTES)
    stamp = file_version(path)
    _checked_head(path)
    records = _records(path)
    header, *_ = next(records, ([], 0, 0, 0))
    if len(header) < 2:
        raise DataError(file=path, value=", ".join(header), expected="a tab-separated table")
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise DataError("repeated column name", file=path, field=twice)
    seen: dict[bytes, TableCell] = {}
    rows = []
    for cells, line, offset, size in records:
        if len(cells) != len(header):
            raise DataError(
                f"{len(cells)} cells where the header has {len(header)}",
                file=path,
                record=f"line {line}",
                hint=TRUNCATED,
            )
        row: dict[str, Any] = dict(zip(header, cells, strict=True))
        for name in image_columns:
            if row.get(name):
                cell = TableCell(path, offset, size, header.index(name), f"{path} line {line} {name}", stamp)
                row[name] = seen.setdefault(hashlib.blake2b(row[name].encode()).digest(), cell)
        rows.append(row)
    return AnnotationTable(path, tuple(header), rows)


def _records(path: Path) -> Iterator[tuple[list[str], int, int, int]]:
    """Yield cells, line number, byte offset and size of each record; blank lines are skipped."""
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
            # csv ends an unterminated quoted cell at the end of the file and takes all rows in between as its text.
            raise DataError(
                "unterminated quoted cell",
                file=path,
                record=f"line {line}",
                hint=TRUNCATED,
            )
        if cells:
            yield cells, line, offset, position - offset


def _reader(lines: Iterator[str]) -> Any:
    return csv.reader(lines, delimiter="\t")
