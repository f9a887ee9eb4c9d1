"""Text-only instructions as FLAN: `question` and `answer`, or `inputs` and `targets`. JSON lines, a list or parquet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vila.core.progress import SILENT, Events
from vila.core.types import Message, Sample
from vila.data.formats.base import JSON, RecordSource, answer_at, id_of, read_options, text_at
from vila.data.readers.records import Record

_QUESTIONS, _ANSWERS = ("question", "inputs"), ("answer", "targets")


@dataclass(frozen=True, slots=True)
class FlanOptions:
    """No options."""


class FlanFormat:
    """Questions and answers without images."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: object) -> RecordSource:
        """Give random access to the samples of a file, or of all files of a directory; `image_root` is not used."""
        read_options(FlanOptions, options, "flan")
        columns = ("id", *_QUESTIONS, *_ANSWERS)
        return RecordSource(path, sample_of, kinds=(".parquet", *JSON), columns=columns, events=events)


def sample_of(record: Record) -> Sample:
    """Make one question and its answer, white space behind each removed. Raises DataError with file, record, field."""
    question, answer = text_at(record, _QUESTIONS).rstrip(), answer_at(record, _ANSWERS).rstrip()
    return Sample(id_of(record), (Message.of("user", question), Message.of("assistant", answer)))


FORMAT = FlanFormat()
