"""`vila data from-csv`: a table of images, questions and answers as the JSON lines of format `messages`."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vila.core.errors import ConfigError, DataError
from vila.core.files import write_jsonl
from vila.core.reading import file_errors

START_MODEL: Final = "runs/starter/model"
"""The model that the printed commands go on from: that of `vila quickstart`."""
_QUESTION, _ANSWERS, _IMAGES = "question", ("answer", "caption"), ("image", "file")
_FIRST_PROBLEMS = 10


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table. image: file with links resolved, None for text alone; `name` is its path below the images."""

    image: Path | None
    name: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written.

    samples: number of them, in `out`. first: the first row with an image, else the first.
    linked:  directory that images were linked or copied into; None if they are below the directory of `out`.
    """

    out: Path
    samples: int
    first: Row
    linked: Path | None

    def next_commands(self) -> list[str]:
        """Return commands to check the data, train on them and ask the trained model, ready for a shell.

        `vila quickstart` is among them where its model is not here.
        """
        here = Path(START_MODEL).is_dir()
        run = self.out.parent / f"{self.out.stem}_run"
        mixture = json.dumps([{"format": "messages", "path": str(self.out)}])
        train = [f"model.path={START_MODEL}", f"data.mixture={mixture}", "budget.tokens=0", "budget.epochs=3"]
        commands = [
            ["vila", "data", "check", str(self.out), *(["--model", START_MODEL] if here else [])],
            *([] if here else [["vila", "quickstart"]]),
            ["vila", "train", "starter/3_sft", *train, f"output.dir={run}"],
            ["vila", "run", str(run / "model"), *self._question()],
        ]
        return [shlex.join(command) for command in commands]

    def _question(self) -> list[str]:
        image = ["--image", str(self.first.image)] if self.first.image else []
        return [*image, "--prompt", self.first.question]


def convert_csv(table: Path, images: Path, out: Path) -> Converted:
    """Write a sample for each row of `table` to `out`, atomically.

    The columns are `image` (or `file`), a path below `images`, and `question` with `answer`, or `caption` alone. A row
    without an image is text alone. Other columns are left out. Paths in `out` start from its directory, so that no
    image root has to be given; images that are not below it are linked, or else copied, into `NAME_images` beside it.
    Raises ConfigError for missing columns, DataError with file and line for each of the first rows that are wrong.
    """
    found = list(_rows(table, images))
    rows = [row for row in found if isinstance(row, Row)]
    problems = [row for row in found if isinstance(row, DataError)]
    if problems:
        raise _together(table, problems)
    if not rows:
        raise DataError("no row below the header", file=table)
    base = out.parent.resolve()
    outside = any(row.image and not row.image.is_relative_to(base) for row in rows)
    linked = base / f"{out.stem}_images" if outside else None
    write_jsonl(out, (_sample(row, f"{table.stem}/{number}", base, linked) for number, row in enumerate(rows, start=1)))
    first = next((row for row in rows if row.image), rows[0])
    return Converted(out, len(rows), first, linked)


def _rows(table: Path, images: Path) -> Iterator[Row | DataError]:
    """Yield rows, and errors for those that cannot become a sample."""
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


def _row(row: dict[str, Any], image: str, answer: str, root: Path) -> Row:
    if None in row:
        raise DataError("more cells than the header has columns", hint="put text with commas into double quotes")
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
    return Row(file, name, cells[_QUESTION], cells[answer])


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


def _together(table: Path, problems: Sequence[DataError]) -> DataError:
    if len(problems) == 1:
        return problems[0]
    shown = [str(problem) for problem in problems[:_FIRST_PROBLEMS]]
    more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
    return DataError("\n".join([f"{len(problems)} rows are wrong; nothing was written", *shown, *more]), file=table)


def _sample(row: Row, name: str, base: Path, linked: Path | None) -> dict[str, Any]:
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
    """Make `target` a hard link to `file`, or a copy where the file system allows no link."""
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
