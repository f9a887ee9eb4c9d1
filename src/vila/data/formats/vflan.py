"""Format `vflan`: visual instructions of VFLAN and M3IT, `question`, `answer` and any number of images in `image`.

Markers in a question are removed, and each image with a newline is put before it. A question with "Image Descriptions"
(visual dialog of M3IT) is split at its "Question:" and "Answer:" lines into turns. Images are base64, names of files or
members, or bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vila.core.types import Sample
from vila.data.formats.base import (
    IMAGE_MARKER,
    DatasetFormat,
    answer_at,
    check_turns,
    id_of,
    optional_text,
    question_answers,
    remove_markers,
    text_at,
)
from vila.data.readers.records import Record, images_at, only_key

MEDIA_KEYS = ("image", "image:", "images", "image_base64_str")
_ANSWERS = ("answer", "answer:", "outputs")


@dataclass(frozen=True, slots=True)
class VflanOptions:
    """max_images: a record with more images is an error, as upstream."""

    max_images: int = 8


def sample_of(record: Record, root: Path, options: VflanOptions) -> Sample:
    """Return the conversation of a record. Raises DataError with file, record or key, field and value."""
    question = _question(record).rstrip()
    answer = answer_at(record, _ANSWERS).rstrip()
    images = images_at(record, only_key(record, MEDIA_KEYS), root, base64=True)
    if len(images) > options.max_images:
        expected = f"max_images={options.max_images}"
        raise record.error("too many images", field="image", value=len(images), expected=expected)
    if "Image Descriptions" in question:
        turns = _dialog(record, question, answer)
    else:
        turns = [(remove_markers(question, IMAGE_MARKER), answer)]
    return Sample(id_of(record), check_turns(question_answers(turns, images), record, "question"))


def _question(record: Record) -> str:
    if record.value.get("question") is None and record.value.get("instruction") is not None:
        # Original M3IT records; upstream joins the two without a separator.
        return text_at(record, ("instruction",)) + optional_text(record, "inputs")
    return text_at(record, ("question",))


def _dialog(record: Record, question: str, answer: str) -> list[tuple[str, str]]:
    """Split a question into its (question, answer) turns; text before the first turn is dropped."""
    turns = [turn.split("\nAnswer: ") for turn in question.split("\nQuestion: ")[1:]]
    if not turns or any(len(turn) != 2 for turn in turns[:-1]) or len(turns[-1]) != 1:
        raise record.error("'Question:' and 'Answer:' lines must alternate and end with a question", field="question")
    turns[-1] = [turns[-1][0].replace("\n", ""), answer]
    return [(text, reply) for text, reply in turns]


FORMAT = DatasetFormat(
    "vflan",
    "VFLAN, M3IT: `question`, `answer` and any number of images in `image`; tar, parquet or JSON.",
    sample_of,
    VflanOptions,
    columns=("id", "question", "instruction", "inputs", *_ANSWERS, *MEDIA_KEYS),
    media=MEDIA_KEYS,
)
