"""Conversations as The Cauldron and FineVision hold them: `images`, and `texts` of {`user`, `assistant`}.

All images stand before the first question, each with a newline behind it. Parquet, JSON lines or a list.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vila.core.progress import SILENT, Events
from vila.core.types import Message, Sample
from vila.data.formats.base import (
    IMAGE_MARKER,
    JSON,
    RecordSource,
    answer_at,
    id_of,
    list_at,
    media_first,
    read_options,
    remove_markers,
    text_at,
)
from vila.data.readers.records import Record, images_at


@dataclass(frozen=True, slots=True)
class CauldronOptions:
    """No options."""


class CauldronFormat:
    """Images and turns of questions and answers."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: object) -> RecordSource:
        """Give random access to the samples of a file, or of all files of a directory."""
        read_options(CauldronOptions, options, "cauldron")
        convert = partial(sample_of, root=image_root)
        return RecordSource(
            path,
            convert,
            kinds=(".parquet", *JSON),
            columns=("id", "images", "texts"),
            events=events,
            media=("images",),
        )


def sample_of(record: Record, root: Path) -> Sample:
    """Make the conversation of a record. Raises DataError with file, record, field and value."""
    turns = list_at(record, "texts", "objects with 'user' and 'assistant'")
    if not turns:
        raise record.error("the list is empty", field="texts")
    images = images_at(record, "images", root)
    messages = []
    for number in range(len(turns)):
        asked = text_at(record, ("user",), ("texts", number))
        answered = answer_at(record, ("assistant",), ("texts", number))
        # Some subsets of The Cauldron spell the marker in their questions.
        parts = media_first(() if number else images, remove_markers(asked, IMAGE_MARKER))
        messages += [Message("user", parts), Message.of("assistant", answered)]
    return Sample(id_of(record), tuple(messages))


FORMAT = CauldronFormat()
