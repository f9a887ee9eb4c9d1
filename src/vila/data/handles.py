"""Open files of this process, few at a time, and reads that notice when a file is not the one that was indexed."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

from vila.core.errors import DataError

MAX_OPEN = 64
"""Files that one process keeps open; the one not read for longest is closed first."""


class Stamp(NamedTuple):
    """What tells one state of a file from another."""

    size: int
    mtime_ns: int


def stamp_of(path: Path) -> Stamp:
    """Size and time of a file. Raises DataError when it is not there or not a file."""
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    if path.is_dir():
        raise DataError("a directory, expected a file", file=path)
    return Stamp(found.st_size, found.st_mtime_ns)


class _Handle:
    """A file descriptor that is closed when nobody reads from it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class _Handles:
    def __init__(self) -> None:
        self._open: OrderedDict[Path, _Handle] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, path: Path) -> _Handle:
        with self._lock:
            handle = self._open.get(path)
            if handle is None:
                handle = self._open[path] = _Handle(path)
                while len(self._open) > MAX_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
            return handle

    def forget(self, path: Path) -> None:
        with self._lock:
            self._open.pop(path, None)


_HANDLES = _Handles()


def _start_anew() -> None:
    global _HANDLES
    _HANDLES = _Handles()


# A lock that another thread held at the moment of the fork would never be released in the child.
os.register_at_fork(after_in_child=_start_anew)


def read_span(path: Path, offset: int, size: int, stamp: Stamp | None = None) -> bytes:
    """Exactly `size` bytes from `offset`. Threads may call it; no position is shared between them or with children.

    stamp: what the file was when `offset` was noted.
    Raises DataError when the file is not there, is shorter, or is not what it was.
    """
    try:
        handle = _HANDLES[path]
        found = os.fstat(handle.number)
        if stamp is not None and stamp != (found.st_size, found.st_mtime_ns):
            # The handle may be older than the index; a fresh one decides.
            forget(path)
            handle = _HANDLES[path]
            found = os.fstat(handle.number)
            if stamp != (found.st_size, found.st_mtime_ns):
                raise changed(path)
        # Sizes that are wrong are refused before memory is taken for them.
        missing = offset + size - found.st_size
        content = _read(handle.number, offset, size) if missing <= 0 else b""
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(content) != size:
        raise DataError(
            f"ends {max(missing, 0) or size - len(content)} bytes before byte {offset + size}",
            file=path,
            hint="copy or download it again",
        )
    return content


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(error.strerror or str(error) if path.exists() else "no such file", file=path)


def forget(path: Path) -> None:
    """Open `path` anew at its next reading."""
    _HANDLES.forget(path)


def _read(number: int, offset: int, size: int) -> bytes:
    content = os.pread(number, size, offset)
    while len(content) < size and (more := os.pread(number, size - len(content), offset + len(content))):
        content += more
    return content


def changed(path: Path) -> DataError:
    """The error for a file that was written to after it was indexed."""
    return DataError(
        "the file has changed since it was opened", file=path, hint="let its writer finish, then start again"
    )
