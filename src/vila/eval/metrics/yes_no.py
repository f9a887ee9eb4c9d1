"""Rows of answers to MME: the question that each is about, what it says, and the two about one picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vila.core.errors import DataError
from vila.core.reading import read_text
from vila.eval.annotations import SHORT_ANSWER, format_ids

_YES_NO = "Please answer yes or no."

Key = tuple[str, str, str]
"""Category, name of the picture's text file, question as it stands there."""


class Row(NamedTuple):
    """An answer that has found its question."""

    key: Key
    question_id: str
    text: str


def key_of(question_id: str, prompt: str, truths: Mapping[Key, str]) -> Key:
    """The question that a row of answers is about, found as the original's converter finds it.

    It takes what it asked of the answer's form out of the prompt again, and tries two spaces where one does not fit.
    """
    category, file = question_id.split("/")[0], question_id.split("/")[-1].split(".")[0] + ".txt"
    if SHORT_ANSWER in prompt:
        prompt = prompt.replace(SHORT_ANSWER, "").strip()
    if _YES_NO not in prompt:
        one, two = f"{prompt} {_YES_NO}", f"{prompt}  {_YES_NO}"
        return (category, file, one if (category, file, one) in truths else two)
    return category, file, prompt


def read_upstream(text: str) -> str:
    """`yes`, `no` or `other`: what stands within the first four characters; yes goes before no."""
    return _head(text.lower()[:4])


def read_lmms(text: str) -> str:
    """The same after stripping ends and full stops; a lone letter counts too."""
    text = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) or _head(text[:4])


def _head(text: str) -> str:
    return "yes" if "yes" in text else "no" if "no" in text else "other"


def picture_of(key: Key) -> str:
    """The picture that a question is about: `OCR/0001`."""
    return f"{key[0]}/{key[1].removesuffix('.txt')}"


def read_truths(path: Path) -> Iterable[tuple[str, str]]:
    """Yield the questions of an image's text file with their Yes or No. Raises DataError with file and line."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        cells = line.strip().split("\t")
        if len(cells) != 2 or cells[1].lower() not in ("yes", "no"):
            raise DataError(file=path, record=f"line {number}", value=line, expected="a question, a tab and Yes or No")
        yield cells[0], cells[1]


def misplaced(rows: Sequence[Row]) -> list[str]:
    """Whether the original, which pairs neighbours of a category, would have paired answers about other pictures."""
    by_category: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_category[row.key[0]].append(row)
    wrong = [
        category
        for category, own in by_category.items()
        if any(picture_of(a.key) != picture_of(b.key) for a, b in zip(own[::2], own[1::2], strict=False))
    ]
    if not wrong:
        return []
    return [
        f"the two answers about a picture do not stand together in {', '.join(wrong)}: the original, which pairs "
        "neighbours, would have given another acc+"
    ]


def pair_up(name: str, rows: Sequence[Row], once: bool) -> dict[str, dict[str, list[tuple[Row, Row]]]]:
    """The two answers about each picture by category and picture, as often as they were given.

    once: refuse pictures that were answered more often. Raises DataError naming pictures with half a pair.
    """
    by_picture: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_picture[picture_of(row.key)][row.key[2]].append(row)
    out: dict[str, dict[str, list[tuple[Row, Row]]]] = {}
    halves, repeated = [], []
    for group, questions in by_picture.items():
        counts = [len(given) for given in questions.values()]
        if len(counts) != 2 or counts[0] != counts[1]:
            halves.append(f"{group} ({' and '.join(map(str, counts))})")
            continue
        if once and counts[0] > 1:
            repeated.append(group)
        out.setdefault(group.split("/")[0], {})[group] = list(zip(*questions.values(), strict=True))
    if halves:
        raise DataError(
            f"{name}: {len(halves)} pictures whose two questions are not answered equally often: {format_ids(halves)}"
        )
    if repeated:
        raise DataError(f"{name}: {len(repeated)} pictures are answered more than once: {format_ids(repeated)}")
    return out
