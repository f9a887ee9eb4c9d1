"""Assertions on errors and notes by their values (files, fields, ids), not by their sentences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vila.core.errors import MISSING, DataError, VilaError


@contextmanager
def refused(*mentions: str, error: type[VilaError] = DataError, file: str = "", **fields: Any) -> Iterator[VilaError]:
    """Assert that the block raises `error`.

    mentions: values that the message contains. file: name of the file.
    fields: record, field, value, hint ... of the error.
    """
    with pytest.raises(error) as caught:
        yield
    found = caught.value
    assert not file or Path(found.file or "").name == file, found
    for name, value in fields.items():
        assert getattr(found, name, MISSING) == value, found
    for mention in mentions:
        assert mention in str(found)


def has_note(notes: Iterable[str], *mentions: str) -> bool:
    """Whether one of the notes contains all values."""
    return any(all(mention in note for mention in mentions) for note in notes)
