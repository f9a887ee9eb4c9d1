"""easy-VQA: extraction from its wheel, reading, and parsing of its questions. Needs no torch."""

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
"""All values of `question_kind`, in the order of reports."""

WHEEL = Wheel(
    name="easy-vqa",
    version="1.0",
    filename="easy_vqa-1.0-py3-none-any.whl",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    licence="MIT",
)
ABOUT = """easy-VQA: 64x64 images of one coloured shape, and questions about them (Victor Zhou).

`train/` and `test/` contain `images/<image_id>.png` and `questions.json`, a list of [question, answer, image_id].
`answers.txt` lists the 13 answers. The files are unchanged from the package."""

_MEMBER = re.compile(r"easy_vqa/data/((?:train|test)/(?:images/\d+\.png|questions\.json)|answers\.txt)")


@dataclass(frozen=True, slots=True)
class Question:
    """A question about the image `<split>/images/<image_id>.png`, and its answer."""

    text: str
    answer: str
    image_id: int


def obtain_easy_vqa(cache: Path, events: Events = SILENT) -> Path:
    """Return `<cache>/parts/easy-vqa`, extracted from the wheel on first use; errors as `obtain_component`."""
    return obtain_component(ComponentSpec("easy-vqa", WHEEL, ABOUT, unpack_easy_vqa), cache, events)


def unpack_easy_vqa(wheel: Path, folder: Path) -> None:
    """Extract the images, questions and answers of the easy-vqa wheel to `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if match := _MEMBER.fullmatch(member):
                target = folder / match[1]
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("wb") as stream:
                    shutil.copyfileobj(source, stream)


def read_questions(folder: Path, split: Split) -> list[Question]:
    """Read the questions of one split, in the order of the file.

    Raises DataError naming the file and the record (from 0) if it is malformed or its image is missing.
    """
    path = folder / split / "questions.json"
    if not path.is_file():
        raise DataError("no such file", file=path, hint="give the directory of easy-VQA")
    records = read_json(path)
    if not isinstance(records, list):
        raise DataError(file=path, value=type(records).__name__, expected="a list of [question, answer, image_id]")
    images = {file.name for file in (path.parent / "images").glob("*.png")}
    questions = []
    for number, record in enumerate(records):
        if not _is_question(record):
            raise DataError(file=path, record=number, value=record, expected="[question, answer, image_id]")
        if f"{record[2]}.png" not in images:
            raise DataError("image is missing", file=path, record=number, value=f"images/{record[2]}.png")
        questions.append(Question(*record))
    return questions


def _is_question(row: Any) -> bool:
    if not isinstance(row, list) or len(row) != 3:
        return False
    text, answer, image_id = row
    words = all(isinstance(word, str) and word.strip() for word in (text, answer))
    return words and type(image_id) is int and image_id >= 0


def group_by_image(questions: Iterable[Question]) -> dict[int, list[Question]]:
    """Group questions by image; both keep their order of first appearance."""
    groups: dict[int, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.image_id, []).append(question)
    return groups


@dataclass(frozen=True, slots=True)
class _Form:
    """Parsed question: the attribute asked for, and the shape and colour that it mentions."""

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
    raise DataError("not a question of easy-VQA", value=text, expected="what shape, what color, or yes/no about one")


def question_kind(text: str) -> str:
    """Return the kind of a question, one of `KINDS`. Raises DataError if it has none of them."""
    form = _parse_question(text)
    if form.asks != "presence":
        return f"what {form.asks}"
    return f"yes/no {'shape' if form.shape else 'color'}{', negated' if form.negated else ''}"


def answer_to(text: str, shape: str, colour: str) -> str | None:
    """Return the answer for an image of a `shape` in a `colour`; None if the question presumes another one.

    "what color is the circle?" has no answer for a triangle.
    """
    form = _parse_question(text)
    if form.asks == "presence":
        present = (form.shape or shape, form.colour or colour) == (shape, colour)
        return "yes" if present != form.negated else "no"
    if form.shape not in (None, shape) or form.colour not in (None, colour):
        return None
    return shape if form.asks == "shape" else colour


def mentions_present(text: str, shape: str, colour: str) -> bool:
    """Return whether a yes/no question mentions a shape or colour that the image has."""
    form = _parse_question(text)
    return (form.shape or shape, form.colour or colour) == (shape, colour)


def image_labels(questions: Iterable[Question]) -> tuple[str | None, str | None]:
    """Infer shape and colour of an image from its questions and answers; None if they do not determine it.

    A `what` question determines a label by its answer and its words, a yes/no question by presence ("is there not a
    circle?" - "no" means a circle). If all values but one are excluded, the remaining one is the label.
    Raises DataError naming the image if questions contradict each other.
    """
    shapes, colours = set(SHAPES), set(COLOURS)
    for question in questions:
        form = _parse_question(question.text)
        if form.asks == "presence":
            if question.answer not in ("yes", "no"):
                raise _invalid(question, "answer is not yes or no")
            mentioned = {word for word in (form.shape, form.colour) if word}
            present = (question.answer == "yes") != form.negated
        else:
            present = True
            known = SHAPES if form.asks == "shape" else COLOURS
            if question.answer not in known:
                raise _invalid(question, f"answer is not one of {', '.join(known)}")
            mentioned = {word for word in (question.answer, form.shape, form.colour) if word}
        shapes &= _possible(SHAPES, mentioned, present)
        colours &= _possible(COLOURS, mentioned, present)
        if not shapes or not colours:
            raise _invalid(question, "contradicts the other questions of the image")
    return _only(shapes), _only(colours)


def _invalid(question: Question, problem: str) -> DataError:
    return DataError(problem, record=f"image {question.image_id}", value=f"{question.text} - {question.answer}")


def _possible(values: tuple[str, ...], mentioned: set[str], present: bool) -> set[str]:
    """Return the values that remain possible if the mentioned ones are present, or absent."""
    known = mentioned & set(values)
    if not known:
        return set(values)
    return known if present else set(values) - known


def _only(values: set[str]) -> str | None:
    return next(iter(values)) if len(values) == 1 else None
