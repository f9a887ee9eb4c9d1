"""The starter's three data sets, made from easy-VQA's training questions and packaged text, in the `messages` format."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila.core.files import write_json, write_jsonl
from vila.starter.easy_vqa import (
    Question,
    group_by_image,
    image_truth,
    question_kind,
    read_questions,
)
from vila.starter.texts import instruction_pairs

VALIDATION_EVERY = 10
"""Every tenth training picture is held out for choosing the recipe; the test split is never used for that."""

_CAPTIONS = (
    "A {colour} {shape}.",
    "The image contains a {colour} {shape}.",
    "There is a {shape} in the image. Its color is {colour}.",
    "The shape is a {shape} and its color is {colour}.",
    "The color of the shape is {colour}. It is a {shape}.",
)

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Truth:
    """A picture whose shape and colour follow from its questions."""

    image_id: int
    shape: str
    colour: str


def is_validation(image_id: int) -> bool:
    """Whether a training picture is held out."""
    return image_id % VALIDATION_EVERY == VALIDATION_EVERY - 1


def known_truths(groups: dict[int, list[Question]]) -> list[Truth]:
    """The pictures whose questions tell both shape and colour."""
    truths = []
    for image_id, questions in sorted(groups.items()):
        shape, colour = image_truth(questions)
        if shape and colour:
            truths.append(Truth(image_id, shape, colour))
    return truths


def caption(truth: Truth, form: int = 0) -> str:
    """A sentence or two that say shape and colour, in one of several forms."""
    return _CAPTIONS[form % len(_CAPTIONS)].format(shape=truth.shape, colour=truth.colour)


def write_stage_data(easy_vqa: Path, folder: Path, seed: int) -> dict[str, int]:
    """Write `1_align.jsonl`, `2_pretrain.jsonl`, `3_sft.jsonl` and `text.jsonl` into `folder`; their numbers of rows.

    Pictures are named relative to the training pictures' directory, which recipes give as `image_root`.
    """
    groups = group_by_image(read_questions(easy_vqa, "train"))
    train = {image_id: rows for image_id, rows in groups.items() if not is_validation(image_id)}
    truths = known_truths(train)
    rng = random.Random(seed)
    tables: dict[str, Sequence[Row]] = {
        "1_align": [caption_row(truth, rng) for truth in truths],
        "2_pretrain": page_rows(truths, rng),
        "3_sft": [row for image_id, rows in sorted(train.items()) if (row := question_row(image_id, rows, rng))],
        "text": [text_row(*pair) for pair in instruction_pairs()],
    }
    for name, rows in tables.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    counts = {name: len(rows) for name, rows in tables.items()}
    write_json(folder / "counts.json", counts)
    return counts


def _image(image_id: int) -> Row:
    return {"type": "image", "path": f"{image_id}.png"}


def caption_row(truth: Truth, rng: random.Random) -> Row:
    """Stage 1: a picture and its caption."""
    text = caption(truth, rng.randrange(len(_CAPTIONS)))
    return {
        "id": f"caption-{truth.image_id}",
        "messages": [
            {"role": "user", "content": [_image(truth.image_id)]},
            {"role": "assistant", "content": text},
        ],
    }


def page_rows(truths: Sequence[Truth], rng: random.Random) -> list[Row]:
    """Stage 2: pages of two to four pictures, each followed by its caption; every picture stands on one page."""
    queue = list(truths)
    rng.shuffle(queue)
    rows = []
    while queue:
        size = rng.randint(2, 4)
        some, queue = queue[:size], queue[size:]
        parts: list[Row] = []
        for place, truth in enumerate(some):
            tail = " " if place < len(some) - 1 else ""
            text = caption(truth, rng.randrange(len(_CAPTIONS)))
            parts += [_image(truth.image_id), {"type": "text", "text": text + tail}]
        name = "-".join(str(truth.image_id) for truth in some)
        rows.append({"id": f"page-{name}", "messages": [{"role": "user", "content": parts}]})
    return rows


def question_row(image_id: int, questions: Sequence[Question], rng: random.Random) -> Row | None:
    """Stage 3: a picture and a choice of its questions as branches that share it, balanced over kinds.

    At most two `what` questions, and as many yes/no questions about what is there as about what is not: answered by
    the natural mix, "no" to a plain question and "yes" to a negated one is nearly always right, and the model would
    learn that instead of looking.
    """
    what = [q for q in questions if question_kind(q.text).startswith("what")]
    closed = [q for q in questions if not question_kind(q.text).startswith("what")]
    present = [q for q in closed if _about_what_is_there(q)]
    absent = [q for q in closed if not _about_what_is_there(q)]
    for some in (what, present, absent):
        rng.shuffle(some)
    chosen = what[:2] + present[:3] + absent[: max(1, min(3, len(present)))]
    if not chosen:
        return None
    rng.shuffle(chosen)
    branches = [
        [{"role": "user", "content": q.text}, {"role": "assistant", "content": q.answer}] for q in chosen
    ]
    return {
        "id": f"questions-{image_id}",
        "messages": [{"role": "user", "content": [_image(image_id)]}],
        "branches": branches,
    }


def _about_what_is_there(question: Question) -> bool:
    negated = question_kind(question.text).endswith("negated")
    return (question.answer == "yes") != negated


def text_row(name: str, instruction: str, response: str) -> Row:
    """A text-only instruction and its answer."""
    return {
        "id": name,
        "messages": [{"role": "user", "content": instruction}, {"role": "assistant", "content": response}],
    }
