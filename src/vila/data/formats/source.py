"""A path as one source of samples: a file, a directory of shards or a pattern, and options that are checked."""

from __future__ import annotations

import glob
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vila.core.errors import ConfigError, DataError
from vila.core.events import SILENT, Events
from vila.core.types import Sample
from vila.data.formats.rows import Row, Rows, open_rows
from vila.data.formats.scan_tar import COMPRESSED
from vila.data.index import open_index

JSON = (".jsonl", ".json")
ALL = (".tar", ".parquet", *JSON)

Options = TypeVar("Options")


class RecordSource:
    """Samples of one or more files, in the order of their names. Media stay unopened."""

    def __init__(
        self,
        path: Path,
        convert: Callable[[Row], Sample],
        *,
        kinds: tuple[str, ...] = ALL,
        columns: tuple[str, ...] = (),
        events: Events = SILENT,
        keep: tuple[str, Callable[[Row], bool]] | None = None,
    ) -> None:
        """convert: makes the sample of a row; raises DataError. Picklable, so that the source is.

        kinds: ends of file names that are read. columns: those of parquet files that `convert` needs.
        keep: name of a rule and the rule; rows that it refuses are left out. It is asked once for every row of a file.
        Raises DataError when there is no such file, or none of these kinds.
        """
        self._convert = convert
        self._parts: list[Rows] = []
        for file in files_of(path, kinds):
            rows = open_rows(file, columns, events)
            self._parts.append(rows if keep is None else _Kept(rows, *keep, events))
        self._ends = list(accumulate(map(len, self._parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index`. Raises IndexError outside range(len), DataError naming file, row and reason."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is outside range({len(self)})")
        part = bisect_right(self._ends, index)
        return self._convert(self._parts[part][index - (self._ends[part - 1] if part else 0)])


class _Kept:
    """Those rows of a file that a rule keeps."""

    def __init__(self, rows: Rows, name: str, rule: Callable[[Row], bool], events: Events) -> None:
        self.path, self._rows = rows.path, rows

        def scan(path: Path, advanced: Callable[[int], None]) -> Iterator[np.ndarray]:
            share = path.stat().st_size // max(1, len(rows))
            for number in range(len(rows)):
                advanced(share)
                if rule(rows[number]):
                    yield np.array([[number, 0]], dtype=np.uint64)

        self._index = open_index(rows.path, f"kept {name}", scan, events)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> Row:
        return self._rows[self._index[number][0]]


def files_of(path: Path, kinds: tuple[str, ...]) -> list[Path]:
    """The files that `path` stands for, sorted by name.

    A directory gives its files of the first of `kinds` that it has any of: the `.tar` shards, not the `.json` beside
    them. A path with `*`, `?` or `[` that does not exist is a pattern. Hidden files are left out.
    Raises DataError.
    """
    if path.is_file():
        return [_readable(path, kinds)]
    if path.is_dir():
        found = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
        for kind in kinds:
            if chosen := [file for file in found if file.suffix == kind]:
                return chosen
        for file in found:
            _refuse_compressed(file)
        raise DataError(f"{path}: the directory holds no {' or '.join(kinds)} files")
    if any(character in str(path) for character in "*?["):
        matching = [Path(name) for name in sorted(glob.glob(str(path)))]  # noqa: PTH207 the pattern may be absolute
        if matching:
            return [_readable(file, kinds) for file in matching]
        raise DataError(f"{path}: no file matches the pattern")
    raise DataError(f"{path}: no such file")


def _readable(path: Path, kinds: tuple[str, ...]) -> Path:
    _refuse_compressed(path)
    if path.suffix not in kinds:
        raise DataError(f"{path}: cannot be read by this format; it reads {', '.join(kinds)}")
    return path


def _refuse_compressed(path: Path) -> None:
    if path.name.lower().endswith((*COMPRESSED, ".gz", ".zst", ".xz", ".bz2", ".zip")):
        raise DataError(f"{path}: compressed files allow no random access; unpack it (pictures inside hardly shrink)")
    if path.suffix == ".pkl":
        raise DataError(f"{path}: pickles can run code and are not read; convert the shard first")


def read_options(kind: type[Options], given: Mapping[str, Any], format_name: str) -> Options:
    """Options of a format as its dataclass of options. Raises ConfigError naming every option that is not right."""
    known = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]
    problems = []
    for name, value in given.items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            problems.append(f"unknown option {name!r}{hint} (known: {', '.join(known) or 'none'})")
            continue
        choices = known[name].metadata.get("choices")
        if choices and value not in choices:
            problems.append(f"option {name!r} is {value!r}, not one of {', '.join(map(repr, choices))}")
        elif not choices and not _fits(value, known[name].default):
            problems.append(f"option {name!r} is {value!r}, expected {type(known[name].default).__name__}")
    if problems:
        raise ConfigError.collect(f"format {format_name!r}", problems)
    return kind(**given)


def _fits(value: Any, default: Any) -> bool:
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))
