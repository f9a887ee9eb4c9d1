"""Messages written as dictionaries with content parts, the form of Hugging Face chat templates and of OpenAI's API.

    {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is it?"}]}

A text part is text, also where it spells `<image>`. Media are named here and decoded late.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.types import ROLES, Image, Message, Part, Sample, Text, Video

ReadMedia = Callable[[Mapping[str, Any], str], Image | Video]
"""Makes a medium of a content part; the second argument is the field that the part is, for errors."""

_URL_STARTS = ("http://", "https://", "data:")


def messages_of(
    messages: Sequence[Mapping[str, Any] | Message],
    *,
    file: str | PathLike[str] | None = None,
    record: int | str | None = None,
    field: str = "messages",
    read: ReadMedia | None = None,
) -> tuple[Message, ...]:
    """Parse messages from dictionaries with `role` and `content`; `Message` objects pass through.

    `content` is a string or a list of parts:
        {"type": "text", "text": ...}
        {"type": "image", ...} with one of `path`, `url`, `base64`, or `image`, which may be a PIL image, an array
            uint8 [H, W] or [H, W, 3], encoded bytes, a path or a URL
        {"type": "image_url", "image_url": {"url": ...}}
        {"type": "video", ...} with one of `path`, `url`, `base64`, or `video` (bytes, a path or a URL), and perhaps
            `num_frames`
    file, record: location of the messages, for errors. field: what they are called there.
    read: makes the media instead of `read_media`, where not every source is allowed.
    Raises DataError with the field, such as `messages[1].content[0]`, and the value.
    """
    try:
        if not isinstance(messages, (list, tuple)):
            raise DataError(field=field, value=messages, expected="a list of messages [{'role': ..., 'content': ...}]")
        return tuple(
            message if isinstance(message, Message) else _message(message, f"{field}[{number}]", read)
            for number, message in enumerate(messages)
        )
    except DataError as error:
        error.file = error.file or (None if file is None else str(file))
        error.record = record if error.record is None else error.record
        raise


def _message(row: Any, field: str, read: ReadMedia | None) -> Message:
    if not isinstance(row, Mapping):
        raise DataError(field=field, value=row, expected="an object with 'role' and 'content'")
    role, content = row.get("role"), row.get("content", "")
    if role not in ROLES:
        raise DataError(field=f"{field}.role", value=role, expected=f"one of {', '.join(ROLES)}")
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, (list, tuple)):
        raise DataError(field=f"{field}.content", value=content, expected="text or a list of parts")
    return Message(role, tuple(_part(part, f"{field}.content[{number}]", read) for number, part in enumerate(parts)))


def _part(part: Any, field: str, read: ReadMedia | None) -> Part:
    if isinstance(part, (Text, Image, Video)):
        return part
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
    if isinstance(text, str):
        return Text(text)
    if isinstance(part, Mapping) and part.get("type") in ("image", "image_url", "video"):
        return (read or read_media)(part, field)
    raise DataError(
        field=field,
        value=part,
        expected="text, or a part of type text (with a string 'text'), image, image_url or video",
    )


def read_media(part: Mapping[str, Any], field: str) -> Image | Video:
    """Read the medium of a part of type image, image_url or video, from any source. Raises DataError."""
    kind = "video" if part["type"] == "video" else "image"
    known = ("image_url",) if part["type"] == "image_url" else ("path", "url", "base64", kind)
    given = [key for key in known if part.get(key) is not None]
    if len(given) != 1:
        raise DataError(
            f"{kind} part with {' and '.join(given) or 'no source'}", field=field, expected=f"one of {', '.join(known)}"
        )
    key = given[0]
    source = _source(key, part[key], f"{field}.{key}")
    if isinstance(source, Image if kind == "image" else Video):
        return source
    if kind == "image" and not isinstance(source, Video):
        return Image(source)
    if kind == "video" and isinstance(source, (Path, str, bytes)):
        return Video(source, _num_frames(part.get("num_frames"), f"{field}.num_frames"))
    remedy = "a video has a part of type video" if kind == "image" else "give its frames as images"
    expected = "an image" if kind == "image" else "a video"
    raise DataError(field=f"{field}.{key}", value=source, expected=expected, hint=remedy)


def _source(key: str, value: Any, field: str) -> Any:
    if key == "image_url" and isinstance(value, Mapping):
        value = value.get("url")
    if key == "path" and isinstance(value, (str, Path)) and str(value):
        return Path(value)
    if key in ("url", "image_url") and isinstance(value, str) and value.startswith(_URL_STARTS):
        return value
    if key == "base64" and isinstance(value, str):
        return value if value.startswith("data:") else _decoded(value, field)
    if key in ("image", "video"):
        return _object(value, field)
    wanted = {"path": "a file name", "base64": "a string"}.get(key, "an http(s) or data URL; a file is named by 'path'")
    raise DataError(field=field, value=value, expected=wanted)


def _decoded(text: str, field: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"not base64 ({error})", field=field, value=text) from error


def _object(value: Any, field: str) -> Any:
    """Return the value of `image` or `video` in a form that `Image` or `Video` holds."""
    if isinstance(value, str) and value:
        return value if value.startswith(_URL_STARTS) else Path(value)
    if isinstance(value, (Path, bytes, Image, Video)):
        return value
    import numpy as np
    from PIL import Image as PilImage

    if isinstance(value, PilImage.Image):
        return value
    if not hasattr(value, "__array__"):
        raise DataError(field=field, value=value, expected="a PIL image, an array, bytes, a path or a URL")
    array = np.asarray(value)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise DataError(
            f"array of dtype {array.dtype} and shape {list(array.shape)}",
            field=field,
            expected="uint8 [H, W, 3] or [H, W]",
        )
    return PilImage.fromarray(array)


def _num_frames(value: Any, field: str) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise DataError(field=field, value=value, expected="a positive whole number")


# --- clips
# Clips in conversations become their frames, each a picture with the template's gap behind it. Nothing is decoded.


Frames = Callable[[Video], Sequence[Image]]
"""The pictures that stand for a clip, in order."""


def expand_clips(messages: Sequence[Message], gap: str, frames: Frames) -> tuple[Message, ...]:
    """Messages with each clip replaced by its frames, `gap` after each, as the original writes `<image>\\n`."""
    return tuple(
        replace(message, parts=tuple(_expanded(message.parts, gap, frames))) if _has_clip(message) else message
        for message in messages
    )


def expand_sample(sample: Sample, gap: str, frames: Frames) -> Sample:
    """The sample with each clip replaced by its frames; its conversations are those of `expand_clips`.

    Branches come back whole, with nothing before them: whether a gap follows the last frame of what they share depends
    on how each of them goes on.
    """
    if not any(isinstance(item, Video) for item in sample.media):
        return sample
    whole = tuple(expand_clips(messages, gap, frames) for messages in sample.conversations())
    return replace(sample, messages=(), branches=whole) if sample.branches else replace(sample, messages=whole[0])


def _has_clip(message: Message) -> bool:
    return any(isinstance(part, Video) for part in message.parts)


def _expanded(parts: Sequence[Part], gap: str, frames: Frames) -> Iterator[Part]:
    for place, part in enumerate(parts):
        if not isinstance(part, Video):
            yield part
            continue
        after = parts[place + 1] if place + 1 < len(parts) else None
        pictures = frames(part)
        for number, picture in enumerate(pictures, start=1):
            yield picture
            # The gap after the last frame may be there already: "<video>\nWhat happens?".
            there = number == len(pictures) and isinstance(after, Text) and after.text.startswith(gap)
            if gap and not there:
                yield Text(gap)
