"""Parse messages given as dictionaries with content parts (Hugging Face chat templates, OpenAI API); expand videos.

    {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is it?"}]}

Text parts are text, also where they spell `<image>`. Media are referenced, not decoded.
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
"""Function from a content part and its field name (for errors) to an image or video."""
Frames = Callable[[Video], Sequence[Image]]
"""Function from a video to its frames, in order."""

_URL_STARTS = ("http://", "https://", "data:")


def parse_messages(
    messages: Sequence[Mapping[str, Any] | Message],
    *,
    file: str | PathLike[str] | None = None,
    record: int | str | None = None,
    field: str = "messages",
    read: ReadMedia | None = None,
) -> tuple[Message, ...]:
    """Parse messages from dictionaries with `role` and `content`; `Message` objects are returned as they are.

    `content` is a string or a list of parts:
        {"type": "text", "text": ...}
        {"type": "image", ...} with one of `path`, `url`, `base64`, or `image`, which may be a PIL image, an array
            uint8 [H, W] or [H, W, 3], encoded bytes, a path or a URL
        {"type": "image_url", "image_url": {"url": ...}}
        {"type": "video", ...} with one of `path`, `url`, `base64`, or `video` (bytes, a path or a URL), and optional
            `num_frames`

    file, record, field: location of the messages, for errors.
    read:                replaces `read_media`, for callers that accept fewer sources.
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


def _message(record: Any, field: str, read: ReadMedia | None) -> Message:
    if not isinstance(record, Mapping):
        raise DataError(field=field, value=record, expected="an object with 'role' and 'content'")
    role, content = record.get("role"), record.get("content", "")
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
    expected = "text, or a part of type text (with a string 'text'), image, image_url or video"
    raise DataError(field=field, value=part, expected=expected)


def read_media(part: Mapping[str, Any], field: str) -> Image | Video:
    """Return the image or video of a part of type image, image_url or video. Raises DataError."""
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
    hint = "use a part of type video" if kind == "image" else "give its frames as images"
    expected = "an image" if kind == "image" else "a video"
    raise DataError(field=f"{field}.{key}", value=source, expected=expected, hint=hint)


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
    expected = {"path": "a file name", "base64": "a string"}.get(key, "an http(s) or data URL; use 'path' for a file")
    raise DataError(field=field, value=value, expected=expected)


def _decoded(text: str, field: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"not base64 ({error})", field=field, value=text) from error


def _object(value: Any, field: str) -> Any:
    """Return the value of `image` or `video` as a source of `Image` or `Video`."""
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
        problem = f"array of dtype {array.dtype} and shape {list(array.shape)}"
        raise DataError(problem, field=field, expected="uint8 [H, W, 3] or [H, W]")
    return PilImage.fromarray(array)


def _num_frames(value: Any, field: str) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise DataError(field=field, value=value, expected="a positive integer")


def expand_videos(messages: Sequence[Message], gap: str, frames: Frames) -> tuple[Message, ...]:
    """Replace each video by its frames, with the text `gap` after each frame as upstream does (`<image>\\n`)."""
    return tuple(
        replace(message, parts=tuple(_expand(message.parts, gap, frames)))
        if any(isinstance(part, Video) for part in message.parts)
        else message
        for message in messages
    )


def expand_sample_videos(sample: Sample, gap: str, frames: Frames) -> Sample:
    """Replace each video of a sample by its frames; see `expand_videos`.

    The branches of the result are complete conversations without shared messages: whether a gap follows the last frame
    of a shared message depends on how each branch continues.
    """
    if not any(isinstance(item, Video) for item in sample.media):
        return sample
    conversations = tuple(expand_videos(messages, gap, frames) for messages in sample.conversations())
    if sample.branches:
        return replace(sample, messages=(), branches=conversations)
    return replace(sample, messages=conversations[0])


def _expand(parts: Sequence[Part], gap: str, frames: Frames) -> Iterator[Part]:
    for index, part in enumerate(parts):
        if not isinstance(part, Video):
            yield part
            continue
        following = parts[index + 1] if index + 1 < len(parts) else None
        images = frames(part)
        for number, image in enumerate(images, start=1):
            yield image
            # The text after the video may start with the gap already: "<video>\nWhat happens?".
            has_gap = number == len(images) and isinstance(following, Text) and following.text.startswith(gap)
            if gap and not has_gap:
                yield Text(gap)
