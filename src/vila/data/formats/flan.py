"""Text-only instructions as FLAN: `question` and `answer`, or `inputs` and `targets`. JSON lines, a list or parquet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vila.core.events import SILENT, Events
from vila.core.types import Message, Sample
from vila.data.formats.rows import Row
from vila.data.formats.source import JSON, RecordSource, read_options
from vila.data.formats.turns import check_turns, id_of, text_at

_QUESTIONS, _ANSWERS = ("question", "inputs"), ("answer", "targets")


@dataclass(frozen=True, slots=True)
class FlanOptions:
    """No options."""


class FlanFormat:
    """Questions and answers without pictures."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: object) -> RecordSource:
        """Random access to the samples of a file, or of all files of a directory; `image_root` is not used."""
        read_options(FlanOptions, options, "flan")
        columns = ("id", *_QUESTIONS, *_ANSWERS)
        return RecordSource(path, sample_of, kinds=(".parquet", *JSON), columns=columns, events=events)


def sample_of(row: Row) -> Sample:
    """One question and its answer, white space behind each removed. Raises DataError naming file, row and reason."""
    question = text_at(row.value, _QUESTIONS, row.where).rstrip()
    answer = text_at(row.value, _ANSWERS, row.where).rstrip()
    messages = (Message.of("user", question), Message.of("assistant", answer))
    return Sample(id_of(row.value, row.name), check_turns(messages, row.where))


FORMAT = FlanFormat()
