"""Format `messages`: chat messages with text, image and video parts; also ShareGPT `conversations`.

    {"id": "7", "messages": [{"role": "user", "content": [{"type": "image", "path": "7.png"},
     {"type": "text", "text": "What is it?"}]}, {"role": "assistant", "content": "A cat."}]}
    {"id": "8", "images": ["8.png"], "messages": [{"role": "user", "content": "<image>What is it?"}, ...]}

`content` is a string or a list of parts. Top-level media in `images` (or `image`) and `videos` (or `video`) are names,
bytes, or objects with `bytes` or `path`. They replace placeholders in reading order: image or video parts without a
source (as in TRL), or `<image>` and `<video>` in a question (as in LLaMA-Factory and ms-swift). Without placeholders
they go before the first question; any other difference in number is an error. Text around a marker is unchanged.
`conversations` of `from` and `value` (ShareGPT) replace `messages`, with an optional `system`. Optional: `branches`, a
list of message lists that each continue `messages` independently; `template`, the chat template of the sample.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vila.chat.content import parse_messages
from vila.chat.templates import find_template
from vila.core.errors import UnknownNameError
from vila.core.types import Image, MediaRef, Message, Part, Role, Sample, Text, Video
from vila.data.formats.base import (
    IMAGE_MARKER,
    VIDEO_MARKER,
    DatasetFormat,
    NoOptions,
    conversation_turns,
    id_of,
    list_at,
    optional_text,
)
from vila.data.readers.media_refs import Keys, key_path, value_at
from vila.data.readers.records import Record, image_at, media_keys, media_source, only_key

MEDIA_KEYS = ("images", "image", "videos", "video")
_SOURCES = ("path", "file", "base64", "bytes")
_MARKERS = {"image": IMAGE_MARKER, "video": VIDEO_MARKER}
_SHAREGPT_ROLES: Mapping[str, Role] = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"
}  # fmt: skip


def sample_of(record: Record, root: Path, options: NoOptions) -> Sample:
    """Return the conversation of a record. Raises DataError with file, record, field and value."""
    extra = _TopLevelMedia(record, root)
    if record.value.get("messages") is None and record.value.get("conversations") is not None:
        messages = _sharegpt(extra)
    else:
        list_at(record, "messages", "messages")
        messages = _messages(extra, ("messages",))
    branches = _branches(extra)
    if extra.unplaced and not Sample("", messages, branches).media:
        messages = _before_first_question(record, messages, branches, extra.all)
    else:
        extra.check()
    return Sample(id_of(record), messages, branches, _template(record))


class _TopLevelMedia:
    """A record and its top-level media, which replace placeholders in reading order."""

    def __init__(self, record: Record, root: Path) -> None:
        self.record, self.root = record, root
        self.key = {"image": only_key(record, ("images", "image")), "video": only_key(record, ("videos", "video"))}
        self.media: dict[str, tuple[Image | Video, ...]] = {
            "image": tuple(image_at(record, keys, root) for keys in media_keys(record, self.key["image"])),
            "video": tuple(Video(media_source(record, keys, root)) for keys in media_keys(record, self.key["video"])),
        }
        self.used = {"image": 0, "video": 0}

    @property
    def all(self) -> tuple[Image | Video, ...]:
        return self.media["image"] + self.media["video"]

    @property
    def unplaced(self) -> bool:
        """Whether there are media but no placeholders."""
        return bool(self.all) and not any(self.used.values())

    def take(self, kind: str) -> Part:
        """Return the medium of the next placeholder; empty text if there is none left, which `check` reports."""
        self.used[kind] += 1
        media = self.media[kind]
        return media[self.used[kind] - 1] if self.used[kind] <= len(media) else Text("")

    def split(self, text: str, kinds: list[str]) -> list[Part]:
        """Split a text at the markers of these kinds of media and replace the markers by the media."""
        if not kinds:
            return [Text(text)]
        kind_of = {_MARKERS[kind]: kind for kind in kinds}
        pieces = re.split(f"({'|'.join(kind_of)})", text)
        return [self.take(kind_of[piece]) if piece in kind_of else Text(piece) for piece in pieces if piece]

    def check(self) -> None:
        """Raise DataError if the numbers of placeholders and media differ."""
        for kind, media in self.media.items():
            if self.used[kind] == len(media):
                continue
            hint = f"give each {kind} one placeholder, or none, to put all before the first question"
            if not media:
                hint = (
                    f"name the files in {self.key[kind]!r}; write literal text {_MARKERS[kind]} as "
                    '{"type": "text", "text": ...}'
                )
            raise self.record.error(
                f"the number of {kind}s differs from that of {kind} placeholders "
                f"({_MARKERS[kind]}, or parts without a source)",
                field=self.key[kind],
                value=len(media),
                expected=str(self.used[kind]),
                hint=hint,
            )


def _branches(extra: _TopLevelMedia) -> tuple[tuple[Message, ...], ...]:
    given = extra.record.value.get("branches")
    if given is None:
        return ()
    if not isinstance(given, list):
        raise extra.record.error(field="branches", value=given, expected="a list of lists of messages")
    return tuple(_messages(extra, ("branches", number)) for number in range(len(given)))


def _template(record: Record) -> str | None:
    name = optional_text(record, "template")
    if name:
        try:
            find_template(name)
        except UnknownNameError as error:
            near = f"did you mean {' or '.join(map(repr, error.near))}?" if error.near else None
            raise record.error("unknown template", field="template", value=name, hint=near) from error
    return name or None


def _messages(extra: _TopLevelMedia, keys: Keys) -> tuple[Message, ...]:
    record = extra.record
    records = value_at(record.value, keys)
    if isinstance(records, list):
        records = [_with_media(extra, message, (*keys, number)) for number, message in enumerate(records)]
    return parse_messages(records, file=record.file, record=record.number, field=key_path(keys))


def _with_media(extra: _TopLevelMedia, message: Any, keys: Keys) -> Any:
    """Return the message with its image and video parts, and the markers in its text, replaced by media."""
    if not isinstance(message, Mapping):
        return message
    content, role = message.get("content"), message.get("role")
    if isinstance(content, str):
        return {**message, "content": _text_parts(extra, content, role, key_path((*keys, "content")), plain=True)}
    if not isinstance(content, list):
        return message
    parts: list[Any] = []
    for number, part in enumerate(content):
        here = (*keys, "content", number)
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
        if isinstance(text, str):
            parts += _text_parts(extra, text, role, key_path(here), plain=False)
        else:
            parts.append(_part(extra, part, here))
    return {**message, "content": parts}


def _text_parts(extra: _TopLevelMedia, text: str, role: Any, field: str, *, plain: bool) -> list[Part]:
    """Split a text at its markers. plain: the text is the whole content, so a marker without media is an error.

    `<video>` is also an HTML element, so it is a marker only if the record has videos.
    """
    kinds = [kind for kind, media in extra.media.items() if media or (plain and role == "user" and kind == "image")]
    if role != "user":
        found = [_MARKERS[kind] for kind in kinds if _MARKERS[kind] in text]
        if found:
            raise extra.record.error(f"{found[0]} is only allowed in a question", field=field, value=text)
        return [Text(text)]
    return extra.split(text, kinds)


def _part(extra: _TopLevelMedia, part: Any, keys: Keys) -> Part | Any:
    record = extra.record
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
    # In parquet every part has the keys of all parts.
    given = [key for key in (*_SOURCES, kind) if part.get(key) is not None]
    if len(given) > 1:
        raise record.error(f"several sources of one {kind} part", field=field, value=given, expected="one of them")
    if not given:
        if not extra.media[kind]:
            problem = f"{kind} part without a source, and no top-level {kind}"
            raise record.error(problem, field=field, expected=f"one of {', '.join(_SOURCES)}")
        return extra.take(kind)
    if given == ["base64"] and not isinstance(part["base64"], (str, MediaRef)):
        raise record.error(field=f"{field}.base64", value=part["base64"], expected="base64 text")
    source = media_source(record, (*keys, kind) if given[0] == kind else keys, extra.root)
    if kind == "image":
        return Image(source)
    frames = part.get("num_frames")
    if frames is not None and (not isinstance(frames, int) or isinstance(frames, bool) or frames < 1):
        raise record.error(field=f"{field}.num_frames", value=frames, expected="a positive whole number")
    return Video(source, frames)


def _sharegpt(extra: _TopLevelMedia) -> tuple[Message, ...]:
    """Return the messages of `conversations`, preceded by the text of `system`."""
    record, messages = extra.record, []
    if system := optional_text(record, "system"):
        messages.append(Message.of("system", system))
    speakers = f"one of {', '.join(_SHAREGPT_ROLES)}"
    for field, role, text in conversation_turns(record, _SHAREGPT_ROLES, speakers):
        if role == "system" and messages:
            raise record.error("a system turn must be the first", field=field)
        parts = _text_parts(extra, text, role, f"{field}.value", plain=True)
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
    raise record.error("top-level media, but no user turn to put them in", field="messages")


FORMAT = DatasetFormat(
    "messages",
    "Chat `messages` with text, image and video parts, or ShareGPT `conversations`; JSON or parquet.",
    sample_of,
    columns=("id", "messages", "conversations", "system", *MEDIA_KEYS, "branches", "template"),
    media=MEDIA_KEYS,
)
