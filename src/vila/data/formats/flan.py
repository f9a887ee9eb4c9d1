"""Format `flan`: text-only instructions, `question` and `answer`, or `inputs` and `targets`."""

from __future__ import annotations

from pathlib import Path

from vila.core.types import Message, Sample
from vila.data.formats.base import DatasetFormat, NoOptions, answer_at, id_of, text_at
from vila.data.readers.records import Record

_QUESTIONS, _ANSWERS = ("question", "inputs"), ("answer", "targets")


def sample_of(record: Record, root: Path, options: NoOptions) -> Sample:
    """Return question and answer, trailing white space removed. Raises DataError with file, record, field."""
    question, answer = text_at(record, _QUESTIONS).rstrip(), answer_at(record, _ANSWERS).rstrip()
    return Sample(id_of(record), (Message.of("user", question), Message.of("assistant", answer)))


FORMAT = DatasetFormat(
    "flan",
    "FLAN: text-only `question` and `answer`, or `inputs` and `targets`; parquet or JSON.",
    sample_of,
    columns=("id", *_QUESTIONS, *_ANSWERS),
)
