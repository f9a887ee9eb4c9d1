"""Where the files of a benchmark lie: below `playground/data/eval`, or in the benchmark's own folder of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vila.core.errors import DataError

EVAL_ZIP = "eval.zip, linked from docs/Evaluation.md of github.com/haotian-liu/LLaVA"
"""What holds the original's question files."""


def find(folder: Path, benchmark: str, *places: str, obtain: str = EVAL_ZIP) -> Path:
    """The first of `places`, relative to the benchmark's folder, that exists: a file or a directory.

    folder: `playground/data/eval`, or the benchmark's own folder.
    obtain: where it comes from, for the message.
    Raises DataError naming the file, every path that was looked at, and where it is obtained.
    """
    found = look(folder, benchmark, *places)
    if found is None:
        tried = ", ".join(map(str, dict.fromkeys(_candidates(folder, benchmark, places))))
        raise DataError(f"{benchmark}: {Path(places[0]).name} is missing; looked for {tried}; it comes from {obtain}")
    return found


def look(folder: Path, benchmark: str, *places: str) -> Path | None:
    """Like `find`, but None when none of `places` exists."""
    return next((path for path in _candidates(folder, benchmark, places) if path.exists()), None)


def image_folder(folder: Path, benchmark: str, *places: str) -> Path:
    """The first of `places` that exists, or where the first of them belongs: absent pictures are not an error here."""
    home = folder / benchmark
    return look(folder, benchmark, *places) or (home if home.is_dir() else folder) / places[0]


def _candidates(folder: Path, benchmark: str, places: tuple[str, ...]) -> Iterator[Path]:
    for place in places:
        yield folder / benchmark / place
        yield folder / place
