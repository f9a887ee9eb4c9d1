"""`vila data from-csv`: a table of pictures, questions and answers as the JSON lines of format `messages`."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vila.core.errors import ConfigError, DataError
from vila.core.files import write_jsonl

_QUESTION, _ANSWERS, _IMAGES = "question", ("answer", "caption"), ("image", "file")


def convert_csv(table: Path, images: Path, out: Path) -> int:
    """Write one sample a row of `table` to `out`, atomically; returns their number.

    The columns are `image` (or `file`), a path below `images`, and `question` with `answer`, or `caption` alone. A row
    without an image is text alone. Others are left out.
    Raises ConfigError for missing columns, DataError with file and line for each of the first rows that are wrong.
    """
    rows = list(_samples(table, images))
    problems = [row for row in rows if isinstance(row, str)]
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise DataError("\n".join([*problems[:10], *more]))
    if not rows:
        raise DataError(f"{table}: holds no row below its header")
    write_jsonl(out, rows)
    return len(rows)


def _samples(table: Path, images: Path) -> Iterator[dict[str, Any] | str]:
    """Samples, and what is wrong with the rows that cannot become one."""
    root = images.resolve()
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            image, answer = _columns(table, reader.fieldnames or ())
            for number, row in enumerate(reader, start=1):
                where = f"{table} line {reader.line_num}"
                cells = {key: (row.get(key) or "").strip() for key in (image, _QUESTION, answer)}
                if None in row:
                    yield f"{where}: more cells than the header has columns; put text with commas into double quotes"
                elif not cells[answer]:
                    yield f"{where}: the column {answer!r} is empty"
                elif answer == "answer" and not cells[_QUESTION]:
                    yield f"{where}: the column 'question' is empty"
                elif cells[image] and not _is_below(root, cells[image]):
                    yield f"{where}: picture {cells[image]!r} is not in {images}"
                elif not cells[image] and not cells[_QUESTION]:
                    yield f"{where}: neither a picture nor a question"
                else:
                    yield _sample(f"{table.stem}/{number}", cells[image], cells[_QUESTION], cells[answer])
    except UnicodeDecodeError as error:
        raise DataError(f"{table}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{table}: not CSV ({error})") from error


def _columns(table: Path, found: Any) -> tuple[str, str]:
    image = next((name for name in _IMAGES if name in found), "")
    answer = next((name for name in _ANSWERS if name in found), "")
    if not image or not answer or (answer == "answer" and _QUESTION not in found):
        raise ConfigError(
            f"{table}: the header is {', '.join(found) or 'empty'}; expected image, question, answer, or image, caption"
        )
    return image, answer


def _is_below(root: Path, name: str) -> bool:
    path = (root / name).resolve()
    return path.is_relative_to(root) and path.is_file()


def _sample(name: str, image: str, question: str, answer: str) -> dict[str, Any]:
    parts = [{"type": "image", "path": image}] if image else []
    texts = [{"type": "text", "text": question}] if question else []
    return {
        "id": name,
        "messages": [{"role": "user", "content": [*parts, *texts]}, {"role": "assistant", "content": answer}],
    }
