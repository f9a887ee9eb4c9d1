"""Format `cauldron`: conversations of The Cauldron and FineVision, `images` and `texts` of {`user`, `assistant`}.

All images go before the first question.
"""

from __future__ import annotations

from pathlib import Path

from vila.core.types import Sample
from vila.data.formats.base import (
    IMAGE_MARKER,
    DatasetFormat,
    NoOptions,
    answer_at,
    id_of,
    list_at,
    question_answers,
    remove_markers,
    text_at,
)
from vila.data.readers.records import Record, images_at


def sample_of(record: Record, root: Path, options: NoOptions) -> Sample:
    """Return the conversation of a record. Raises DataError with file, record, field and value."""
    turns = list_at(record, "texts", "objects with 'user' and 'assistant'")
    if not turns:
        raise record.error("the list is empty", field="texts")
    images = images_at(record, "images", root)
    # Some subsets of The Cauldron have the marker in their questions.
    texts = (
        (remove_markers(text_at(record, ("user",), here), IMAGE_MARKER), answer_at(record, ("assistant",), here))
        for here in (("texts", number) for number in range(len(turns)))
    )
    return Sample(id_of(record), question_answers(texts, images))


FORMAT = DatasetFormat(
    "cauldron",
    "The Cauldron, FineVision: `images` and `texts` of {`user`, `assistant`}; parquet or JSON.",
    sample_of,
    columns=("id", "images", "texts"),
    media=("images",),
)
