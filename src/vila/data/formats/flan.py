"""Format `flan`: text-only instructions, `question` and `answer`, or `inputs` and `targets`."""

from __future__ import annotations

from pathlib import Path

from vila.core.progress import SILENT, Events
from vila.core.types import Message, Sample
from vila.data.formats.base import JSON, NoOptions, RecordSource, answer_at, id_of, read_options, text_at
from vila.data.readers.records import Record

_QUESTIONS, _ANSWERS = ("question", "inputs"), ("answer", "targets")


class FlanFormat:
    """FLAN: text-only `question` and `answer`, or `inputs` and `targets`; parquet or JSON."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: object) -> RecordSource:
        """Open a file or all files of a directory; `image_root` is not used."""
        read_options(NoOptions, options, "flan")
        columns = ("id", *_QUESTIONS, *_ANSWERS)
        return RecordSource(path, sample_of, kinds=(".parquet", *JSON), columns=columns, events=events)


def sample_of(record: Record) -> Sample:
    """Return question and answer, trailing white space removed. Raises DataError with file, record, field."""
    question, answer = text_at(record, _QUESTIONS).rstrip(), answer_at(record, _ANSWERS).rstrip()
    return Sample(id_of(record), (Message.of("user", question), Message.of("assistant", answer)))


FORMAT = FlanFormat()
