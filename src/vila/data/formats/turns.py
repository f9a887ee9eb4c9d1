"""Conversations as data sets write them: text with markers, turns that must alternate, fields that must be text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vila.core.errors import DataError
from vila.core.types import Image, Message, Part, Text, Video

MARKER = "<image>"


def text_at(record: Mapping[str, Any], keys: Sequence[str], where: str) -> str:
    """The text under the first of `keys` that the record has. Raises DataError."""
    for key in keys:
        if record.get(key) is not None:
            if isinstance(record[key], str):
                return str(record[key])
            raise DataError(f"{where}: {key!r} is {type(record[key]).__name__}, expected text")
    raise DataError(
        f"{where}: has no {' or '.join(map(repr, keys))}; it has {', '.join(map(repr, record)) or 'nothing'}"
    )


def id_of(record: Mapping[str, Any], default: str) -> str:
    """The record's own id, or `default`."""
    return default if record.get("id") in (None, "") else str(record["id"])


def joined(parts: Iterable[Part | str]) -> tuple[Part, ...]:
    """Parts with neighbouring texts made one and empty texts left out."""
    out: list[Part] = []
    for part in parts:
        part = Text(part) if isinstance(part, str) else part
        if isinstance(part, Text) and out and isinstance(out[-1], Text):
            out[-1] = Text(out[-1].text + part.text)
        elif not isinstance(part, Text) or part.text:
            out.append(part)
    return tuple(out)


def media_first(media: Iterable[Image | Video], text: str) -> tuple[Part, ...]:
    """Each medium and a newline, then the text: how the original asks about pictures."""
    pieces: list[Part | str] = []
    for item in media:
        pieces += [item, "\n"]
    return joined([*pieces, text])


def without_markers(text: str, *markers: str) -> str:
    """The text without `markers` and the newline behind, or else in front of, each."""
    for marker in markers:
        text = text.replace(f"{marker}\n", "").replace(f"\n{marker}", "").replace(marker, "")
    return text


def check_turns(messages: Sequence[Message], where: str) -> tuple[Message, ...]:
    """The messages, when user and assistant alternate, the assistant ends and no answer is empty.

    A system message may come first. Raises DataError naming the turn.
    """
    body = messages[1:] if messages and messages[0].role == "system" else messages
    first = len(messages) - len(body) + 1
    for number, message in enumerate(body, start=first):
        expected = ("user", "assistant")[(number - first) % 2]
        if message.role != expected:
            raise DataError(f"{where} turn {number}: expected a turn of the {expected}, got {message.role!r}")
        if message.role == "assistant" and not message.text.strip():
            raise DataError(f"{where} turn {number}: the answer is empty")
    if not body or body[-1].role != "assistant":
        raise DataError(f"{where}: the last turn must be the assistant's")
    return tuple(messages)
