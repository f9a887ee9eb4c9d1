"""Visual instructions as VFLAN and M3IT hold them: `question`, `answer` and `image`, none, one or several pictures.

Markers in a question are removed and each image with a newline put in front. A question that holds "Image
Descriptions" (M3IT's visual dialog) is split at its "Question:" and "Answer:" lines into turns. Images are base64,
names of files or of members, or bytes. Read from tar, parquet, JSON lines or a list.
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
    """max_images: a record with more is an error, as in the original."""

    max_images: int = 8


class VflanFormat:
    """Questions and answers about none, one or several images."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: object) -> RecordSource:
        """Give random access to the samples of a file, or of all shards of a directory. Options: see `VflanOptions`."""
        chosen = read_options(VflanOptions, options, "vflan")
        convert = partial(sample_of, root=image_root, max_images=chosen.max_images)
        columns = ("id", "question", "instruction", "inputs", *_ANSWERS, *MEDIA_KEYS)
        return RecordSource(path, convert, columns=columns, events=events, media=MEDIA_KEYS)


def sample_of(record: Record, root: Path, max_images: int = 8) -> Sample:
    """Make the conversation of a record. Raises DataError with file, record or key, field and value."""
    question = _question(record).rstrip()
    answer = answer_at(record, _ANSWERS).rstrip()
    images = images_at(record, only_key(record, MEDIA_KEYS), root, base64=True)
    if len(images) > max_images:
        raise record.error(f"{len(images)} images, the option max_images allows {max_images}", field="image")
    if "Image Descriptions" in question:
        messages = _dialog(record, question, answer, images)
    else:
        parts = media_first(images, remove_markers(question, IMAGE_MARKER))
        messages = (Message("user", parts), Message.of("assistant", answer))
    return Sample(id_of(record), check_turns(messages, record, "question"))


def _question(record: Record) -> str:
    if record.value.get("question") is None and record.value.get("instruction") is not None:
        # M3IT's own records; the original joins the two without a separator.
        return text_at(record, ("instruction",)) + optional_text(record, "inputs")
    return text_at(record, ("question",))


def _dialog(record: Record, question: str, answer: str, images: tuple[Image, ...]) -> tuple[Message, ...]:
    """Split a question into the turns that it holds; what stands before the first of them is left out."""
    turns = [turn.split("\nAnswer: ") for turn in question.split("\nQuestion: ")[1:]]
    if not turns or any(len(turn) != 2 for turn in turns[:-1]) or len(turns[-1]) != 1:
        raise record.error(
            "the 'Question:' and 'Answer:' lines of the dialog do not alternate up to a last question", field="question"
        )
    turns[-1] = [turns[-1][0].replace("\n", ""), answer]
    messages = []
    for number, (asked, answered) in enumerate(turns):
        parts = media_first(() if number else images, asked)
        messages += [Message("user", parts), Message.of("assistant", answered)]
    return tuple(messages)


FORMAT = VflanFormat()
