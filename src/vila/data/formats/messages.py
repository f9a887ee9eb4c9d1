"""Conversations of content parts: JSON lines, a JSON list, or parquet with `messages` and `images` columns.

    {"id": "7", "messages": [{"role": "user", "content": [{"type": "image", "path": "7.png"},
     {"type": "text", "text": "What is it?"}]}, {"role": "assistant", "content": "A cat."}]}

`content` is a string or a list of parts. An image part without a source takes the next of the record's `images` (names,
bytes, or objects with `bytes` or `path`), as TRL writes them; where no part is an image, they stand before the first
question. Optional: `branches`, a list of message lists that each continue `messages` and do not see each other;
`template`, the name of this sample's own template.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vila.chat.content import messages_of
from vila.core.errors import DataError
from vila.core.events import SILENT, Events
from vila.core.types import Image, Message, Part, Sample, Stored, Video
from vila.data.formats.media import images_at, source_of
from vila.data.formats.rows import Row
from vila.data.formats.source import JSON, RecordSource, read_options
from vila.data.formats.stored import Keys, value_at
from vila.data.formats.turns import id_of

_COLUMNS = ("id", "messages", "images", "branches", "template")
_SOURCES = ("path", "file", "base64", "bytes")


@dataclass(frozen=True, slots=True)
class MessagesOptions:
    """No options."""


class MessagesFormat:
    """Content-part conversations."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: object) -> RecordSource:
        """Random access to the samples of a file, or of all files of a directory."""
        read_options(MessagesOptions, options, "messages")
        return RecordSource(
            path, partial(sample_of, root=image_root), kinds=(".parquet", *JSON), columns=_COLUMNS, events=events
        )


def sample_of(row: Row, root: Path) -> Sample:
    """The conversation of a record. Raises DataError naming file, row, message and reason."""
    record, where = row.value, row.where
    if not isinstance(record.get("messages"), list):
        raise DataError(f"{where}: expected an object with a list 'messages'")
    images = images_at(row, "images", root)
    pending = iter(images)
    messages = _messages(row, ("messages",), root, pending)
    given = record.get("branches") or ()
    branches = tuple(_messages(row, ("branches", number), root, pending) for number in range(len(given)))
    left = tuple(pending)
    if left and len(left) == len(images) and not Sample("", messages, branches).media:
        messages, left = _before_first_question(messages, left), ()
    if left:
        raise DataError(f"{where}: {len(images)} images, but only {len(images) - len(left)} image parts that take them")
    return Sample(id_of(record, row.name), messages, branches, record.get("template") or None)


def _messages(row: Row, keys: Keys, root: Path, pending: Iterator[Image]) -> tuple[Message, ...]:
    rows = value_at(row.value, keys)
    if not isinstance(rows, list):
        return messages_of(rows, where=row.where)
    resolved = [
        _with_media(row, message, (*keys, number), root, pending, f"{row.where} message {number + 1}")
        for number, message in enumerate(rows)
    ]
    return messages_of(resolved, where=row.where)


def _with_media(row: Row, message: Any, keys: Keys, root: Path, pending: Iterator[Image], where: str) -> Any:
    """The message with its image and video parts replaced by what they name."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    parts = [
        _part(row, part, (*keys, "content", number), root, pending, f"{where} part {number + 1}")
        for number, part in enumerate(content)
    ]
    return {**message, "content": parts}


def _part(row: Row, part: Any, keys: Keys, root: Path, pending: Iterator[Image], where: str) -> Part | Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("image", "video"):
        if kind == "image_url":
            raise DataError(f"{where}: pictures of training data are local files; give an image part with a path")
        return part
    if part.get("url") is not None:
        raise DataError(f"{where}: {_shown(part['url'])} is a URL; training reads local files only, download it first")
    # Columns of parquet give every part the keys of all.
    given = [key for key in (*_SOURCES, kind) if part.get(key) is not None]
    if len(given) > 1 or (kind == "video" and not given):
        raise DataError(
            f"{where}: {kind} part with {' and '.join(given) or 'no source'}; give one of {', '.join(_SOURCES)}"
        )
    if given == ["base64"] and not isinstance(part["base64"], (str, Stored)):
        raise DataError(f"{where}: base64 is {_shown(part['base64'])}, expected text; encode the file or give its path")
    if not given:
        image = next(pending, None)
        if image is None:
            raise DataError(f"{where}: an image part without a source, and no picture of 'images' is left for it")
        return image
    key = (*keys, kind) if given[0] == kind else keys
    source = source_of(row, key, root)
    if kind == "image":
        return Image(source)
    frames = part.get("num_frames")
    if frames is not None and (not isinstance(frames, int) or isinstance(frames, bool) or frames < 1):
        raise DataError(f"{where}: num_frames {frames!r} is not a positive whole number")
    return Video(source, frames)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def _before_first_question(messages: tuple[Message, ...], images: tuple[Image, ...]) -> tuple[Message, ...]:
    for number, message in enumerate(messages):
        if message.role == "user":
            first = Message("user", (*images, *message.parts))
            return (*messages[:number], first, *messages[number + 1 :])
    return messages


FORMAT = MessagesFormat()
