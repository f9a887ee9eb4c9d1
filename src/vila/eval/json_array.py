"""Reading one long array of a JSON file object by object, so that annotation files of gigabytes need little memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from vila.core.errors import DataError

_CHUNK = 1 << 20
_AFTER_VALUE = ",:]} \t\r\n"
_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()


def iter_array(path: Path, key: str = "") -> Iterator[Any]:
    """The values of the array at the top of the file, or of the one under `key` of the object at the top, in order.

    Raises DataError naming the file when it is not JSON, ends early, or has no such array.
    """
    with path.open(encoding="utf-8") as stream:
        reader = _Reader(stream, path)
        try:
            yield from reader.array(key)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error.reason})") from error


class _Reader:
    """Walks through a file with one part of it in memory."""

    def __init__(self, stream: TextIO, path: Path) -> None:
        self._stream, self._path = stream, path
        self._text, self._place, self._before = "", 0, 0

    def array(self, key: str) -> Iterator[Any]:
        if key:
            self._open_member(key)
        if self._next() != "[":
            raise DataError(f"{self._path}: expected an array{f' under {key!r}' if key else ''}")
        self._place += 1
        if self._next() == "]":
            return
        while True:
            yield self._value()
            mark = self._next()
            self._place += 1
            if mark == "]":
                return
            if mark != ",":
                raise self._broken(f"expected , or ] but found {mark!r}")

    def _open_member(self, key: str) -> None:
        """Go to the value of `key`, over those before it."""
        if self._next() != "{":
            raise DataError(f"{self._path}: expected an object with {key!r}")
        self._place += 1
        while self._next() != "}":
            name = self._value()
            if self._next() != ":":
                raise self._broken("expected : after a name")
            self._place += 1
            if name == key:
                return
            self._value()
            if self._next() == ",":
                self._place += 1
        raise DataError(f"{self._path}: has no {key!r}; is it the file of another release?")

    def _next(self) -> str:
        """The next character that is not white space, which stays unread."""
        while True:
            match = _SPACE.match(self._text, self._place)
            self._place = match.end() if match else self._place
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more(_CHUNK):
                raise self._broken("the file ends early")

    def _value(self) -> Any:
        self._next()
        size = _CHUNK
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                if not self._more(size):
                    raise self._broken(error.msg) from error
            else:
                # "-3." at the end of what was read is the beginning of a number, and reads as -3.
                if (end < len(self._text) and self._text[end] in _AFTER_VALUE) or not self._more(size):
                    self._place = end
                    return value
            size *= 2

    def _more(self, size: int) -> bool:
        chunk = self._stream.read(size)
        if chunk:
            self._before += self._place
            self._text, self._place = self._text[self._place :] + chunk, 0
        return bool(chunk)

    def _broken(self, reason: str) -> DataError:
        return DataError(f"{self._path}: not whole JSON near character {self._before + self._place}: {reason}")
