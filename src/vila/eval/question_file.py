"""The original's question files, and the items made of them.

    {"question_id": 262144000, "image": "COCO_test2015_000000262144.jpg", "text": "...", "category": "default"}

The text holds the whole question with what is asked of the answer's form; the picture's line goes in front of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vila.core.errors import DataError
from vila.core.reading import read_jsonl
from vila.core.types import Image, Message
from vila.eval.benchmark import Item

SHORT_ANSWER = "Answer the question using a single word or phrase."
"""What the original's short-answer benchmarks end every question with, on a line of its own."""


@dataclass(frozen=True, slots=True)
class Question:
    """One row. question_id: of the file's own type; image: below the benchmark's folder of pictures."""

    question_id: str | int
    image: str
    text: str
    category: str = ""
    where: str = ""


def read_questions(path: Path) -> list[Question]:
    """All rows. Raises DataError naming file, line and field."""
    out = []
    for number, row in read_jsonl(path):
        where = f"{path} line {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a mapping with question_id, image and text, got {str(row)[:60]!r}")
        for field in ("question_id", "image", "text"):
            kinds = (str, int) if field == "question_id" else (str,)
            if not isinstance(row.get(field), kinds) or isinstance(row[field], bool):
                raise DataError(
                    f"{where}: {field} is {row.get(field)!r}; expected {' or '.join(k.__name__ for k in kinds)}"
                )
        out.append(Question(row["question_id"], row["image"], row["text"], str(row.get("category", "")), where))
    if not out:
        raise DataError(f"{path}: holds no question")
    return out


def ask(picture: Path, text: str) -> tuple[Message, ...]:
    """The conversation of one question: the picture on a line of its own, then the text."""
    return (Message.of("user", Image(picture), f"\n{text}"),)


def items_of(
    questions: Iterable[Question], pictures: Path, *, truths: Mapping[str, str] | None = None, limit: int = 0
) -> list[Item]:
    """Items whose id is the question's, grouped by picture; truths: by id. Raises DataError for an id given twice."""
    seen: dict[str, str] = {}
    items = []
    for question in questions:
        name = str(question.question_id)
        if name in seen:
            raise DataError(f"{question.where}: question_id {name} is given a second time, first in {seen[name]}")
        seen[name] = question.where
        items.append(
            Item(
                name,
                ask(pictures / question.image, question.text),
                (truths or {}).get(name, ""),
                question.image,
                question.category,
                question.question_id,
                question.text,
            )
        )
    return together(items, limit)


def together(items: Sequence[Item], limit: int = 0) -> list[Item]:
    """Items of one group side by side, groups in order of first appearance; about `limit` of them, 0 for all."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    out: list[Item] = []
    for group in groups.values():
        if limit and len(out) >= limit:
            break
        out.extend(group)
    return out
