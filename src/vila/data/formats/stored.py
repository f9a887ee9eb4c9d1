"""Media inside a larger file: where they lie, until somebody decodes them. All are hashable and cheap to pickle."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.data.formats.scan_json import parse_record
from vila.data.handles import Stamp, read_span

Keys = tuple[str | int, ...]
"""The way from a record to a value inside it: ("image_info", 2, "image_base64")."""


@dataclass(frozen=True, slots=True)
class FileSlice:
    """Bytes of a file that stand there as they are: a member of a tar.

    offset, size: in bytes. name: file and place, for messages. stamp: what the file was when the place was noted.
    """

    path: Path
    offset: int
    size: int
    name: str
    stamp: Stamp | None = field(default=None, repr=False)

    def read(self) -> bytes:
        """The bytes. Raises DataError when the file is gone, cut or has changed."""
        return read_span(self.path, self.offset, self.size, self.stamp)


@dataclass(frozen=True, slots=True)
class Base64Field:
    """Base64 text inside a JSON record.

    offset, size: the record in its file, in bytes. keys: the way to the text.
    """

    path: Path
    offset: int
    size: int
    keys: Keys
    where: str
    stamp: Stamp | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """File, row and keys."""
        return f"{self.where} {written(self.keys)}"

    def read(self) -> bytes:
        """The decoded bytes. Raises DataError when the record is not what it was or the text is not base64."""
        record = parse_record(read_span(self.path, self.offset, self.size, self.stamp), self.where)
        return decode_base64(value_at(record, self.keys), self.name)


def value_at(value: Any, keys: Keys) -> Any:
    """What stands at the end of `keys`, or None where the way ends before."""
    for key in keys:
        try:
            value = value[key]
        except (LookupError, TypeError):
            return None
    return value


def written(keys: Keys) -> str:
    """Keys as one writes them: `image_info[2].file`."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return text.removeprefix(".")


def decode_base64(text: Any, where: str) -> bytes:
    """The bytes of base64 text, line breaks and a `data:` head allowed. Raises DataError."""
    if not isinstance(text, str) or not text:
        raise DataError(f"{where}: no base64 text there")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: not base64 ({error})") from error
