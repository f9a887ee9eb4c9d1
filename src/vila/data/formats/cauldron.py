"""Format `cauldron`: conversations of The Cauldron and FineVision, `images` and `texts` of {`user`, `assistant`}."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from vila.core.progress import SILENT, Events
from vila.core.types import Message, Sample
from vila.data.formats.base import (
    IMAGE_MARKER,
    JSON,
    NoOptions,
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


class CauldronFormat:
    """The Cauldron, FineVision: `images` and `texts` of {`user`, `assistant`}; parquet or JSON."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: object) -> RecordSource:
        """Open a file or all files of a directory. All images go before the first question."""
        read_options(NoOptions, options, "cauldron")
        return RecordSource(
            path,
            partial(sample_of, root=image_root),
            kinds=(".parquet", *JSON),
            columns=("id", "images", "texts"),
            events=events,
            media=("images",),
        )


def sample_of(record: Record, root: Path) -> Sample:
    """Return the conversation of a record. Raises DataError with file, record, field and value."""
    turns = list_at(record, "texts", "objects with 'user' and 'assistant'")
    if not turns:
        raise record.error("the list is empty", field="texts")
    images = images_at(record, "images", root)
    messages = []
    for number in range(len(turns)):
        question = text_at(record, ("user",), ("texts", number))
        answer = answer_at(record, ("assistant",), ("texts", number))
        # Some subsets of The Cauldron have the marker in their questions.
        parts = media_first(() if number else images, remove_markers(question, IMAGE_MARKER))
        messages += [Message("user", parts), Message.of("assistant", answer)]
    return Sample(id_of(record), tuple(messages))


FORMAT = CauldronFormat()
