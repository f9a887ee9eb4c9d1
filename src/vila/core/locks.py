"""OS locks (flock) on directories that a command writes and resumes; standard library only.

The kernel releases a lock when its process ends, however it ends, so a lock file that a killed process left locks
nothing. On a file system without locks a directory is refused only while the process named in its lock file runs on
this machine.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from weakref import WeakValueDictionary

try:
    import fcntl
except ImportError:  # Windows has no fcntl
    fcntl = None  # type: ignore[assignment]

from vila.core.errors import DirectoryInUseError
from vila.core.events import SILENT, Events

LOCK_FILE = ".lock"

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_held: WeakValueDictionary[str, DirectoryLock] = WeakValueDictionary()


class DirectoryLock:
    """A lock on a directory, held from `acquire` to `release` or to the end of the process.

    Two locks with different names on one directory do not exclude each other. Within one process a second exclusive
    lock that does not wait takes over the first: in a notebook, a run that is built again replaces the one before.
    """

    def __init__(self, folder: Path, name: str = LOCK_FILE) -> None:
        self.folder, self.path = folder, folder / name
        self._stream: IO[str] | None = None
        self._is_shared = False
        self._made_folder = False

    def acquire(self, *, wait: bool = False, shared: bool = False, events: Events = SILENT) -> DirectoryLock:
        """Make the directory and lock it.

        wait:   wait for the owner instead of refusing; without effect where there are no locks.
        shared: let other shared locks in, and keep exclusive ones out.
        events: receive a line when the file system has no locks.
        Raises DirectoryInUseError with the owner's host and pid, and OSError if the directory cannot be written.
        """
        key = str(self.path.absolute())
        if not (shared or wait) and (other := _held.get(key)) is not None:
            other.release()
        self._made_folder = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        while self._stream is None:
            stream = self.path.open("a+", encoding="utf-8")
            try:
                self._lock(stream, wait, shared, events)
                # The owner before may have deleted the file between our `open` and our lock.
                if is_same_file(stream, self.path):
                    self._stream = stream
            finally:
                if self._stream is None:
                    stream.close()
        self._is_shared = shared
        write_owner(self._stream)
        if not shared:
            _held[key] = self
        return self

    def _lock(self, stream: IO[str], wait: bool, shared: bool, events: Events) -> None:
        granted = try_lock(stream, wait=wait, shared=shared)
        owner = read_owner(stream)
        if granted is None:
            if not shared and not wait and runs_here(owner) and owner.get("pid") != os.getpid():
                granted = False
            else:
                events.said(
                    f"note: the file system of {self.folder} has no locks, so a second process that writes there is "
                    "not noticed; make sure that only one does"
                )
        if granted is False:
            raise DirectoryInUseError(self.folder, owner.get("host"), owner.get("pid"), owner.get("since"))

    def release(self) -> None:
        """Delete the lock file, and the directory if `acquire` made it and it is empty; a second call does nothing."""
        stream, self._stream = self._stream, None
        if stream is None:
            return
        with suppress(OSError):
            # With a shared lock only the last owner may delete the file.
            if not self._is_shared or try_lock(stream):
                self.path.unlink(missing_ok=True)
        stream.close()
        if self._made_folder:
            with suppress(OSError):
                self.folder.rmdir()
        if _held.get(key := str(self.path.absolute())) is self:
            del _held[key]

    def __enter__(self) -> DirectoryLock:
        return self if self._stream else self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def try_lock(stream: IO[Any], *, wait: bool = False, shared: bool = False) -> bool | None:
    """Lock an open file: True if it is ours now, False if another process has it, None if there are no locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def write_owner(stream: IO[str], **facts: str) -> None:
    """Write host and pid of this process into a lock file, with `facts`."""
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
    stream.seek(0)
    stream.truncate()
    stream.write(json.dumps({**owner, **facts}))
    stream.flush()


def read_owner(stream: IO[str]) -> dict[str, Any]:
    """Read what `write_owner` wrote; empty if it is not there or not whole."""
    stream.seek(0)
    try:
        owner = json.loads(stream.read())
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def runs_here(owner: dict[str, Any]) -> bool:
    """Whether the process that a lock file names runs on this machine."""
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def is_same_file(stream: IO[Any], path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False
