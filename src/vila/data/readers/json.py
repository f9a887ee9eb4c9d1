"""Scan of JSON lists and JSON lines for the byte ranges of their records, without parsing, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vila.core.errors import DataError
from vila.core.reading import MAX_RECORD_BYTES, file_errors, foreign_content, parse_json, read_head
from vila.data.formats.detect import json_lines_problem

BLOCK = 1 << 22
_HEAD = 1 << 16
_SPACE = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"
_AGAIN = "copy or download the file again"

# Codes of the bytes that determine nesting; all other bytes are 0.
_QUOTE, _OPEN, _CLOSE, _COMMA = 1, 2, 3, 4
_CODES = np.zeros(256, dtype=np.uint8)
for _code, _characters in ((_QUOTE, b'"'), (_OPEN, b"[{"), (_CLOSE, b"]}"), (_COMMA, b",")):
    _CODES[np.frombuffer(_characters, dtype=np.uint8)] = _code
_IS_SPACE = np.zeros(256, dtype=bool)
_IS_SPACE[np.frombuffer(_SPACE, dtype=np.uint8)] = True
_IS_GAP = _IS_SPACE.copy()
_IS_GAP[ord(",")] = True


def scan_json(path: Path, advanced: Callable[[int], None]) -> Iterator[np.ndarray]:
    """Yield offset and size in bytes of every record, uint64 [k, 2] at a time.

    A file that begins with "[" is a list of objects; any other file has one record per line, and empty lines are
    skipped. Raises DataError if the file is neither (CSV, UTF-16, an object over several lines, ...), if a list is cut,
    has elements that are not objects or is followed by text, or if a record is larger than MAX_RECORD_BYTES.
    """
    with file_errors(path):
        head = read_head(path, _HEAD)
    if head and (known := foreign_content(head)):
        raise DataError(known[0], file=path, hint=known[1])
    if b"\0" in head[:4]:
        raise DataError("contains zero bytes; it may be UTF-16 text, or damaged", file=path, hint="save it as UTF-8")
    start = len(_BOM) if head.startswith(_BOM) else 0
    first = head[start:].lstrip(_SPACE)[:1]
    if first == b"[":
        yield from _ListScan(path, head.index(b"[")).records(advanced)
    else:
        if first and (problem := json_lines_problem(head[start:], cut=len(head) == _HEAD)):
            raise DataError(problem[0], file=path, hint=problem[1])
        yield from _scan_lines(path, start, advanced)


def _scan_lines(path: Path, start: int, advanced: Callable[[int], None]) -> Iterator[np.ndarray]:
    offset = begin = start  # begin: of the current line
    filled = False  # whether the current line has more than white space
    records = 0
    for block in _blocks(path, start):
        advanced(len(block))
        solid = ~_IS_SPACE[np.frombuffer(block, dtype=np.uint8)]
        ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + 1
        if len(ends):
            last = int(ends[-1])
            is_record = np.logical_or.reduceat(solid[:last], np.concatenate(([0], ends[:-1])))
            is_record[0] |= filled
            starts = np.concatenate(([begin], ends[:-1] + offset))
            spans = np.stack([starts, ends + offset - starts], axis=1)[is_record]
            _check_sizes(path, spans, records)
            yield spans.astype(np.uint64)
            records += len(spans)
            begin, filled = offset + last, bool(solid[last:].any())
        else:
            filled |= bool(solid.any())
        offset += len(block)
        if filled and offset - begin > MAX_RECORD_BYTES:
            raise _too_long(path, records, begin)
    if filled:
        yield np.array([[begin, offset - begin]], dtype=np.uint64)


def _blocks(path: Path, start: int) -> Iterator[bytes]:
    with file_errors(path):
        stream = path.open("rb")
    with stream:
        stream.seek(start)
        while True:
            with file_errors(path):
                block = stream.read(BLOCK)
            if not block:
                return
            yield block


class _ListScan:
    """Scan of one JSON list, block by block: bracket depth, quotes, and gaps between elements."""

    def __init__(self, path: Path, start: int) -> None:
        """start: offset of the opening bracket of the list."""
        self.path, self.start = path, start
        self._depth, self._in_string, self._closed = 0, False, False
        self._records = self._commas = 0
        self._unfinished: int | None = None  # offset of the record whose end is still missing

    def records(self, advanced: Callable[[int], None]) -> Iterator[np.ndarray]:
        """Yield offset and size of every element."""
        offset, rest = self.start, b""
        for block in _blocks(self.path, self.start):
            advanced(len(block))
            plain, rest = _unescaped(rest + block)
            if self._closed:
                self._check_nothing_follows(plain + rest, offset)
            else:
                spans = self._block(plain, rest, offset)
                if len(spans):
                    yield spans.astype(np.uint64)
            offset += len(plain)
            if self._unfinished is not None and offset - self._unfinished > MAX_RECORD_BYTES:
                raise _too_long(self.path, self._records, self._unfinished)
        if not self._closed:
            problem = f"the JSON list is cut at byte {offset + len(rest)}, after {self._records} complete records"
            raise DataError(problem, file=self.path, hint=_AGAIN)
        if self._commas != max(0, self._records - 1):
            raise DataError(
                f"the JSON list has {self._records} objects but {self._commas} commas between them",
                file=self.path,
                hint="check it with a JSON tool: a comma is missing, or the last one must be removed",
            )

    def _block(self, plain: bytes, rest: bytes, offset: int) -> np.ndarray:
        """Return offset and size of the elements that end in this block. plain: the block with escapes masked."""
        places, codes, self._in_string = _brackets(plain, self._in_string)
        depths = self._depth + np.cumsum((codes == _OPEN).astype(np.int64) - (codes == _CLOSE))
        self._depth = int(depths[-1]) if len(depths) else self._depth
        shut = places[(codes == _CLOSE) & (depths <= 0)]
        end = len(plain)
        if len(shut):
            end = int(shut[0])
            self._close(plain, rest, end, offset)
        inside = places < end
        places, codes, depths = places[inside], codes[inside], depths[inside]
        starts = places[(codes == _OPEN) & (depths == 2)]
        ends = places[(codes == _CLOSE) & (depths == 1)] + 1
        self._check_gaps(plain, starts, ends, end, offset)
        self._commas += int(((codes == _COMMA) & (depths == 1)).sum())
        begins = starts + offset
        if self._unfinished is not None:
            begins = np.concatenate(([self._unfinished], begins))
        self._unfinished = int(begins[-1]) if len(begins) > len(ends) else None
        spans = np.stack([begins[: len(ends)], ends + offset - begins[: len(ends)]], axis=1)
        _check_sizes(self.path, spans, self._records)
        self._records += len(ends)
        return spans

    def _close(self, plain: bytes, rest: bytes, end: int, offset: int) -> None:
        self._closed = True
        if plain[end : end + 1] != b"]":
            raise DataError(
                f"wrong bracket at the end of the JSON list, at byte {offset + end}",
                file=self.path,
                value="}",
                expected="]",
                hint=_AGAIN,
            )
        self._check_nothing_follows(plain[end + 1 :] + rest, offset + end + 1)

    def _check_gaps(self, plain: bytes, starts: np.ndarray, ends: np.ndarray, end: int, offset: int) -> None:
        """Raise DataError for an element that is not an object: other bytes than space and commas between objects."""
        opens = [] if self._unfinished is not None else [1 if offset == self.start else 0]
        gap_starts = np.concatenate((np.array(opens, dtype=np.int64), ends))
        gap_ends = np.append(starts, end)[: len(gap_starts)]
        sizes = gap_ends - gap_starts
        # Positions of all bytes in gaps; gaps are short, so these are few.
        within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        positions = np.repeat(gap_starts, sizes) + within
        odd = positions[~_IS_GAP[np.frombuffer(plain, dtype=np.uint8)[positions]]]
        if len(odd):
            record = self._records + int(np.searchsorted(ends, odd[0], side="right"))
            raise DataError(
                f"is not an object (byte {offset + int(odd[0])})",
                file=self.path,
                record=record,
                value=plain[int(odd[0]) :][:40].decode(errors="replace"),
                expected="an object ({...})",
            )

    def _check_nothing_follows(self, content: bytes, offset: int) -> None:
        if content.strip(_SPACE):
            position = offset + len(content) - len(content.lstrip(_SPACE))
            problem = f"text follows the JSON list, from byte {position}"
            hint = "join several lists with: jq -s add FILE"
            raise DataError(problem, file=self.path, expected="one list", hint=hint)


def _check_sizes(path: Path, spans: np.ndarray, before: int) -> None:
    long = np.flatnonzero(spans[:, 1] > MAX_RECORD_BYTES)
    if len(long):
        raise _too_long(path, before + int(long[0]), int(spans[long[0], 0]))


def _too_long(path: Path, record: int, offset: int) -> DataError:
    problem = f"the record at byte {offset} is too long"
    hint = "keep images in files or in tar shards; JSON lines have one record per line"
    return DataError(problem, file=path, record=record, expected=f"at most {MAX_RECORD_BYTES:,} bytes", hint=hint)


def _unescaped(block: bytes) -> tuple[bytes, bytes]:
    """Return the block with escaped characters masked, and a trailing backslash whose character is still missing."""
    # Pairs of backslashes first: a remaining one escapes the quote after it.
    plain = block.replace(b"\\\\", b"__")
    rest = b"\\" if plain.endswith(b"\\") else b""
    return plain[: len(plain) - len(rest)].replace(b'\\"', b"__"), rest


def _brackets(plain: bytes, in_string: bool) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return positions and codes of brackets and commas outside strings, and whether a string is still open."""
    codes = _CODES[np.frombuffer(plain, dtype=np.uint8)]
    places = np.flatnonzero(codes)
    codes = codes[places]
    quotes = codes == _QUOTE
    parity = (np.cumsum(quotes) + in_string) & 1
    outside = ~quotes & (parity == 0)
    return places[outside], codes[outside], bool(parity[-1]) if len(parity) else in_string


def parse_record(raw: bytes, file: Path, record: int | str) -> dict[str, Any]:
    """Parse a record. Raises DataError with file and record if it is not a JSON object or repeats a key."""
    value = parse_json(raw, file=file, record=record, unique_keys=True)
    if not isinstance(value, dict):
        raise DataError(file=file, record=record, value=value, expected="an object ({...})")
    return value
