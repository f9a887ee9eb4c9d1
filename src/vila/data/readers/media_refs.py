"""References to media inside larger files, decoded when they are needed. All are hashable and cheap to pickle."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.data.readers.index import FileVersion, read_span
from vila.data.readers.json import parse_record

Keys = tuple[str | int, ...]
"""Path from a record to a value in it: ("image_info", 2, "image_base64")."""


@dataclass(frozen=True, slots=True)
class FileSlice:
    """A byte range of a file, such as a member of a tar archive.

    offset, size: in bytes. name: file and member, for messages. version: expected version of the file.
    """

    path: Path
    offset: int
    size: int
    name: str
    version: FileVersion | None = field(default=None, repr=False)

    def read(self) -> bytes:
        """Read the bytes. Raises DataError if the file is missing, cut or has changed."""
        return read_span(self.path, self.offset, self.size, self.version)


@dataclass(frozen=True, slots=True)
class Base64Field:
    """Base64 text inside a JSON record.

    offset, size: of the record in its file, in bytes. keys: path to the text. record: number or key of the record.
    """

    path: Path
    offset: int
    size: int
    keys: Keys
    record: int | str
    version: FileVersion | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """File, record and key path."""
        return value_name(self.path, self.record, self.keys)

    def read(self) -> bytes:
        """Read and decode. Raises DataError if the file has changed or the text is not base64."""
        record = parse_record(read_span(self.path, self.offset, self.size, self.version), self.path, self.record)
        return decode_base64(value_at(record, self.keys), file=self.path, record=self.record, field=key_path(self.keys))


def value_at(value: Any, keys: Keys) -> Any:
    """Return the value at a key path, None if there is none."""
    for key in keys:
        try:
            value = value[key]
        except (LookupError, TypeError):
            return None
    return value


def key_path(keys: Keys) -> str:
    """Return a key path as text: `image_info[2].file`."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return text.removeprefix(".")


def value_name(file: Path, record: int | str, keys: Keys) -> str:
    """Return the name of a value for messages: `data.jsonl, record 4, image_info[2].image_base64`."""
    return f"{file}, {f'record {record}' if isinstance(record, int) else record}, {key_path(keys)}"


def decode_base64(text: Any, *, file: Path | None, record: int | str, field: str | None = None) -> bytes:
    """Decode base64 text, with line breaks and a `data:` prefix allowed. Raises DataError with file, record, field."""
    if not isinstance(text, str) or not text:
        raise DataError(file=file, record=record, field=field, value=text, expected="base64 text")
    body = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"not base64 ({error})", file=file, record=record, field=field, value=text) from error
