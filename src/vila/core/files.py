"""Atomic writes of files and directories, directory locks, checks for writability, portable paths, hashes."""

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

try:
    import fcntl
except ImportError:  # Windows has no fcntl
    fcntl = None  # type: ignore[assignment]


LOCK_FILE = ".lock"

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_held: WeakValueDictionary[str, DirectoryLock] = WeakValueDictionary()


class DirectoryLock:
    """OS lock (flock) on a directory, held from `acquire` to `release` or to the end of the process.

    Locks with different names on one directory do not exclude each other. Within one process, a second exclusive lock
    that does not wait replaces the first: in a notebook, a run that is built again replaces the previous one.
    """

    def __init__(self, folder: Path, name: str = LOCK_FILE) -> None:
        self.folder, self.path = folder, folder / name
        self._stream: IO[str] | None = None
        self._is_shared = False
        self._made_folder = False

    def acquire(self, *, wait: bool = False, shared: bool = False, events: Events = SILENT) -> DirectoryLock:
        """Create the directory and lock it.

        wait:   wait for the owner instead of raising; no effect on file systems without locks.
        shared: allow other shared locks, but no exclusive ones.
        events: receives a line if the file system has no locks.
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
                # The previous owner may have deleted the file between our `open` and our lock.
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
                    f"note: the file system of {self.folder} has no locks, so a second writer is not detected; make "
                    "sure that only one process writes there"
                )
        if granted is False:
            raise DirectoryInUseError(self.folder, owner.get("host"), owner.get("pid"), owner.get("since"))

    def release(self) -> None:
        """Delete the lock file, and the directory if `acquire` created it and it is empty. Idempotent."""
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
    """Lock an open file; return True if locked, False if another process has the lock, None if there are no locks."""
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
    """Write host, pid and time of this process, and `facts`, into a lock file."""
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
    stream.seek(0)
    stream.truncate()
    stream.write(json.dumps({**owner, **facts}))
    stream.flush()


def read_owner(stream: IO[str]) -> dict[str, Any]:
    """Return what `write_owner` wrote; empty if it is missing or incomplete."""
    stream.seek(0)
    try:
        owner = json.loads(stream.read())
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def runs_here(owner: dict[str, Any]) -> bool:
    """Return whether the owner in a lock file is a running process of this machine."""
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
    """Return whether an open file is still the file at `path`."""
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
    """Yield a temporary path that is renamed to `target` if the body succeeds, and deleted if it raises.

    The body writes a file, or creates a directory, at that path; a directory replaces an existing one. Files and
    directory entries are fsynced, so `target` survives a power failure. Remains of a killed writer of the same target
    are removed first. Raises VilaError with the target if the disk is full, or if the target is neither file nor
    directory, such as /dev/null.
    """
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise VilaError("is not a regular file; nothing was written", file=target)
    make_directory(target.parent)
    with _holder(target) as holder:
        # The names of the holder's own entries are taken.
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
    """Create the directory for the temporary path; its lock shows that the writer is alive."""
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
        # On NFS a directory with an open file cannot be removed, hence after the lock is closed.
        with suppress(OSError):
            holder.rmdir()


def _locked_holder(target: Path) -> tuple[Path, IO[str]]:
    """Create the holder of a target, and its lock file with this process as the owner."""
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
            # Another process considered the empty directory abandoned, and deleted or replaced it.
            continue
        try_lock(lock, wait=True)
        if is_same_file(lock, holder / _WRITER):
            write_owner(lock, target=target.name)
            return holder, lock
        lock.close()


def remove_partials(folder: Path, name: str = "") -> None:
    """Delete remains of killed writers in `folder` (`.NAME.partial`, `.NAME.*.partial`); live writers are not touched.

    A directory whose replacement was interrupted is restored first.

    name: name of one target; empty: all.
    """
    start = f".{name}." if name else "."
    if folder.is_dir():
        for holder in sorted(folder.iterdir()):
            if holder.name.startswith(start) and holder.name.endswith(".partial"):
                _remove_if_abandoned(holder)


def _remove_if_abandoned(holder: Path) -> None:
    """Delete the holder of a killed writer, but not if the writer may be alive.

    A writer whose holder is deleted before it was locked creates another one.
    """
    with suppress(OSError):
        holder.rmdir()  # empty: its writer was killed before it started or after it finished
    try:
        lock = (holder / _WRITER).open("r+", encoding="utf-8")
    except OSError:
        if _is_old(holder):  # written by an earlier version, without a lock
            _put_back_and_delete(holder, holder.name[1:].rsplit(".", 2)[0])
        return
    with lock:
        granted, owner = try_lock(lock), read_owner(lock)
        if granted is None:
            granted = owner.get("host") == socket.gethostname() and not runs_here(owner)
        # If the lock file is gone, its writer has finished meanwhile.
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
    # Some libraries report it only in their message.
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def make_directory(folder: Path) -> None:
    """Create a directory and its parents, and fsync the directories with new entries."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync_entries(path.parent)


def check_writable(
    path: Path, *, field: str | None = None, is_file: bool = False, is_replaced: bool = False, num_bytes: int = 0
) -> None:
    """Raise ConfigError unless a file or directory can be written at `path`; creates nothing.

    Called at the start of a command, so that writing its result does not fail after hours of work.

    field:       name of the option or recipe field with the path.
    is_file:     whether a file is written; otherwise a directory.
    is_replaced: whether an existing directory is replaced; otherwise files are written into it.
    num_bytes:   required disk space.
    """
    try:
        existing = next(one for one in (path, *path.absolute().parents) if one.exists())
        if is_file and existing == path and not path.is_file():
            # atomic_path would replace a device with a file.
            code = errno.EISDIR if path.is_dir() else errno.EINVAL
            raise OSError(code, "is a directory" if path.is_dir() else "is not a regular file")
        if existing == path and (is_file or (is_replaced and path.is_dir())):
            existing = path.absolute().parent
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{existing} is not a directory")
        free = shutil.disk_usage(existing).free
        if free < num_bytes:
            raise OSError(
                errno.ENOSPC, f"{existing} has {free // 2**20:,} MiB free, {num_bytes // 2**20:,} MiB are required"
            )
        _probe(existing, path)
    except (OSError, ValueError) as error:
        # ValueError: the path contains a zero byte.
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot be written ({reason})",
            field=field,
            value=str(path),
            hint=f"choose another {'file' if is_file else 'directory'}",
        ) from error


def _probe(existing: Path, path: Path) -> None:
    """Write a block into a temporary directory in `existing`, with the longest name that writing `path` needs."""
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
    """Fsync a file, or a directory with its content."""
    below = sorted(path.rglob("*"), reverse=True) if path.is_dir() else []
    for entry in [*below, path]:
        if entry.is_dir():
            _sync_entries(entry)
        elif entry.is_file():
            with entry.open("rb") as stream:
                os.fsync(stream.fileno())


def _sync_entries(folder: Path) -> None:
    """Fsync the entries of a directory, if the system supports it."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # writable, but not readable
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
    """Write JSON atomically, with keys in the given order."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=indent) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write JSON lines atomically."""
    with atomic_path(path) as part, part.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def portable_path(path: str | Path, base: Path) -> str:
    """Return `path` relative to the directory `base` of the file that names it, so that both can be moved together.

    A path outside of that tree starts with `~` if it is below the home directory, and is absolute otherwise. Paths that
    do not exist, such as hub ids, and empty text are returned unchanged. Inverse: `resolve_path`.
    """
    if not str(path) or not os.path.lexists(expanded := Path(path).expanduser()):
        return str(path)
    # `absolute`, not `resolve`: links are kept.
    whole, start, home = (Path(os.path.normpath(one.absolute())) for one in (expanded, base, Path.home()))
    common = Path(os.path.commonpath([whole, start])) if whole.anchor == start.anchor else Path(whole.anchor)
    # A relative path over the root or above the home directory would contain the absolute one.
    if common != Path(whole.anchor) and common not in home.parents:
        return Path(os.path.relpath(whole, start)).as_posix()
    return f"~/{whole.relative_to(home).as_posix()}" if whole.is_relative_to(home) else whole.as_posix()


def without_home(text: str) -> str:
    """Return a message with `~` in place of the home directory."""
    return text.replace(f"{Path.home()}{os.sep}", f"~{os.sep}")


def resolve_path(text: str, base: Path) -> Path:
    """Return the path that `portable_path` wrote into a file in the directory `base`."""
    path = Path(text).expanduser()
    return path if path.is_absolute() else base / path


def cache_dir() -> Path:
    """Return the cache directory for downloads, indexes and features: `$VILA_CACHE`, or `~/.cache/vila`."""
    return Path(os.environ.get("VILA_CACHE") or "~/.cache/vila").expanduser()


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_tree(folder: Path, pattern: str = "*") -> str:
    """Return a SHA-256 over names and contents of the files below `folder` that match `pattern`."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob(pattern) if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()
