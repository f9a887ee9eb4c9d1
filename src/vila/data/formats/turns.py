"""Conversations as data sets write them: text with markers, turns that must alternate, fields that must be text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vila.core.types import Image, Message, Part, Text, Video
from vila.data.formats.rows import Row
from vila.data.formats.stored import Keys, value_at, written

IMAGE_MARKER, VIDEO_MARKER = "<image>", "<video>"


def text_at(row: Row, keys: Sequence[str], place: Keys = ()) -> str:
    """Return the text under the first of `keys` that the object at `place` of the record has. Raises DataError."""
    holder = value_at(row.value, place)
    if not isinstance(holder, Mapping):
        raise row.fault(field=written(place), value=holder, expected="an object ({...})")
    for key in keys:
        if holder.get(key) is not None:
            if isinstance(holder[key], str):
                return str(holder[key])
            raise row.fault(field=written((*place, key)), value=holder[key], expected="text")
    found = f"the object has {', '.join(map(repr, holder)) or 'no keys'}"
    raise row.fault(f"missing; {found}", field=" or ".join(written((*place, key)) for key in keys))


def list_at(row: Row, key: str, items: str) -> list[Any]:
    """Return the list under a key of the record. Raises DataError for any other type. items: for errors."""
    value = row.value.get(key)
    if isinstance(value, list):
        return value
    if key not in row.value:
        raise row.fault(
            f"missing; the record has {', '.join(map(repr, row.value)) or 'no keys'}",
            field=key,
            expected=f"a list of {items}",
        )
    raise row.fault(field=key, value=value, expected=f"a list of {items}")


def answer_at(row: Row, keys: Sequence[str], place: Keys = ()) -> str:
    """Return the text that `text_at` finds, which must hold more than white space. Raises DataError."""
    text = text_at(row, keys, place)
    if not text.strip():
        holder = value_at(row.value, place)
        key = next(key for key in keys if holder.get(key) is not None)
        raise row.fault("the answer is empty", field=written((*place, key)), value=text)
    return text


def optional_text(row: Row, key: str) -> str:
    """Return the text under a key of the record, "" if it is absent or null. Raises DataError for any other type."""
    return "" if row.value.get(key) is None else text_at(row, (key,))


def id_of(row: Row) -> str:
    """Return the record's own id, or one made of file and number. Raises DataError if it is neither text nor number."""
    value = row.value.get("id")
    if value is None or value == "":
        return row.name
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise row.fault(field="id", value=value, expected="text or a number")
    return str(value)


def joined(parts: Iterable[Part | str]) -> tuple[Part, ...]:
    """Join neighbouring texts and leave out empty ones."""
    out: list[Part] = []
    for part in parts:
        part = Text(part) if isinstance(part, str) else part
        if isinstance(part, Text) and out and isinstance(out[-1], Text):
            out[-1] = Text(out[-1].text + part.text)
        elif not isinstance(part, Text) or part.text:
            out.append(part)
    return tuple(out)


def media_first(media: Iterable[Image | Video], text: str) -> tuple[Part, ...]:
    """Return each medium and a newline, then the text: how the original asks about images."""
    pieces: list[Part | str] = []
    for item in media:
        pieces += [item, "\n"]
    return joined([*pieces, text])


def without_markers(text: str, *markers: str) -> str:
    """Remove `markers` from the text, each with the newline behind it, or else the one in front of it."""
    for marker in markers:
        text = text.replace(f"{marker}\n", "").replace(f"\n{marker}", "").replace(marker, "")
    return text


def check_turns(messages: Sequence[Message], row: Row, field: str) -> tuple[Message, ...]:
    """Return the messages if user and assistant alternate, the assistant ends and no answer is empty.

    A system message may come first.
    field: list of the record that the messages were read from; message k is called `field[k]`.
    Raises DataError with the turn.
    """
    body = messages[1:] if messages and messages[0].role == "system" else messages
    first = len(messages) - len(body)
    for number, message in enumerate(body):
        turn = f"{field}[{first + number}]"
        expected = ("user", "assistant")[number % 2]
        if message.role != expected:
            raise row.fault("roles do not alternate", field=turn, value=message.role, expected=expected)
        if message.role == "assistant" and not message.text.strip():
            raise row.fault("the answer is empty", field=turn, value=message.text)
    if not body or body[-1].role != "assistant":
        raise row.fault("the last turn is not the assistant's", field=field)
    return tuple(messages)
