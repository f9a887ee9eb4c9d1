"""`vila data index`: where the indexes of data files lie, and whether they were there before."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vila.core.events import SILENT, Events

if TYPE_CHECKING:
    from vila.data.loader import Entry

_NAME_END = 200


@dataclass(frozen=True, slots=True)
class Indexed:
    """What indexing came to: the number of records, and the index files that were built and that were found."""

    records: int
    built: tuple[Path, ...]
    found: tuple[Path, ...]


def index_data(entry: Entry, events: Events = SILENT) -> Indexed:
    """Open a data set, which indexes each of its files that has no index or a stale one."""
    from vila.data.loader import open_entry

    before = _indexes(entry.path)
    records = len(open_entry(entry, events))
    after = _indexes(entry.path)
    found = {file for file, state in after.items() if before.get(file) == state}
    return Indexed(records, tuple(sorted(after.keys() - found)), tuple(sorted(found)))


def _indexes(path: str) -> dict[Path, tuple[int, int]]:
    """The index files that speak of a file, a folder's files or a pattern's, each with what a new file changes."""
    from vila.data.index import index_folder, read_header

    # An index names its file by the end of the path.
    names = {os.path.realpath(file)[-_NAME_END:] for file in _files(path)}
    return {
        file: (file.stat().st_ino, file.stat().st_mtime_ns)
        for file in sorted(index_folder().glob("*.index"))
        if (read_header(file) or {}).get("path") in names
    }


def _files(path: str) -> list[str]:
    if Path(path).is_dir():
        return [str(file) for file in Path(path).iterdir()]
    return [path] if Path(path).exists() else glob.glob(path)  # noqa: PTH207 the pattern may be absolute
