"""Finds the records of JSON lists and of JSON lines without parsing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vila.core.errors import DataError
from vila.core.reading import parse_json

BLOCK = 1 << 22
_SPACE = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"

# What a byte means for the nesting: quotes are told apart by their own code.
_QUOTE, _OPEN, _CLOSE, _COMMA = 1, 2, 3, 4
_CODES = np.zeros(256, dtype=np.uint8)
for _code, _characters in ((_QUOTE, b'"'), (_OPEN, b"[{"), (_CLOSE, b"]}"), (_COMMA, b",")):
    _CODES[np.frombuffer(_characters, dtype=np.uint8)] = _code


def scan_json(path: Path, advanced: Callable[[int], None]) -> Iterator[np.ndarray]:
    """Offset and size in bytes of every record, uint64 [k, 2] at a time.

    A file that begins with "[" is a list of objects; any other holds one record a line, blank lines left out.
    Raises DataError naming the byte where a list breaks off.
    """
    with path.open("rb") as stream:
        head = stream.read(4096)
    start = len(_BOM) if head.startswith(_BOM) else 0
    first = head[start:].lstrip(_SPACE)[:1]
    if first == b"[":
        yield from _scan_list(path, head.index(b"["), advanced)
    else:
        yield from _scan_lines(path, start, advanced)


def _scan_lines(path: Path, start: int, advanced: Callable[[int], None]) -> Iterator[np.ndarray]:
    with path.open("rb") as stream:
        stream.seek(start)
        offset, rest = start, b""
        while block := stream.read(BLOCK):
            advanced(len(block))
            rest += block
            end = rest.rfind(b"\n") + 1
            if end:
                yield _lines(rest[:end], offset)
                offset, rest = offset + end, rest[end:]
        if rest:
            yield _lines(rest, offset)


def _lines(content: bytes, offset: int) -> np.ndarray:
    """Spans of the lines of `content` that hold more than white space."""
    data = np.frombuffer(content, dtype=np.uint8)
    ends = np.flatnonzero(data == ord("\n")) + 1
    if not len(ends) or ends[-1] != len(data):
        ends = np.append(ends, len(data))
    starts = np.concatenate(([0], ends[:-1]))
    filled = np.logical_or.reduceat(data > ord(" "), starts)
    return np.stack([starts + offset, ends - starts], axis=1)[filled].astype(np.uint64)


def _scan_list(path: Path, start: int, advanced: Callable[[int], None]) -> Iterator[np.ndarray]:
    depth, inside, commas, records = 0, False, 0, 0
    unfinished: list[int] = []  # where the record that is not closed yet begins
    closed = False
    offset, rest = start, b""
    with path.open("rb") as stream:
        stream.seek(start)
        while block := stream.read(BLOCK):
            advanced(len(block))
            plain, rest = _unescaped(rest + block)
            if closed:
                _check_nothing_follows(path, plain + rest, offset)
            places, codes, inside = _brackets(plain, inside)
            depths = depth + np.cumsum((codes == _OPEN).astype(np.int64) - (codes == _CLOSE))
            depth = int(depths[-1]) if len(depths) else depth
            shut = places[(codes == _CLOSE) & (depths <= 0)]
            if len(shut):
                closed = True
                _check_nothing_follows(path, plain[shut[0] + 1 :] + rest, offset + int(shut[0]) + 1)
            starts = [*unfinished, *(places[(codes == _OPEN) & (depths == 2)] + offset)]
            ends = places[(codes == _CLOSE) & (depths == 1)] + offset + 1
            unfinished = [int(place) for place in starts[len(ends) :]]
            commas += int(((codes == _COMMA) & (depths == 1)).sum())
            records += len(ends)
            if len(ends):
                begins = np.array(starts[: len(ends)], dtype=np.int64)
                yield np.stack([begins, ends - begins], axis=1).astype(np.uint64)
            offset += len(plain)
    if not closed:
        raise DataError(
            f"{path}: the JSON list breaks off at byte {offset + len(rest)}, after {records} whole records; "
            "copy or download the file again"
        )
    if commas != max(0, records - 1):
        raise DataError(
            f"{path}: the JSON list has {records} objects but {commas} commas between them; every element is an object"
        )


def _unescaped(block: bytes) -> tuple[bytes, bytes]:
    """The block with escaped characters masked, as long as before; and a backslash at its end that waits for more."""
    # Pairs of backslashes first: what is left of a run escapes the quote behind it.
    plain = block.replace(b"\\\\", b"__")
    rest = b"\\" if plain.endswith(b"\\") else b""
    return plain[: len(plain) - len(rest)].replace(b'\\"', b"__"), rest


def _brackets(plain: bytes, inside: bool) -> tuple[np.ndarray, np.ndarray, bool]:
    """Places and codes of brackets and commas outside strings; inside: whether a string is open, before and after."""
    codes = _CODES[np.frombuffer(plain, dtype=np.uint8)]
    places = np.flatnonzero(codes)
    codes = codes[places]
    quotes = codes == _QUOTE
    parity = (np.cumsum(quotes) + inside) & 1
    outside = ~quotes & (parity == 0)
    return places[outside], codes[outside], bool(parity[-1]) if len(parity) else inside


def _check_nothing_follows(path: Path, content: bytes, offset: int) -> None:
    if content.strip(_SPACE):
        raise DataError(f"{path}: text follows the JSON list, from about byte {offset}; expected one list")


def parse_record(raw: bytes, file: Path, record: int | str) -> dict[str, Any]:
    """Parse a record. Raises DataError with file and record for what is not a JSON object, and for a repeated key."""
    value = parse_json(raw, file=file, record=record, unique_keys=True)
    if not isinstance(value, dict):
        raise DataError(file=file, record=record, value=value, expected="an object ({...})")
    return value
