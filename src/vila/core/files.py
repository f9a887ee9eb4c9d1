"""Files that are either whole or absent: atomic writes, hashes, JSON lines."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from weakref import WeakValueDictionary

from vila.core.errors import ConfigError, DirectoryInUseError, VilaError
from vila.core.progress import SILENT, Events

# --- locks
# OS locks (flock) on directories that a command writes and resumes; standard library only.


try:
    import fcntl
except ImportError:  # Windows has no fcntl
    fcntl = None  # type: ignore[assignment]


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
                events.log(
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


_WRITER = "writer.lock"
_REPLACED = "replaced"
_OLD_S = 3600.0
_BLOCK = 4096


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target` that becomes `target` if the body succeeds, and is deleted if it fails.

    The body writes a file, or makes a directory, at the path it is given. A directory replaces an existing one.
    Files and directory entries are fsynced, so after the call `target` survives a loss of power. What a killed writer
    of the same target left is removed first. Raises VilaError naming the target when the disk is full, and for a target
    that is neither file nor directory, such as /dev/null.
    """
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise VilaError("is not a regular file; nothing was written", file=target)
    make_directory(target.parent)
    with _holder(target) as holder:
        # The holder has two names of its own.
        part = holder / (f"new-{target.name}" if target.name in (_WRITER, _REPLACED) else target.name)
        try:
            yield part
            _sync(part)
            if part.is_dir() and target.exists():
                target.rename(holder / _REPLACED)
                _sync_entries(holder)
            part.replace(target)
            _sync_entries(target.parent)
        except Exception as error:
            if _disk_is_full(error):
                raise VilaError(
                    f"no space left on the device ({_free_mib(target.parent)} MiB free); nothing was written",
                    file=target,
                ) from error
            raise


@contextmanager
def _holder(target: Path) -> Iterator[Path]:
    """Make the directory that holds what is being written; its lock tells others that the writer is alive."""
    holder, lock = _locked_holder(target)
    try:
        with lock:
            try:
                yield holder
            finally:
                for entry in [entry for entry in holder.iterdir() if entry.name != _WRITER]:
                    shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
                (holder / _WRITER).unlink(missing_ok=True)
    finally:
        # An open file on NFS keeps its directory, hence after the lock was closed.
        with suppress(OSError):
            holder.rmdir()


def _locked_holder(target: Path) -> tuple[Path, IO[str]]:
    """Make the holder of a target and its lock file, locked and with this process as the owner."""
    while True:
        holder = target.with_name(f".{target.name}.partial")
        if holder.exists():
            _remove_if_abandoned(holder)
        try:
            holder.mkdir(mode=0o700)
        except FileExistsError:  # another writer of the same target is alive
            holder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        try:
            lock = (holder / _WRITER).open("x+", encoding="utf-8")
        except (FileNotFoundError, FileExistsError):
            # Another process took the empty directory for an abandoned one: it deleted it, or made its own there.
            continue
        try_lock(lock, wait=True)
        if is_same_file(lock, holder / _WRITER):
            write_owner(lock, target=target.name)
            return holder, lock
        lock.close()


def remove_partials(folder: Path, name: str = "") -> None:
    """Delete what killed writers left in `folder` (`.NAME.partial`, `.NAME.*.partial`); live writers are left alone.

    A directory that was being replaced when its writer died is put back first.
    name: of one target; empty: all.
    """
    start = f".{name}." if name else "."
    if folder.is_dir():
        for holder in sorted(folder.iterdir()):
            if holder.name.startswith(start) and holder.name.endswith(".partial"):
                _remove_if_abandoned(holder)


def _remove_if_abandoned(holder: Path) -> None:
    """Delete the holder of a killed writer; leave it if its writer may be alive.

    A writer that has not locked its holder yet notices that it is gone, and makes another.
    """
    with suppress(OSError):
        holder.rmdir()  # an empty one: its writer was killed before it began, or when all was done
    try:
        lock = (holder / _WRITER).open("r+", encoding="utf-8")
    except OSError:
        if _is_old(holder):  # of an earlier version, which had no locks
            _put_back_and_delete(holder, holder.name[1:].rsplit(".", 2)[0])
        return
    with lock:
        granted, owner = try_lock(lock), read_owner(lock)
        if granted is None:
            granted = owner.get("host") == socket.gethostname() and not runs_here(owner)
        # A file that is gone was released by its writer meanwhile.
        if granted and is_same_file(lock, holder / _WRITER):
            _put_back_and_delete(holder, str(owner.get("target", "")))


def _put_back_and_delete(holder: Path, name: str) -> None:
    replaced = holder / _REPLACED
    if replaced.exists():
        if not name:
            return
        if not (target := holder.with_name(name)).exists():
            replaced.rename(target)
            _sync_entries(target.parent)
    shutil.rmtree(holder, ignore_errors=True)


def _is_old(holder: Path) -> bool:
    try:
        return time.time() - holder.stat().st_mtime > _OLD_S
    except OSError:
        return False


def _disk_is_full(error: Exception) -> bool:
    # Libraries written in other languages report it in words only.
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def make_directory(folder: Path) -> None:
    """Make a directory and its parents, and fsync the directories that hold the new entries."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync_entries(path.parent)


def check_writable(
    path: Path, *, field: str | None = None, is_file: bool = False, is_replaced: bool = False, num_bytes: int = 0
) -> None:
    """Raise ConfigError unless a file or directory can be written at `path`; leaves nothing behind.

    For the start of a command: what it writes in the end must not fail after hours of work.
    field:       name of the option or recipe field that names the path.
    is_file:     a file is written atomically, where there may be one; otherwise a directory.
    is_replaced: a directory that exists is replaced as a whole; otherwise files are written into it.
    num_bytes:   least space that is needed.
    """
    try:
        existing = next(one for one in (path, *path.absolute().parents) if one.exists())
        if is_file and existing == path and not path.is_file():
            # atomic_path would replace a device by a file.
            code = errno.EISDIR if path.is_dir() else errno.EINVAL
            raise OSError(code, "is a directory" if path.is_dir() else "is not a regular file")
        if existing == path and (is_file or (is_replaced and path.is_dir())):
            existing = path.absolute().parent
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{existing} is not a directory")
        free = shutil.disk_usage(existing).free
        if free < num_bytes:
            raise OSError(
                errno.ENOSPC, f"{existing} has {free // 2**20:,} MiB free, {num_bytes // 2**20:,} MiB are needed"
            )
        _probe(existing, path)
    except (OSError, ValueError) as error:
        # ValueError: a zero byte in the path.
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot be written ({reason})",
            field=field,
            value=str(path),
            hint=f"choose another {'file' if is_file else 'directory'}",
        ) from error


def _probe(existing: Path, path: Path) -> None:
    """Write a block in a directory below `existing`, with the longest name that writing `path` takes."""
    missing = [one.name for one in (path, *path.absolute().parents) if not one.exists()]
    name = max([path.absolute().name, *missing], key=lambda one: len(os.fsencode(one)))
    probe = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=existing))
    try:
        with tempfile.TemporaryFile(dir=probe) as stream:
            stream.write(bytes(_BLOCK))
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        probe.rmdir()


def _sync(path: Path) -> None:
    """Fsync a file, or a directory with all that is in it."""
    below = sorted(path.rglob("*"), reverse=True) if path.is_dir() else []
    for entry in [*below, path]:
        if entry.is_dir():
            _sync_entries(entry)
        elif entry.is_file():
            with entry.open("rb") as stream:
                os.fsync(stream.fileno())


def _sync_entries(folder: Path) -> None:
    """Fsync the entries of a directory, where the system has that."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # it may be written, but not read
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some network file systems
            raise
    finally:
        os.close(handle)


def _free_mib(folder: Path) -> int:
    return shutil.disk_usage(folder).free // 2**20


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write JSON atomically, keys in their own order."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=indent) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write JSON lines atomically."""
    with atomic_path(path) as part, part.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def portable_path(path: str | Path, base: Path) -> str:
    """Return how a file in the directory `base` names `path`: relative to `base`, so that both can move together.

    A path elsewhere begins with `~` if it is below the home directory, and is absolute otherwise. What does not exist,
    such as a hub id, and an empty text stay as they are. The opposite is `resolve_path`.
    """
    if not str(path) or not os.path.lexists(expanded := Path(path).expanduser()):
        return str(path)
    # Links are kept as they are, so no `resolve`.
    whole, start, home = (Path(os.path.normpath(one.absolute())) for one in (expanded, base, Path.home()))
    common = Path(os.path.commonpath([whole, start])) if whole.anchor == start.anchor else Path(whole.anchor)
    # A relative path that climbs to the root or above the home directory would spell out the way down again.
    if common != Path(whole.anchor) and common not in home.parents:
        return Path(os.path.relpath(whole, start)).as_posix()
    return f"~/{whole.relative_to(home).as_posix()}" if whole.is_relative_to(home) else whole.as_posix()


def without_home(text: str) -> str:
    """Return a message for a report: paths below the home directory begin with `~`."""
    return text.replace(f"{Path.home()}{os.sep}", f"~{os.sep}")


def resolve_path(text: str, base: Path) -> Path:
    """Return the path that `portable_path` wrote into a file of the directory `base`."""
    path = Path(text).expanduser()
    return path if path.is_absolute() else base / path


def cache_dir() -> Path:
    """Where parts and features are kept between runs: `$VILA_CACHE`, or `~/.cache/vila`."""
    return Path(os.environ.get("VILA_CACHE") or "~/.cache/vila").expanduser()


def sha256_file(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_tree(folder: Path, pattern: str = "*") -> str:
    """One hash over names and contents of the files below `folder` that match `pattern`, in name order."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob(pattern) if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()
