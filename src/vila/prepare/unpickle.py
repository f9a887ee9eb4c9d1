"""Pickled records of other programs: plain values only, checked for nesting and for size when written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.reading import file_errors
from vila.core.restricted_pickle import parse_plain_pickle

_MAX_DEPTH = 100
_MAX_VALUES = 50_000_000


def read_plain_pickle(path: Path) -> Any:
    """Return the value of a pickle of None, bool, int, float, str, bytes, bytearray, list, tuple and dict.

    The file is read whole. Raises DataError with the file's name, and as `value` the first other thing that it asks
    for; also for files that are cut short, and for values nested deeper than 100 levels.
    """
    with file_errors(path, DataError):
        content = path.read_bytes()
    value = parse_plain_pickle(content, file=path, error=DataError)
    _check_depth(value, path)
    return value


def _check_depth(value: Any, path: Path) -> None:
    """Refuse values that contain themselves, are nested too deeply for others, or are endless when written out."""
    level = {id(value): (value, 1)}
    visited = 0
    for _ in range(_MAX_DEPTH):
        following: dict[int, tuple[Any, int]] = {}
        for one, times in level.values():
            inner = one.values() if isinstance(one, dict) else one if isinstance(one, (list, tuple)) else ()
            # A list of twice the same list, and so on, is small here and endless as JSON.
            visited += len(inner) * times
            for part in inner:
                if isinstance(part, (dict, list, tuple)):
                    following[id(part)] = (part, following.get(id(part), (part, 0))[1] + times)
        if visited > _MAX_VALUES:
            raise DataError(f"over {_MAX_VALUES:,} values when written out; refused", file=path)
        if not following:
            return
        level = following
    raise DataError(f"nested over {_MAX_DEPTH} levels, or without end; refused", file=path)
