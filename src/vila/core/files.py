"""Files that are either whole or absent: atomic writes, hashes, JSON lines."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vila.core.errors import VilaError


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that becomes `target` when the body ends well, and vanishes when it does not.

    The body writes a file, or makes a directory, at the path it is given. A directory replaces an existing one.
    Raises VilaError naming the target when the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    part = holder / target.name
    try:
        yield part
        _sync(part)
        if part.is_dir() and target.exists():
            target.rename(holder / "replaced")
        part.replace(target)
    except Exception as error:
        if _disk_is_full(error):
            raise VilaError(
                f"{target}: no space left on the device ({_free_mib(target.parent)} MiB free); nothing was written"
            ) from error
        raise
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _disk_is_full(error: Exception) -> bool:
    # Libraries written in other languages report it in words only.
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def _sync(path: Path) -> None:
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _free_mib(folder: Path) -> int:
    return shutil.disk_usage(folder).free // 2**20


def remove_partials(folder: Path) -> None:
    """Delete what writers that were killed left in `folder`: `.NAME.*.partial` directories.

    A directory that was being replaced when its writer died is put back first.
    """
    for holder in folder.glob(".*.partial") if folder.is_dir() else ():
        replaced = holder / "replaced"
        target = folder / holder.name[1:].rsplit(".", 2)[0]
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(holder, ignore_errors=True)


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
