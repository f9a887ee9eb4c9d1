"""easy-VQA as an ordinary folder, and what its questions say. Its readers need neither torch nor network."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vila.core.errors import DataError
from vila.core.progress import SILENT, Events
from vila.core.reading import read_json
from vila.starter.components import ComponentSpec, Wheel, obtain_component

Split = Literal["train", "test"]
SHAPES: tuple[str, ...] = ("circle", "rectangle", "triangle")
COLOURS: tuple[str, ...] = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
KINDS: tuple[str, ...] = (
    "what shape",
    "what color",
    "yes/no shape",
    "yes/no color",
    "yes/no shape, negated",
    "yes/no color, negated",
)
"""Every value of `question_kind`, in the order in which reports list them."""

WHEEL = Wheel(
    name="easy-vqa",
    version="1.0",
    filename="easy_vqa-1.0-py3-none-any.whl",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    licence="MIT",
)
ABOUT = """easy-VQA: 64x64 pictures of one coloured shape, and questions about them (Victor Zhou).

`train/` and `test/` hold `images/<image_id>.png` and `questions.json`, a list of [question, answer, image_id].
`answers.txt` lists the 13 answers. Nothing is changed from the package."""

_MEMBER = re.compile(r"easy_vqa/data/((?:train|test)/(?:images/\d+\.png|questions\.json)|answers\.txt)")


@dataclass(frozen=True, slots=True)
class Question:
    """One question, its answer, and the picture it is about (`<split>/images/<image_id>.png`)."""

    text: str
    answer: str
    image_id: int


def obtain_easy_vqa(cache: Path, events: Events = SILENT) -> Path:
    """`<cache>/parts/easy-vqa`, an ordinary folder (`ABOUT`) made once; errors as `components.obtain_component`."""
    return obtain_component(ComponentSpec("easy-vqa", WHEEL, ABOUT, unpack_easy_vqa), cache, events)


def unpack_easy_vqa(wheel: Path, folder: Path) -> None:
    """Copy pictures, questions and answers of the easy-vqa wheel into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if match := _MEMBER.fullmatch(member):
                target = folder / match[1]
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("wb") as stream:
                    shutil.copyfileobj(source, stream)


def read_questions(folder: Path, split: Split) -> list[Question]:
    """The questions of one split, in the order of the file.

    Raises DataError naming file and row (from 0) where that is not [question, answer, image_id], or has no picture.
    """
    path = folder / split / "questions.json"
    if not path.is_file():
        raise DataError(f"{path}: missing; {folder} is not an easy-VQA folder")
    rows = read_json(path)
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of [question, answer, image_id], got {type(rows).__name__}")
    pictures = {file.name for file in (path.parent / "images").glob("*.png")}
    questions = []
    for number, row in enumerate(rows):
        if not _is_question(row):
            raise DataError(f"{path} row {number}: expected [question, answer, image_id], got {str(row)[:80]!r}")
        if f"{row[2]}.png" not in pictures:
            raise DataError(f"{path} row {number}: images/{row[2]}.png is missing")
        questions.append(Question(*row))
    return questions


def _is_question(row: Any) -> bool:
    if not isinstance(row, list) or len(row) != 3:
        return False
    text, answer, image_id = row
    words = all(isinstance(word, str) and word.strip() for word in (text, answer))
    return words and type(image_id) is int and image_id >= 0


def group_by_image(questions: Iterable[Question]) -> dict[int, list[Question]]:
    """Questions by picture, both in order of first appearance."""
    groups: dict[int, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.image_id, []).append(question)
    return groups


@dataclass(frozen=True, slots=True)
class _Form:
    """What a question asks for, and the shape and colour that it mentions."""

    asks: Literal["shape", "color", "presence"]
    shape: str | None
    colour: str | None
    negated: bool


def _parse_question(text: str) -> _Form:
    words = text.strip().lower().removesuffix("?").split()
    shapes = [word for word in words if word in SHAPES]
    colours = [word for word in words if word in COLOURS]
    shape, colour = next(iter(shapes), None), next(iter(colours), None)
    if len(shapes) + len(colours) <= 1 and words:
        if words[0] == "what" and "color" in words and not colours:
            return _Form("color", shape, None, negated=False)
        if words[0] == "what" and "shape" in words and not shapes:
            return _Form("shape", None, colour, negated=False)
        if words[0] in ("is", "does") and (shape or colour):
            return _Form("presence", shape, colour, negated="not" in words or "no" in words)
    raise DataError(f"{text!r}: not a question of easy-VQA (what shape, what color, or the presence of one of them)")


def question_kind(text: str) -> str:
    """One of `KINDS`: what a question asks about, and whether it is negated. DataError when it is of no such kind."""
    form = _parse_question(text)
    if form.asks != "presence":
        return f"what {form.asks}"
    return f"yes/no {'shape' if form.shape else 'color'}{', negated' if form.negated else ''}"


def answer_to(text: str, shape: str, colour: str) -> str | None:
    """The answer to a question about a picture of one `shape` in one `colour`; None where it presumes another one.

    "what color is the circle?" has no answer about a triangle.
    """
    form = _parse_question(text)
    if form.asks == "presence":
        present = (form.shape or shape, form.colour or colour) == (shape, colour)
        return "yes" if present != form.negated else "no"
    if form.shape not in (None, shape) or form.colour not in (None, colour):
        return None
    return shape if form.asks == "shape" else colour


def is_about_what_is_there(text: str, shape: str, colour: str) -> bool:
    """Whether a yes/no question mentions a shape or colour that the picture has."""
    form = _parse_question(text)
    return (form.shape or shape, form.colour or colour) == (shape, colour)


def image_truth(questions: Iterable[Question]) -> tuple[str | None, str | None]:
    """Shape and colour of the one object, as far as the questions about its picture tell; None where they do not.

    A `what` question tells by its answer and by what it mentions, a yes/no question by presence ("is there not a
    circle?" - "no" means a circle). Where all values but one are told to be absent, the last one is the truth.
    Raises DataError naming the picture when two questions contradict each other.
    """
    shapes, colours = set(SHAPES), set(COLOURS)
    for question in questions:
        form = _parse_question(question.text)
        if form.asks == "presence":
            if question.answer not in ("yes", "no"):
                raise DataError(f"{_quote(question)} is not answered by yes or no")
            mentioned = {word for word in (form.shape, form.colour) if word}
            present = (question.answer == "yes") != form.negated
            told_shapes = _told(SHAPES, mentioned, present)
            told_colours = _told(COLOURS, mentioned, present)
        else:
            known = SHAPES if form.asks == "shape" else COLOURS
            if question.answer not in known:
                raise DataError(f"{_quote(question)} is not answered by one of {', '.join(known)}")
            mentioned = {word for word in (question.answer, form.shape, form.colour) if word}
            told_shapes = _told(SHAPES, mentioned, present=True)
            told_colours = _told(COLOURS, mentioned, present=True)
        shapes &= told_shapes
        colours &= told_colours
        if not shapes or not colours:
            raise DataError(f"{_quote(question)} contradicts its other questions")
    return _only(shapes), _only(colours)


def _quote(question: Question) -> str:
    return f"image {question.image_id}: {question.text!r} - {question.answer!r}"


def _told(values: tuple[str, ...], mentioned: set[str], present: bool) -> set[str]:
    """The values that stay possible when the mentioned ones among them are present, or absent."""
    here = mentioned & set(values)
    if not here:
        return set(values)
    return here if present else set(values) - here


def _only(values: set[str]) -> str | None:
    return next(iter(values)) if len(values) == 1 else None
