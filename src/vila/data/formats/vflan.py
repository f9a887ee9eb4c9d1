"""Visual instructions as VFLAN and M3IT hold them: `question`, `answer` and `image`, none, one or several pictures.

Markers in a question are removed and each picture with a newline put in front. A question that holds "Image
Descriptions" (M3IT's visual dialog) is split at its "Question:" and "Answer:" lines into turns. Pictures are base64,
names of files or of members, or bytes. Read from tar, parquet, JSON lines or a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.events import SILENT, Events
from vila.core.types import Image, Message, Sample
from vila.data.formats.media import images_at
from vila.data.formats.rows import Row
from vila.data.formats.source import RecordSource, read_options
from vila.data.formats.turns import MARKER, check_turns, id_of, media_first, text_at, without_markers

_IMAGES = ("image", "image:", "images", "image_base64_str")
_ANSWERS = ("answer", "answer:", "outputs")


@dataclass(frozen=True, slots=True)
class VflanOptions:
    """max_images: a record with more is an error, as in the original."""

    max_images: int = 8


class VflanFormat:
    """Questions and answers about none, one or several pictures."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: object) -> RecordSource:
        """Random access to the samples of a file, or of all shards of a directory. Options: see `VflanOptions`."""
        chosen = read_options(VflanOptions, options, "vflan")
        convert = partial(sample_of, root=image_root, max_images=chosen.max_images)
        columns = ("id", "question", "instruction", "inputs", *_ANSWERS, *_IMAGES)
        return RecordSource(path, convert, columns=columns, events=events)


def sample_of(row: Row, root: Path, max_images: int = 8) -> Sample:
    """The conversation of a record. Raises DataError naming file, row or key, and reason."""
    record, where = row.value, row.where
    question = _question(record, where).rstrip()
    answer = text_at(record, _ANSWERS, where).rstrip()
    key = next((key for key in _IMAGES if record.get(key) is not None), "")
    images = images_at(row, key, root, base64=True)
    if len(images) > max_images:
        raise DataError(f"{where}: {len(images)} pictures, over the limit of {max_images}; raise the option max_images")
    if "Image Descriptions" in question:
        messages = _dialog(question, answer, images, where)
    else:
        parts = media_first(images, without_markers(question, MARKER))
        messages = (Message("user", parts), Message.of("assistant", answer))
    return Sample(id_of(record, row.name), check_turns(messages, where))


def _question(record: Mapping[str, Any], where: str) -> str:
    if record.get("question") is None and record.get("instruction") is not None:
        # M3IT's own records; the original joins the two without a separator.
        inputs = "" if record.get("inputs") is None else text_at(record, ("inputs",), where)
        return text_at(record, ("instruction",), where) + inputs
    return text_at(record, ("question",), where)


def _dialog(question: str, answer: str, images: tuple[Image, ...], where: str) -> tuple[Message, ...]:
    """The turns that a question tells of, what stands before the first of them left out."""
    turns = [turn.split("\nAnswer: ") for turn in question.split("\nQuestion: ")[1:]]
    if not turns or any(len(turn) != 2 for turn in turns[:-1]) or len(turns[-1]) != 1:
        raise DataError(
            f"{where}: a dialog whose 'Question:' and 'Answer:' lines do not alternate up to a last question"
        )
    turns[-1] = [turns[-1][0].replace("\n", ""), answer]
    messages = []
    for number, (asked, answered) in enumerate(turns):
        parts = media_first(() if number else images, asked)
        messages += [Message("user", parts), Message.of("assistant", answered)]
    return tuple(messages)


FORMAT = VflanFormat()
