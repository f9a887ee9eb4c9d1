"""Conversations of content parts: JSON lines, a JSON list, or parquet with `messages` and `images` columns.

    {"id": "7", "messages": [{"role": "user", "content": [{"type": "image", "path": "7.png"},
     {"type": "text", "text": "What is it?"}]}, {"role": "assistant", "content": "A cat."}]}
    {"id": "8", "images": ["8.png"], "messages": [{"role": "user", "content": "<image>What is it?"}, ...]}

`content` is a string or a list of parts. Media beside the messages, in `images` (or `image`) and `videos` (or
`video`), are names, bytes, or objects with `bytes` or `path`. Each goes to a placeholder, in reading order: an image or
video part without a source, as TRL writes it, or `<image>` and `<video>` in a question, as LLaMA-Factory and ms-swift
do. Without any placeholder they go before the first question; any other difference in number is an error. The text
around a marker stays as it is. `conversations` of `from` and `value` (ShareGPT) are read in place of `messages`, and
then `system`. Optional: `branches`, a list of message lists that each continue `messages` and do not see each other;
`template`, the name of this sample's own template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vila.chat.content import parse_messages
from vila.chat.templates import find_template
from vila.core.errors import UnknownNameError
from vila.core.progress import SILENT, Events
from vila.core.types import Image, MediaRef, Message, Part, Role, Sample, Text, Video
from vila.data.formats.base import (
    IMAGE_MARKER,
    JSON,
    VIDEO_MARKER,
    RecordSource,
    id_of,
    list_at,
    optional_text,
    read_options,
)
from vila.data.readers.media_refs import Keys, key_path, value_at
from vila.data.readers.records import Record, image_at, media_keys, media_source, only_key

MEDIA_KEYS = ("images", "image", "videos", "video")
_COLUMNS = ("id", "messages", "conversations", "system", *MEDIA_KEYS, "branches", "template")
_SOURCES = ("path", "file", "base64", "bytes")
_MARKERS = {"image": IMAGE_MARKER, "video": VIDEO_MARKER}
_SHAREGPT_ROLES: Mapping[str, Role] = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MessagesOptions:
    """No options."""


class MessagesFormat:
    """Content-part conversations."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: object) -> RecordSource:
        """Give random access to the samples of a file, or of all files of a directory."""
        read_options(MessagesOptions, options, "messages")
        return RecordSource(
            path,
            partial(sample_of, root=image_root),
            kinds=(".parquet", *JSON),
            columns=_COLUMNS,
            events=events,
            media=MEDIA_KEYS,
        )


def sample_of(record: Record, root: Path) -> Sample:
    """Make the conversation of a record. Raises DataError with file, record, field and value."""
    beside = _Beside(record, root)
    messages = _conversation(record, root, beside)
    branches = _branches(record, root, beside)
    if beside.unplaced and not Sample("", messages, branches).media:
        messages = _before_first_question(record, messages, branches, beside.all)
    else:
        beside.check()
    return Sample(id_of(record), messages, branches, _template(record))


class _Beside:
    """The media beside the messages of a record, given to their placeholders in reading order."""

    def __init__(self, record: Record, root: Path) -> None:
        self.record = record
        self.key = {"image": only_key(record, ("images", "image")), "video": only_key(record, ("videos", "video"))}
        self.media: dict[str, tuple[Image | Video, ...]] = {
            "image": tuple(image_at(record, keys, root) for keys in media_keys(record, self.key["image"])),
            "video": tuple(Video(media_source(record, keys, root)) for keys in media_keys(record, self.key["video"])),
        }
        self.places = {"image": 0, "video": 0}

    @property
    def all(self) -> tuple[Image | Video, ...]:
        return self.media["image"] + self.media["video"]

    @property
    def unplaced(self) -> bool:
        """Whether there are media and no placeholder at all."""
        return bool(self.all) and not any(self.places.values())

    def take(self, kind: str) -> Part:
        """Return the medium of the next placeholder; empty text if they are used up, which `check` reports."""
        self.places[kind] += 1
        media = self.media[kind]
        return media[self.places[kind] - 1] if self.places[kind] <= len(media) else Text("")

    def split(self, text: str, kinds: list[str]) -> list[Part]:
        """Split a text at the markers of these kinds of media and put the media in their places."""
        if not kinds:
            return [Text(text)]
        kind_of = {_MARKERS[kind]: kind for kind in kinds}
        pieces = re.split(f"({'|'.join(kind_of)})", text)
        return [self.take(kind_of[piece]) if piece in kind_of else Text(piece) for piece in pieces if piece]

    def check(self) -> None:
        """Raise DataError if placeholders and media differ in number."""
        for kind, media in self.media.items():
            if self.places[kind] == len(media):
                continue
            hint = f"give each {kind} one placeholder, or none at all to have them before the first question"
            if not media:
                hint = (
                    f"name the files in {self.key[kind]!r}; text that spells {_MARKERS[kind]} is written as "
                    '{"type": "text", "text": ...}'
                )
            raise self.record.error(
                f"{self.places[kind]} {kind} placeholders ({_MARKERS[kind]}, or a part without a source) "
                f"for {len(media)} {kind}s",
                field=self.key[kind],
                hint=hint,
            )


def _conversation(record: Record, root: Path, beside: _Beside) -> tuple[Message, ...]:
    if record.value.get("messages") is None and record.value.get("conversations") is not None:
        return _sharegpt(record, beside)
    list_at(record, "messages", "messages")
    return _messages(record, ("messages",), root, beside)


def _branches(record: Record, root: Path, beside: _Beside) -> tuple[tuple[Message, ...], ...]:
    given = record.value.get("branches")
    if given is None:
        return ()
    if not isinstance(given, list):
        raise record.error(field="branches", value=given, expected="a list of lists of messages")
    return tuple(_messages(record, ("branches", number), root, beside) for number in range(len(given)))


def _template(record: Record) -> str | None:
    name = optional_text(record, "template")
    if name:
        try:
            find_template(name)
        except UnknownNameError as error:
            near = f"did you mean {' or '.join(map(repr, error.near))}?" if error.near else None
            raise record.error("unknown template", field="template", value=name, hint=near) from error
    return name or None


def _messages(record: Record, keys: Keys, root: Path, beside: _Beside) -> tuple[Message, ...]:
    records = value_at(record.value, keys)
    if isinstance(records, list):
        records = [
            _with_media(record, message, (*keys, number), root, beside) for number, message in enumerate(records)
        ]
    return parse_messages(records, file=record.file, record=record.number, field=key_path(keys))


def _with_media(record: Record, message: Any, keys: Keys, root: Path, beside: _Beside) -> Any:
    """Return the message with media in place of its image and video parts, and of the markers in its text."""
    if not isinstance(message, Mapping):
        return message
    content, role = message.get("content"), message.get("role")
    if isinstance(content, str):
        return {**message, "content": _said(record, content, role, key_path((*keys, "content")), beside, plain=True)}
    if not isinstance(content, list):
        return message
    parts: list[Any] = []
    for number, part in enumerate(content):
        here = (*keys, "content", number)
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
        if isinstance(text, str):
            parts += _said(record, text, role, key_path(here), beside, plain=False)
        else:
            parts.append(_part(record, part, here, root, beside))
    return {**message, "content": parts}


def _said(record: Record, text: str, role: Any, field: str, beside: _Beside, *, plain: bool) -> list[Part]:
    """Return the parts of a text. plain: it is the whole content, so a marker without media is a mistake.

    `<video>` is also an element of HTML, and is read only where the record has videos.
    """
    kinds = [kind for kind, media in beside.media.items() if media or (plain and role == "user" and kind == "image")]
    if role != "user":
        found = [_MARKERS[kind] for kind in kinds if _MARKERS[kind] in text]
        if found:
            raise record.error(f"{found[0]} outside a question", field=field, value=text)
        return [Text(text)]
    return beside.split(text, kinds)


def _part(record: Record, part: Any, keys: Keys, root: Path, beside: _Beside) -> Part | Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    field = key_path(keys)
    if kind not in ("image", "video"):
        if kind == "image_url":
            raise record.error(
                "training reads local files only", field=field, value=part, expected="an image part with a path"
            )
        return part
    if part.get("url") is not None:
        raise record.error(
            "is a URL", field=f"{field}.url", value=part["url"],
            hint="training reads local files only; download it first",
        )  # fmt: skip
    # Columns of parquet give every part the keys of all.
    given = [key for key in (*_SOURCES, kind) if part.get(key) is not None]
    if len(given) > 1:
        raise record.error(f"{kind} part with {' and '.join(given)}", field=field, expected="one of them")
    if not given:
        if not beside.media[kind]:
            raise record.error(
                f"{kind} part without a source, and no {kind} beside the messages",
                field=field,
                expected=f"one of {', '.join(_SOURCES)}",
            )
        return beside.take(kind)
    if given == ["base64"] and not isinstance(part["base64"], (str, MediaRef)):
        raise record.error(field=f"{field}.base64", value=part["base64"], expected="base64 text")
    source = media_source(record, (*keys, kind) if given[0] == kind else keys, root)
    if kind == "image":
        return Image(source)
    frames = part.get("num_frames")
    if frames is not None and (not isinstance(frames, int) or isinstance(frames, bool) or frames < 1):
        raise record.error(field=f"{field}.num_frames", value=frames, expected="a positive whole number")
    return Video(source, frames)


def _sharegpt(record: Record, beside: _Beside) -> tuple[Message, ...]:
    """Return the messages of `conversations`, with the text of `system` before them."""
    messages = []
    if system := optional_text(record, "system"):
        messages.append(Message.of("system", system))
    for number, turn in enumerate(list_at(record, "conversations", "turns")):
        field = f"conversations[{number}]"
        if not isinstance(turn, Mapping):
            raise record.error(field=field, value=turn, expected="an object with 'from' and 'value'")
        speaker, text = turn.get("from"), turn.get("value")
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            raise record.error(field=f"{field}.from", value=speaker, expected=f"one of {', '.join(_SHAREGPT_ROLES)}")
        if not isinstance(text, str):
            raise record.error(field=f"{field}.value", value=text, expected="text")
        role = _SHAREGPT_ROLES[speaker]
        if role == "system" and messages:
            raise record.error("a system turn that is not the first", field=field)
        parts = _said(record, text, role, f"{field}.value", beside, plain=True)
        messages.append(Message(role, tuple(parts)))
    return tuple(messages)


def _before_first_question(
    record: Record, messages: tuple[Message, ...], branches: tuple[tuple[Message, ...], ...], media: tuple[Part, ...]
) -> tuple[Message, ...]:
    for number, message in enumerate(messages):
        if message.role == "user":
            first = Message("user", (*media, *message.parts))
            return (*messages[:number], first, *messages[number + 1 :])
    if branches and all(branch and branch[0].role == "user" for branch in branches):
        return (*messages, Message("user", media))
    raise record.error("media beside the messages, and no turn of the user to show them in", field="messages")


FORMAT = MessagesFormat()
