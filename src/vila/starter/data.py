"""The starter's data sets in the `messages` format, made from easy-VQA's training questions and packaged text."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from vila.core.errors import UnknownNameError
from vila.core.files import write_json, write_jsonl
from vila.starter.easy_vqa import (
    Question,
    answer_to,
    group_by_image,
    image_truth,
    is_about_what_is_there,
    question_kind,
    read_questions,
)

# --- texts
# The text packaged with the starter: instruction pairs, and English prose for perplexity and for calibration.


TEXT_FILES = ("instructions.jsonl", "english_eval.txt", "english_calibration.txt")


def instruction_pairs() -> list[tuple[str, str, str]]:
    """(id, instruction, response) of every pair, sorted by id; the responses are SmolLM2-135M-Instruct's own."""
    rows = (json.loads(line) for line in _read("instructions.jsonl").decode("ascii").splitlines())
    return [(row["id"], row["instruction"], row["response"]) for row in rows]


def english_eval() -> str:
    """English prose on which perplexity is measured; never trained on and never used for calibration."""
    return _read("english_eval.txt").decode("ascii")


def english_calibration() -> str:
    """English prose for calibrating quantization; shares no run of 8 words with `english_eval`."""
    return _read("english_calibration.txt").decode("ascii")


def text_sha256(name: str) -> str:
    """The SHA-256, in hex, of the packaged file `name`, one of TEXT_FILES: names the exact text behind a figure."""
    return hashlib.sha256(_read(name)).hexdigest()


def _read(name: str) -> bytes:
    if name not in TEXT_FILES:
        raise UnknownNameError("starter text", name, TEXT_FILES)
    return files("vila.starter").joinpath("text", name).read_bytes()


VALIDATION_EVERY = 10
"""Every tenth training picture is held out for choosing the recipe; the test split is never used for that."""

_CAPTIONS = (
    "a {colour} {shape}",
    "The image contains a {colour} {shape}.",
    "There is a {shape} in the image. Its color is {colour}.",
    "The shape is a {shape} and its color is {colour}.",
    "The color of the shape is {colour}. It is a {shape}.",
)

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ShapeImage:
    """A picture whose shape and colour follow from its questions."""

    image_id: int
    shape: str
    colour: str


def is_validation(image_id: int) -> bool:
    """Whether a training picture is held out."""
    return image_id % VALIDATION_EVERY == VALIDATION_EVERY - 1


def labelled_images(groups: dict[int, list[Question]]) -> list[ShapeImage]:
    """The pictures whose questions tell both shape and colour."""
    truths = []
    for image_id, questions in sorted(groups.items()):
        shape, colour = image_truth(questions)
        if shape and colour:
            truths.append(ShapeImage(image_id, shape, colour))
    return truths


def caption(truth: ShapeImage, form: int = 0) -> str:
    """A sentence or two that say shape and colour, in one of several forms."""
    return _CAPTIONS[form % len(_CAPTIONS)].format(shape=truth.shape, colour=truth.colour)


def write_stage_data(easy_vqa: Path, folder: Path, seed: int) -> dict[str, int]:
    """Write `1_align.jsonl`, `2_pretrain.jsonl`, `3_sft.jsonl` and `text.jsonl` into `folder`; their numbers of rows.

    Pictures are named relative to the training pictures' directory, which recipes give as `image_root`.
    """
    groups = group_by_image(read_questions(easy_vqa, "train"))
    train = {image_id: rows for image_id, rows in groups.items() if not is_validation(image_id)}
    truths, forms = labelled_images(train), question_forms(train)
    rng = random.Random(seed)
    tables: dict[str, Sequence[Record]] = {
        "1_align": [caption_row(truth) for truth in truths],
        "2_pretrain": page_rows(truths, rng),
        "3_sft": [question_row(truth, forms, rng) for truth in truths],
        "text": [text_row(*pair) for pair in instruction_pairs()],
    }
    for name, rows in tables.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    counts = {name: len(rows) for name, rows in tables.items()}
    write_json(folder / "counts.json", counts)
    return counts


def _image(image_id: int) -> Record:
    return {"type": "image", "path": f"{image_id}.png"}


def caption_row(truth: ShapeImage) -> Record:
    """Stage 1: a picture and its caption."""
    text = caption(truth)
    return {
        "id": f"caption-{truth.image_id}",
        "messages": [
            {"role": "user", "content": [_image(truth.image_id)]},
            {"role": "assistant", "content": text},
        ],
    }


def page_rows(truths: Sequence[ShapeImage], rng: random.Random) -> list[Record]:
    """Stage 2: pages of two to four pictures, each followed by its caption; every picture stands on one page."""
    queue = list(truths)
    rng.shuffle(queue)
    rows = []
    while queue:
        size = rng.randint(2, 4)
        some, queue = queue[:size], queue[size:]
        parts: list[Record] = []
        for place, truth in enumerate(some):
            tail = " " if place < len(some) - 1 else ""
            text = caption(truth, rng.randrange(len(_CAPTIONS)))
            parts += [_image(truth.image_id), {"type": "text", "text": text + tail}]
        name = "-".join(str(truth.image_id) for truth in some)
        rows.append({"id": f"page-{name}", "messages": [{"role": "user", "content": parts}]})
    return rows


@dataclass(frozen=True, slots=True)
class QuestionWordings:
    """The wordings of the training questions, by what they ask."""

    what: tuple[str, ...]
    closed: tuple[str, ...]


def question_forms(groups: dict[int, list[Question]]) -> QuestionWordings:
    """Every distinct wording, sorted."""
    texts = sorted({question.text for questions in groups.values() for question in questions})
    what = tuple(text for text in texts if question_kind(text).startswith("what"))
    return QuestionWordings(what, tuple(text for text in texts if text not in what))


def question_row(truth: ShapeImage, forms: QuestionWordings, rng: random.Random) -> Record:
    """Stage 3: a picture and questions about it as branches that share it, balanced over kinds.

    Two `what` questions, three yes/no questions about what is there and three about what is not. In the natural mix
    "no" to a plain question and "yes" to a negated one is right seven times out of eight, and a model learns that
    instead of looking. The wordings are those of the training questions, their answers follow from the truth.
    """
    told = (truth.shape, truth.colour)
    what = [text for text in forms.what if answer_to(text, *told)]
    present = [text for text in forms.closed if is_about_what_is_there(text, *told)]
    absent = [text for text in forms.closed if not is_about_what_is_there(text, *told)]
    chosen = [*rng.sample(what, 2), *rng.sample(present, 3), *rng.sample(absent, 3)]
    rng.shuffle(chosen)
    branches = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": answer_to(text, *told)}] for text in chosen
    ]
    return {
        "id": f"questions-{truth.image_id}",
        "messages": [{"role": "user", "content": [_image(truth.image_id)]}],
        "branches": branches,
    }


def text_row(name: str, instruction: str, response: str) -> Record:
    """A text-only instruction and its answer."""
    return {
        "id": name,
        "messages": [{"role": "user", "content": instruction}, {"role": "assistant", "content": response}],
    }
