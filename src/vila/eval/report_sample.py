"""Answers to show in a report: a fixed sample of questions, with their words and pictures."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from PIL import Image as PilImage

from vila.core.errors import DataError, MediaError
from vila.core.reading import read_jsonl
from vila.core.types import Image, Video
from vila.eval.benchmark import BENCHMARKS, Item, Mark
from vila.eval.benchmarks.scienceqa import LETTER
from vila.eval.question_file import SHORT_ANSWER
from vila.media.image import open_image
from vila.media.video import open_frames
from vila.report.picture import MAX_SIDE

_LONGEST = 300
"""Characters of a question or an answer that are shown."""


@dataclass(frozen=True)
class Shown:
    """A question with its mark. picture: at most 320 pixels a side; None, and `no_picture` says why."""

    mark: Mark
    question: str
    picture: PilImage.Image | None = None
    no_picture: str = ""


def spread(marks: Iterable[Mark], seed: str, count: int) -> list[Mark]:
    """At most `count` marks, the kinds in turn, each picture once: the same ones whenever the same marks are given.

    Which ones does not depend on their order, and one more or one less mark exchanges few.
    """
    by_kind: dict[str, list[Mark]] = defaultdict(list)
    for mark in marks:
        by_kind[mark.kind].append(mark)
    for own in by_kind.values():
        own.sort(key=lambda mark: hashlib.sha256(f"{seed}/{mark.id}".encode()).digest())
    chosen: dict[str, Mark] = {}
    for mark in chain.from_iterable(zip_longest(*(by_kind[kind] for kind in sorted(by_kind)))):
        if mark is not None:
            chosen.setdefault(mark.group or f"\0{mark.id}", mark)
        if len(chosen) == count:
            break
    return list(chosen.values())


def show(marks: Sequence[Mark], predictions: Path, items: Callable[[], Sequence[Item]]) -> tuple[Shown, ...]:
    """The marks with the questions that `predictions` repeats, and pictures from the benchmark's items."""
    if not marks:
        return ()
    ids = {_item_id(mark) for mark in marks}
    questions = _questions(predictions, ids)
    try:
        media = {item.id: _media(item) for item in items() if item.id in ids}
        absent = "no picture"
    except DataError as error:
        media, absent = {}, str(error)
    shown = []
    for mark in marks:
        name = _item_id(mark)
        picture, why = _open(media[name]) if name in media else (None, absent)
        shown.append(Shown(mark, shorten(questions.get(name, "")), picture, why))
    return tuple(shown)


def questions_from(name: str, data: str) -> Sequence[Item]:
    """The questions of a benchmark whose data lie in `data`. Raises DataError when they cannot be opened."""
    if not data:
        raise DataError("pictures are not shown: the run does not say where its data are")
    base = name if name in BENCHMARKS else name.partition("shot")[0].rstrip("0123456789").removesuffix("_")
    if base not in BENCHMARKS:
        raise DataError(f"pictures are not shown: no benchmark is called {name}")
    return BENCHMARKS[base](Path(data), 0).items()


def shorten(text: str, longest: int = _LONGEST) -> str:
    """`text` without the picture's mark and what questions of its kind all end with, cut to `longest` characters."""
    text = text.strip().removeprefix("<image>").removesuffix(SHORT_ANSWER).removesuffix(LETTER).strip()
    return text if len(text) <= longest else f"{text[: longest - 1].rstrip()}\N{HORIZONTAL ELLIPSIS}"


def _item_id(mark: Mark) -> str:
    return mark.item or mark.id


def _questions(predictions: Path, ids: Collection[str]) -> dict[str, str]:
    rows = read_jsonl(predictions) if predictions.is_file() else ()
    known = (row for _, row in rows if isinstance(row, dict) and isinstance(row.get("id"), str))
    return {row["id"]: str(row.get("prompt", "")) for row in known if row["id"] in ids}


def _media(item: Item) -> Image | Video | None:
    """What the question itself shows first; worked examples before it do not count."""
    return next((part for part in item.messages[-1].parts if isinstance(part, Image | Video)), None)


def _open(part: Image | Video | None) -> tuple[PilImage.Image | None, str]:
    if part is None:
        return None, "no picture"
    if isinstance(part.source, str) and "://" in part.source:
        return None, f"not fetched: {part.source[:120]}"
    try:
        picture = open_image(part) if isinstance(part, Image) else open_frames(part, 1)[0]
    except (MediaError, DataError) as error:
        return None, str(error)
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return picture, ""
