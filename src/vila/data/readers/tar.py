"""Tar shards: a parser of tar headers with limits, and the grouping of members into samples.

Members with the same name up to the first dot of the base name are one sample, as in WebDataset
(https://github.com/webdataset/webdataset, "The WebDataset Format"). `tarfile` of the standard library is not used: it
stops at the first end-of-archive mark, loops on negative sizes (CVE-2025-8194) and reads names of any length.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vila.core.errors import DataError
from vila.core.reading import MAX_RECORD_BYTES, file_errors, foreign_content
from vila.data.readers.index import FileVersion, read_span

_FLUSH = 4096
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")

_BLOCK = 512
_ZERO_BLOCK = bytes(_BLOCK)
_EMPTY_ARCHIVE = 20 * _BLOCK
MAX_HEADER_BYTES = 1 << 20
"""Maximum size of a pax header or a long name."""
_AGAIN = "copy or download it again"
_WRITE_AGAIN = "write the shard again: tar --dereference --hard-dereference, without --sparse"
_TEXTS = ("json", "txt")

# Type flags of the POSIX and GNU formats.
_REGULAR, _DIRECTORY, _LABELS = b"0\0" + b"7", b"5", b"V"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"xX", b"g"
_REFUSED = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe",
            b"S": "a sparse file", b"M": "a part of a multi-volume archive", b"D": "an incremental dump"}  # fmt: skip
_PAX_RECORD = re.compile(rb"(\d{1,20}) ([^=]+)=", re.DOTALL)

Read = Callable[[int, int], bytes]
"""Reads a byte range (offset, size) of a file; returns fewer bytes at its end."""


class Member(NamedTuple):
    """Member of a sample: extension after the key, complete name, offset and size of the content in bytes."""

    extension: str
    name: str
    offset: int
    size: int


class TarFileMember(NamedTuple):
    """Regular file of an archive. begin: offset of its first header; offset, size: of its content, in bytes."""

    name: str
    begin: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Offset of the next header."""
        return self.offset + _padded(self.size)


def scan_tar(path: Path, advanced: Callable[[int], None]) -> Iterator[np.ndarray]:
    """Yield offset of the first header and size in bytes of every sample, uint64 [k, 2] at a time.

    Raises DataError with shard and member if the members of a sample are not consecutive, if a member is repeated, if a
    text is larger than MAX_RECORD_BYTES, and as `tar_members` does.
    """
    found: list[tuple[int, int]] = []
    seen: set[str] = set()
    key, start, end, done = "", 0, 0, 0
    names: set[str] = set()
    for member in tar_members(path):
        split = split_name(member.name)
        if split is None:
            continue
        if split[0] != key:
            if key:
                found.append((start, end - start))
            if split[0] in seen:
                problem = f"is separated from the other members of sample {split[0]!r}"
                hint = "write the members of a sample consecutively (tar --sort=name)"
                raise DataError(problem, file=path, record=f"member {member.name!r}", hint=hint)
            key, start = split[0], member.begin
            seen.add(key)
            names.clear()
            if len(found) == _FLUSH:
                advanced(start - done)
                done = start
                yield np.array(found, dtype=np.uint64)
                found.clear()
        _check_member(path, member, split[1], names)
        names.add(split[1])
        end = member.end
    if key:
        found.append((start, end - start))
    advanced(path.stat().st_size - done)
    if found:
        yield np.array(found, dtype=np.uint64)


def _check_member(path: Path, member: TarFileMember, extension: str, names: set[str]) -> None:
    record = f"member {member.name!r}"
    if extension in names:
        raise DataError("is repeated", file=path, record=record, hint="keep one of them")
    if member.size > MAX_RECORD_BYTES and extension.rpartition(".")[2] in _TEXTS:
        expected = f"at most {MAX_RECORD_BYTES:,} bytes"
        raise DataError("the text is too long", file=path, record=record, value=member.size, expected=expected)


def tar_members(path: Path) -> Iterator[TarFileMember]:
    """Yield the regular files of an archive in order, without directories; reads headers only.

    Concatenated archives (`cat a.tar b.tar`) are read to the end. Raises DataError with shard and byte or member if the
    archive is cut, damaged or another file type, for bytes after its end mark, negative sizes, headers larger than
    MAX_HEADER_BYTES, and members that are links, devices or sparse files.
    """
    with file_errors(path, kind="tar"):
        stream = path.open("rb", buffering=0)
    with stream:
        size = os.fstat(stream.fileno()).st_size

        def read(offset: int, amount: int) -> bytes:
            with file_errors(path, kind="tar"):
                return os.pread(stream.fileno(), amount, offset)

        _check_kind(path, read, size)
        yield from _Headers(path, read, 0, size).files()


def _check_kind(path: Path, read: Read, size: int) -> None:
    head = read(0, _BLOCK)
    if (len(head) == _BLOCK and _Header.parse(head)) or (head == _ZERO_BLOCK and size <= _EMPTY_ARCHIVE):
        return
    if known := foreign_content(head, "tar"):
        raise DataError(known[0], file=path, hint=known[1])
    if head.isascii() and b"\0" not in head:
        hint = "rename it to .jsonl or .json"
        raise DataError("is text, not a tar archive", file=path, hint=hint)
    if len(head) == _BLOCK:
        raise DataError("not a tar archive, or its first header is damaged", file=path, hint=_AGAIN)


class _Header(NamedTuple):
    """Fields of a header block. size: None if the field is not a number."""

    name: bytes
    size: int | None
    kind: bytes

    @classmethod
    def parse(cls, block: bytes) -> _Header | None:
        """Parse a block; return None if the checksum differs, so that it is not a header."""
        plain = block[:148] + b" " * 8 + block[156:]
        total = _number(block[148:156])
        # Some old writers sum signed bytes.
        if total != sum(plain) and total != sum(plain) - 256 * sum(byte > 127 for byte in plain):
            return None
        name, prefix = _text(block[:100]), _text(block[345:500])
        if prefix and block[257:263] == b"ustar\0":
            name = prefix + b"/" + name
        return cls(name, _number(block[124:136]), block[156:157])


class _Headers:
    """Iterate over the headers in a range of a file."""

    def __init__(self, path: Path, read: Read, begin: int, end: int, *, marked: bool = True) -> None:
        """begin, end: range in bytes. marked: whether an end-of-archive mark is required."""
        self.path, self._read, self._offset, self._end, self._marked = path, read, begin, end, marked
        self._last: str | None = None

    def files(self) -> Iterator[TarFileMember]:
        """Yield the regular files."""
        begin = self._offset
        name: bytes | None = None
        size: int | None = None
        while self._offset < self._end or self._marked:
            block = self._read(self._offset, _BLOCK)
            if block == _ZERO_BLOCK and begin == self._offset and self._marked:
                if self._skip_end_mark():
                    return
                begin = self._offset
                continue
            header = self._parsed(block)
            content = self._offset + _BLOCK
            if header.kind in _LONG_NAME + _LONG_LINK + _PAX + _PAX_GLOBAL:
                long_name, long_size = self._extension(header, content)
                name, size = long_name or name, size if long_size is None else long_size
                self._offset = content + _padded(self._size(header.size, "an extended header", content))
                continue
            text = (header.name if name is None else name).decode("utf-8", "backslashreplace")
            if header.kind in _DIRECTORY or (header.kind == b"\0" and text.endswith("/")) or header.kind in _LABELS:
                self._offset = content
            elif header.kind in _REGULAR:
                own = self._size(header.size if size is None else size, f"member {text!r}", content)
                self._offset = content + _padded(own)
                yield TarFileMember(text, begin, content, own)
            else:
                kind = _REFUSED.get(header.kind, f"of the unknown type {header.kind!r}")
                raise self._refused(text, f"is {kind}")
            begin, name, size = self._offset, None, None
            self._last = f"member {text!r}"

    def _parsed(self, block: bytes) -> _Header:
        if len(block) < _BLOCK:
            raise self._cut("no end-of-archive mark" if not block.strip(b"\0") else "half a header")
        header = _Header.parse(block)
        if header is None:
            raise self._cut("no header there")
        return header

    def _extension(self, header: _Header, content: int) -> tuple[bytes | None, int | None]:
        """Return the name and size that a long-name or pax header sets for the next member."""
        size = self._size(header.size, "an extended header", content)
        if size > MAX_HEADER_BYTES:
            raise self._cut(f"a header of {size:,} bytes, over the limit of {MAX_HEADER_BYTES:,}")
        raw = self._read(content, size)
        if header.kind in _LONG_NAME:
            return _text(raw), None
        if header.kind in _PAX:
            return self._pax(raw)
        return None, None

    def _pax(self, raw: bytes) -> tuple[bytes | None, int | None]:
        name: bytes | None = None
        size: int | None = None
        start = 0
        while start < len(raw) and raw[start]:
            found = _PAX_RECORD.match(raw, start)
            end = start + int(found[1]) if found else 0
            if not found or not found.end() < end <= len(raw) or raw[end - 1 : end] != b"\n":
                raise self._cut("a damaged pax header")
            key, value = found[2], raw[found.end() : end - 1]
            if key == b"path":
                name = value
            elif key == b"size":
                if not value.isdigit() or len(value) > 20:
                    raise self._cut(f"a pax header with the size {value[:40]!r}")
                size = int(value)
            elif key.startswith(b"GNU.sparse."):
                raise self._refused((name or b"?").decode("utf-8", "backslashreplace"), f"is {_REFUSED[b'S']}")
            start = end
        return name, size

    def _size(self, size: int | None, what: str, content: int) -> int:
        if size is None or size < 0:
            raise self._cut(f"{what} has no valid size ({size})")
        if content + size > self._end:
            raise DataError(
                f"is cut or damaged: the shard ends at byte {self._end} without an end-of-archive mark",
                file=self.path,
                record=what,
                hint=_AGAIN,
            )
        return size

    def _skip_end_mark(self) -> bool:
        """Skip an end mark; return True if the file ends there, False if another archive follows."""
        mark = offset = self._offset
        while chunk := self._read(offset, 1 << 20):
            rest = chunk.lstrip(b"\0")
            if rest:
                offset += len(chunk) - len(rest)
                break
            offset += len(chunk)
        else:
            return True
        start = offset - (offset - mark) % _BLOCK
        block = self._read(start, _BLOCK)
        if start - mark < 2 * _BLOCK or len(block) < _BLOCK or _Header.parse(block) is None:
            problem = f"{self._end - offset:,} bytes follow the end of the archive, from byte {offset}"
            raise DataError(problem, file=self.path, hint=f"{_AGAIN}, or remove them: truncate -s {start}")
        self._offset = start
        return False

    def _refused(self, name: str, problem: str) -> DataError:
        record = f"member {name!r}"
        return DataError(problem, file=self.path, record=record, expected="a plain file", hint=_WRITE_AGAIN)

    def _cut(self, reason: str) -> DataError:
        position = "after this member" if self._last else "at its beginning"
        return DataError(
            f"the shard is cut or damaged {position} (byte {self._offset}: {reason})",
            file=self.path,
            record=self._last,
            hint=_AGAIN,
        )


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _number(field: bytes) -> int | None:
    """Return the number in a header field: octal text, or base 256 (GNU and star, for large numbers)."""
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        return value - (1 << (8 * len(field) - 1)) if field[0] & 0x40 else value
    text = _text(field).strip(b" ")
    return int(text or b"0", 8) if not text.strip(b"01234567") else None


def split_name(name: str) -> tuple[str, str] | None:
    """Return key and lower-case extension of a member, None for files without a sample (hidden, no extension)."""
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension:
        return None
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def read_members(path: Path, offset: int, size: int, version: FileVersion) -> tuple[str, list[Member]]:
    """Return key and members of the sample in a byte range of `scan_tar`; reads headers only. Raises DataError."""
    key, members = "", []
    read = partial(_read_within, path, version, offset + size)
    for member in _Headers(path, read, offset, offset + size, marked=False).files():
        split = split_name(member.name)
        if split is not None:
            key = split[0]
            members.append(Member(split[1], member.name, member.offset, member.size))
    if not members:
        raise DataError(f"no member at byte {offset}; the file has changed since it was indexed", file=path)
    return key, members


def _read_within(path: Path, version: FileVersion, end: int, offset: int, size: int) -> bytes:
    return read_span(path, offset, max(0, min(size, end - offset)), version)
