"""Convert a CSV table of images, questions and answers to JSON Lines in the data format `messages`."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila.core.errors import ConfigError, DataError
from vila.core.files import write_jsonl
from vila.core.reading import file_errors

_QUESTION, _ANSWERS, _IMAGES = "question", ("answer", "caption"), ("image", "file")
_FIRST_PROBLEMS = 10


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row of the table. image: resolved file, None for a text-only row; `name` is its path below the image root."""

    image: Path | None
    name: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Converted:
    """Result of a conversion.

    samples: number of samples in `out`. first: the first row with an image, else the first row.
    linked:  directory with links or copies of the images; None if the images are below the directory of `out`.
    """

    out: Path
    samples: int
    first: TableRow
    linked: Path | None


def convert_csv(table: Path, images: Path, out: Path) -> Converted:
    """Write a sample per row of `table` to `out`, atomically.

    Columns: `image` (or `file`), a path below `images`, and `question` with `answer`, or `caption`. Rows without an
    image become text-only samples; other columns are ignored. Image paths in `out` are relative to its directory;
    images outside of it are hard-linked, or else copied, into `NAME_images` next to it.
    Raises ConfigError for missing columns, DataError with file and line for the first rows with errors.
    """
    found = list(_rows(table, images))
    rows = [row for row in found if isinstance(row, TableRow)]
    problems = [row for row in found if isinstance(row, DataError)]
    if problems:
        raise _collect(table, problems)
    if not rows:
        raise DataError("no rows below the header", file=table)
    base = out.parent.resolve()
    outside = any(row.image and not row.image.is_relative_to(base) for row in rows)
    linked = base / f"{out.stem}_images" if outside else None
    write_jsonl(out, (_sample(row, f"{table.stem}/{number}", base, linked) for number, row in enumerate(rows, start=1)))
    first = next((row for row in rows if row.image), rows[0])
    return Converted(out, len(rows), first, linked)


def _rows(table: Path, images: Path) -> Iterator[TableRow | DataError]:
    """Yield valid rows, and an error for each invalid row."""
    root = images.resolve()
    with file_errors(table), table.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        image, answer = _columns(table, reader.fieldnames or ())
        lines = [(reader.line_num, row) for row in reader]
    for line, row in lines:
        try:
            yield _row(row, image, answer, root)
        except DataError as error:
            yield error.within(table, f"line {line}")


def _row(row: dict[str, Any], image: str, answer: str, root: Path) -> TableRow:
    if None in row:
        raise DataError("more cells than columns in the header", hint="quote text with commas")
    cells = {key: (row.get(key) or "").strip() for key in (image, _QUESTION, answer)}
    required = [answer, *([_QUESTION] if answer == "answer" else [])]
    if empty := [column for column in required if not cells[column]]:
        raise DataError("empty", field=empty[0])
    if not cells[image] and not cells[_QUESTION]:
        raise DataError("neither an image nor a question", field=image)
    file = (root / cells[image]).resolve() if cells[image] else None
    if file is not None and not (file.is_relative_to(root) and file.is_file()):
        raise DataError(f"no such file below {root}", field=image, value=cells[image])
    name = "" if file is None else file.relative_to(root).as_posix()
    return TableRow(file, name, cells[_QUESTION], cells[answer])


def _columns(table: Path, found: Sequence[str]) -> tuple[str, str]:
    image = next((name for name in _IMAGES if name in found), "")
    answer = next((name for name in _ANSWERS if name in found), "")
    if not image or not answer or (answer == "answer" and _QUESTION not in found):
        raise ConfigError(
            field="header",
            file=table,
            value=", ".join(found),
            expected="the columns image, question, answer, or image, caption",
        )
    return image, answer


def _collect(table: Path, problems: Sequence[DataError]) -> DataError:
    if len(problems) == 1:
        return problems[0]
    shown = [str(problem) for problem in problems[:_FIRST_PROBLEMS]]
    more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
    return DataError("\n".join([f"{len(problems)} rows have errors; nothing was written", *shown, *more]), file=table)


def _sample(row: TableRow, name: str, base: Path, linked: Path | None) -> dict[str, Any]:
    parts = []
    if row.image is not None:
        file = row.image
        if linked is not None:
            file = linked / row.name
            _link(row.image, file)
        parts.append({"type": "image", "path": file.relative_to(base).as_posix()})
    texts = [{"type": "text", "text": row.question}] if row.question else []
    return {
        "id": name,
        "messages": [{"role": "user", "content": [*parts, *texts]}, {"role": "assistant", "content": row.answer}],
    }


def _link(file: Path, target: Path) -> None:
    """Hard-link `file` to `target`, or copy it if the file system does not support links."""
    with file_errors(target):
        if target.exists():
            if target.samefile(file):
                return
            target.unlink()
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target)
        except OSError:
            shutil.copy2(file, target)
