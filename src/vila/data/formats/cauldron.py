"""Conversations as The Cauldron and FineVision hold them: `images`, and `texts` of {`user`, `assistant`}.

All pictures stand before the first question, each with a newline behind it. Parquet, JSON lines or a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vila.core.errors import DataError
from vila.core.events import SILENT, Events
from vila.core.types import Message, Sample
from vila.data.formats.media import images_at
from vila.data.formats.rows import Row
from vila.data.formats.source import JSON, RecordSource, read_options
from vila.data.formats.turns import MARKER, check_turns, id_of, media_first, text_at, without_markers


@dataclass(frozen=True, slots=True)
class CauldronOptions:
    """No options."""


class CauldronFormat:
    """Pictures and turns of questions and answers."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: object) -> RecordSource:
        """Random access to the samples of a file, or of all files of a directory."""
        read_options(CauldronOptions, options, "cauldron")
        convert = partial(sample_of, root=image_root)
        return RecordSource(path, convert, kinds=(".parquet", *JSON), columns=("id", "images", "texts"), events=events)


def sample_of(row: Row, root: Path) -> Sample:
    """The conversation of a record. Raises DataError naming file, row, turn and reason."""
    turns = row.value.get("texts")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f"{row.where}: expected a list 'texts' of objects with 'user' and 'assistant'")
    images = images_at(row, "images", root)
    messages = []
    for number, turn in enumerate(turns):
        asked = text_at(turn, ("user",), f"{row.where} texts[{number}]")
        answered = text_at(turn, ("assistant",), f"{row.where} texts[{number}]")
        # Some subsets of The Cauldron spell the marker in their questions.
        parts = media_first(() if number else images, without_markers(asked, MARKER))
        messages += [Message("user", parts), Message.of("assistant", answered)]
    return Sample(id_of(row.value, row.name), check_turns(messages, row.where))


FORMAT = CauldronFormat()
