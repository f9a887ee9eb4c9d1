"""Training data of the starter in the `messages` format, made from easy-VQA's training split and packaged text."""

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
    image_labels,
    mentions_present,
    question_kind,
    read_questions,
)

TEXT_FILES = ("instructions.jsonl", "english_eval.txt", "english_calibration.txt")


def instruction_pairs() -> list[tuple[str, str, str]]:
    """Return (id, instruction, response) of all pairs, sorted by id; SmolLM2-135M-Instruct wrote the responses."""
    pairs = (json.loads(line) for line in _read("instructions.jsonl").decode("ascii").splitlines())
    return [(pair["id"], pair["instruction"], pair["response"]) for pair in pairs]


def english_eval() -> str:
    """Return English prose for measuring perplexity; not used for training or calibration."""
    return _read("english_eval.txt").decode("ascii")


def english_calibration() -> str:
    """Return English prose for calibrating quantization; it shares no sequence of 8 words with `english_eval`."""
    return _read("english_calibration.txt").decode("ascii")


def text_sha256(name: str) -> str:
    """Return the hexadecimal SHA-256 of a packaged text file, one of TEXT_FILES."""
    return hashlib.sha256(_read(name)).hexdigest()


def _read(name: str) -> bytes:
    if name not in TEXT_FILES:
        raise UnknownNameError("starter text", name, TEXT_FILES)
    return files("vila.starter").joinpath("text", name).read_bytes()


VALIDATION_EVERY = 10
"""Every tenth training image is held out for validation; the recipe was chosen by it, never by the test split."""

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
    """An image whose shape and colour are known from its questions."""

    image_id: int
    shape: str
    colour: str


def is_validation(image_id: int) -> bool:
    """Return whether a training image is held out."""
    return image_id % VALIDATION_EVERY == VALIDATION_EVERY - 1


def labelled_images(groups: dict[int, list[Question]]) -> list[ShapeImage]:
    """Return the images whose shape and colour both follow from their questions."""
    images = []
    for image_id, questions in sorted(groups.items()):
        shape, colour = image_labels(questions)
        if shape and colour:
            images.append(ShapeImage(image_id, shape, colour))
    return images


def caption(image: ShapeImage, form: int = 0) -> str:
    """Return a caption with shape and colour, in one of several wordings."""
    return _CAPTIONS[form % len(_CAPTIONS)].format(shape=image.shape, colour=image.colour)


def write_stage_data(easy_vqa: Path, folder: Path, seed: int) -> dict[str, int]:
    """Write `1_align.jsonl`, `2_pretrain.jsonl`, `3_sft.jsonl` and `text.jsonl`. Returns their record counts.

    Image paths are relative to the directory of the training images, which the recipes name as `image_root`.
    """
    groups = group_by_image(read_questions(easy_vqa, "train"))
    train = {image_id: questions for image_id, questions in groups.items() if not is_validation(image_id)}
    images, wordings = labelled_images(train), question_wordings(train)
    rng = random.Random(seed)
    datasets: dict[str, Sequence[Record]] = {
        "1_align": [caption_record(image) for image in images],
        "2_pretrain": page_records(images, rng),
        "3_sft": [question_record(image, wordings, rng) for image in images],
        "text": [text_record(*pair) for pair in instruction_pairs()],
    }
    for name, records in datasets.items():
        write_jsonl(folder / f"{name}.jsonl", records)
    counts = {name: len(records) for name, records in datasets.items()}
    write_json(folder / "counts.json", counts)
    return counts


def _image(image_id: int) -> Record:
    return {"type": "image", "path": f"{image_id}.png"}


def caption_record(image: ShapeImage) -> Record:
    """Return the stage 1 record of an image and its caption."""
    return {
        "id": f"caption-{image.image_id}",
        "messages": [
            {"role": "user", "content": [_image(image.image_id)]},
            {"role": "assistant", "content": caption(image)},
        ],
    }


def page_records(images: Sequence[ShapeImage], rng: random.Random) -> list[Record]:
    """Return the stage 2 records: pages of two to four images with their captions; each image is on one page."""
    queue = list(images)
    rng.shuffle(queue)
    records = []
    while queue:
        size = rng.randint(2, 4)
        page, queue = queue[:size], queue[size:]
        parts: list[Record] = []
        for number, image in enumerate(page, start=1):
            separator = " " if number < len(page) else ""
            text = caption(image, rng.randrange(len(_CAPTIONS)))
            parts += [_image(image.image_id), {"type": "text", "text": text + separator}]
        name = "-".join(str(image.image_id) for image in page)
        records.append({"id": f"page-{name}", "messages": [{"role": "user", "content": parts}]})
    return records


@dataclass(frozen=True, slots=True)
class QuestionWordings:
    """Distinct wordings of the training questions: open (`what`) and yes/no (`closed`) ones."""

    what: tuple[str, ...]
    closed: tuple[str, ...]


def question_wordings(groups: dict[int, list[Question]]) -> QuestionWordings:
    """Return all distinct wordings, sorted."""
    texts = sorted({question.text for questions in groups.values() for question in questions})
    what = tuple(text for text in texts if question_kind(text).startswith("what"))
    return QuestionWordings(what, tuple(text for text in texts if text not in what))


def question_record(image: ShapeImage, wordings: QuestionWordings, rng: random.Random) -> Record:
    """Return the stage 3 record: an image and questions about it as branches, balanced over kinds.

    Two `what` questions, three yes/no questions about a present attribute and three about an absent one. In the natural
    distribution, "no" to a plain question and "yes" to a negated one is right in seven of eight cases, so a model would
    learn to ignore the image. The wordings are those of the training questions; the answers follow from the labels.
    """
    labels = (image.shape, image.colour)
    what = [text for text in wordings.what if answer_to(text, *labels)]
    present = [text for text in wordings.closed if mentions_present(text, *labels)]
    absent = [text for text in wordings.closed if not mentions_present(text, *labels)]
    questions = [*rng.sample(what, 2), *rng.sample(present, 3), *rng.sample(absent, 3)]
    rng.shuffle(questions)
    branches = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": answer_to(text, *labels)}]
        for text in questions
    ]
    return {
        "id": f"questions-{image.image_id}",
        "messages": [{"role": "user", "content": [_image(image.image_id)]}],
        "branches": branches,
    }


def text_record(name: str, instruction: str, response: str) -> Record:
    """Return a text-only instruction and its response."""
    return {
        "id": name,
        "messages": [{"role": "user", "content": instruction}, {"role": "assistant", "content": response}],
    }
