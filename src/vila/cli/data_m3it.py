"""Where the sets of M3IT lie in a copy of the release: FOLDER/.../SET/train*.jsonl, or parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vila.core.errors import ConfigError, UnknownNameError

_ENDS = (".jsonl", ".jsonl.gz", ".jsonl.zip", ".parquet")


def training_files(folder: Path, chosen: Sequence[str]) -> dict[str, list[Path]]:
    """The training files of each set by its name; all sets of the recipe where none is chosen.

    Files are those whose names begin with `train`; where a set has several kinds, the first of .jsonl, .jsonl.gz,
    .jsonl.zip, .parquet. Raises ConfigError naming every set without one.
    """
    from vila.prepare.m3it import SETS

    known = [name for names in SETS.values() for name in names]
    for name in chosen:
        if name not in known:
            raise UnknownNameError("M3IT set", name, known)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name the one that holds M3IT")
    found = {name: _files(folder, name) for name in (chosen or known)}
    missing = [name for name, files in found.items() if not files]
    if missing:
        raise ConfigError(
            f"{folder}: no {'/'.join(missing[:1])}/train*{_ENDS[0]} or {_ENDS[-1]} below it; {len(missing)} of "
            f"{len(found)} sets are missing: {', '.join(missing)}. Name those that you have with --set"
        )
    return found


def _files(folder: Path, name: str) -> list[Path]:
    files = [path for path in sorted(folder.rglob(f"{name}/train*")) if path.is_file()]
    for end in _ENDS:
        if these := [path for path in files if path.name.lower().endswith(end)]:
            return these
    return []
