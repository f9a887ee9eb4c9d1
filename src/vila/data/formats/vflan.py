"""Format `vflan`: visual instructions of VFLAN and M3IT, `question`, `answer` and any number of images in `image`.

Markers in a question are removed, and each image with a newline is put before it. A question with "Image Descriptions"
(visual dialog of M3IT) is split at its "Question:" and "Answer:" lines into turns. Images are base64, names of files or
members, or bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vila.core.progress import SILENT, Events
from vila.core.types import Image, Message, Sample
from vila.data.formats.base import (
    IMAGE_MARKER,
    RecordSource,
    answer_at,
    check_turns,
    id_of,
    media_first,
    optional_text,
    read_options,
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


class VflanFormat:
    """VFLAN, M3IT: `question`, `answer` and any number of images in `image`; tar, parquet or JSON."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: object) -> RecordSource:
        """Open a file or all files of a directory. Options: see `VflanOptions`."""
        chosen = read_options(VflanOptions, options, "vflan")
        convert = partial(sample_of, root=image_root, max_images=chosen.max_images)
        columns = ("id", "question", "instruction", "inputs", *_ANSWERS, *MEDIA_KEYS)
        return RecordSource(path, convert, columns=columns, events=events, media=MEDIA_KEYS)


def sample_of(record: Record, root: Path, max_images: int = 8) -> Sample:
    """Return the conversation of a record. Raises DataError with file, record or key, field and value."""
    question = _question(record).rstrip()
    answer = answer_at(record, _ANSWERS).rstrip()
    images = images_at(record, only_key(record, MEDIA_KEYS), root, base64=True)
    if len(images) > max_images:
        raise record.error("too many images", field="image", value=len(images), expected=f"max_images={max_images}")
    if "Image Descriptions" in question:
        messages = _dialog(record, question, answer, images)
    else:
        parts = media_first(images, remove_markers(question, IMAGE_MARKER))
        messages = (Message("user", parts), Message.of("assistant", answer))
    return Sample(id_of(record), check_turns(messages, record, "question"))


def _question(record: Record) -> str:
    if record.value.get("question") is None and record.value.get("instruction") is not None:
        # Original M3IT records; upstream joins the two without a separator.
        return text_at(record, ("instruction",)) + optional_text(record, "inputs")
    return text_at(record, ("question",))


def _dialog(record: Record, question: str, answer: str, images: tuple[Image, ...]) -> tuple[Message, ...]:
    """Split a question into its turns; text before the first turn is dropped."""
    turns = [turn.split("\nAnswer: ") for turn in question.split("\nQuestion: ")[1:]]
    if not turns or any(len(turn) != 2 for turn in turns[:-1]) or len(turns[-1]) != 1:
        raise record.error("'Question:' and 'Answer:' lines must alternate and end with a question", field="question")
    turns[-1] = [turns[-1][0].replace("\n", ""), answer]
    messages = []
    for number, (text, reply) in enumerate(turns):
        parts = media_first(() if number else images, text)
        messages += [Message("user", parts), Message.of("assistant", reply)]
    return tuple(messages)


FORMAT = VflanFormat()
