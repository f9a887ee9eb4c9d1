"""Messages written as dictionaries with content parts, the form of Hugging Face chat templates and of OpenAI's API.

    {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is it?"}]}

A text part is text, also where it spells `<image>`. Media are named here and decoded late.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vila.core.errors import DataError
from vila.core.types import ROLES, Image, Message, Part, Text, Video

ReadMedia = Callable[[Mapping[str, Any], str], Image | Video]
"""Makes a medium of a content part; the second argument says where the part stands, for errors."""

_URL_STARTS = ("http://", "https://", "data:")


def messages_of(
    messages: Sequence[Mapping[str, Any] | Message], *, where: str = "", read: ReadMedia | None = None
) -> tuple[Message, ...]:
    """Messages from dictionaries with `role` and `content`; `Message` objects pass through.

    `content` is a string or a list of parts:
        {"type": "text", "text": ...}
        {"type": "image", ...} with one of `path`, `url`, `base64`, or `image`, which may be a PIL picture, an array
            uint8 [H, W] or [H, W, 3], encoded bytes, a path or a URL
        {"type": "image_url", "image_url": {"url": ...}}
        {"type": "video", ...} with one of `path`, `url`, `base64`, or `video` (bytes, a path or a URL), and perhaps
            `num_frames`
    where: what the messages belong to, put in front of an error's place.
    read: makes the media instead of `read_media`, where not every source is allowed.
    Raises DataError naming message, part and value.
    """
    if not isinstance(messages, (list, tuple)):
        raise DataError(
            f"{where or 'messages'}: expected a list of messages, got {_shown(messages)}; "
            "write [{'role': 'user', 'content': ...}]"
        )
    return tuple(
        message if isinstance(message, Message) else _message(message, f"{where} message {number}".strip(), read)
        for number, message in enumerate(messages, start=1)
    )


def _message(row: Any, where: str, read: ReadMedia | None) -> Message:
    role = row.get("role") if isinstance(row, Mapping) else row
    if not isinstance(row, Mapping) or role not in ROLES:
        raise DataError(f"{where}: role {_shown(role)} is not one of {', '.join(ROLES)}")
    content = row.get("content", "")
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, (list, tuple)):
        raise DataError(f"{where}: content is neither text nor a list of parts, but {_shown(content)}")
    return Message(
        role, tuple(_part(part, f"{where} part {number}", read) for number, part in enumerate(parts, start=1))
    )


def _part(part: Any, where: str, read: ReadMedia | None) -> Part:
    if isinstance(part, (Text, Image, Video)):
        return part
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
    if isinstance(text, str):
        return Text(text)
    if isinstance(part, Mapping) and part.get("type") in ("image", "image_url", "video"):
        return (read or read_media)(part, where)
    raise DataError(
        f"{where}: content part {_shown(part)} is neither a text nor an image or a video; "
        "its type is text, image, image_url or video, and a text part has a string 'text'"
    )


def read_media(part: Mapping[str, Any], where: str) -> Image | Video:
    """The medium of a part of type image, image_url or video, from any source. Raises DataError."""
    kind = "video" if part["type"] == "video" else "image"
    known = ("image_url",) if part["type"] == "image_url" else ("path", "url", "base64", kind)
    given = [key for key in known if part.get(key) is not None]
    if len(given) != 1:
        raise DataError(
            f"{where}: {kind} part with {' and '.join(given) or 'no source'}; give one of {', '.join(known)}"
        )
    key = given[0]
    source = _source(key, part[key], f"{where}: {key}")
    if isinstance(source, Image if kind == "image" else Video):
        return source
    if kind == "image" and not isinstance(source, Video):
        return Image(source)
    if kind == "video" and isinstance(source, (Path, str, bytes)):
        return Video(source, _num_frames(part.get("num_frames"), where))
    remedy = "a clip has a part of type video" if kind == "image" else "give its frames as images"
    raise DataError(f"{where}: {key} {_shown(source)} is not {'a picture' if kind == 'image' else 'a clip'}; {remedy}")


def _source(key: str, value: Any, where: str) -> Any:
    if key == "image_url" and isinstance(value, Mapping):
        value = value.get("url")
    if key == "path" and isinstance(value, (str, Path)) and str(value):
        return Path(value)
    if key in ("url", "image_url") and isinstance(value, str) and value.startswith(_URL_STARTS):
        return value
    if key == "base64" and isinstance(value, str):
        return value if value.startswith("data:") else _decoded(value, where)
    if key in ("image", "video"):
        return _object(value, where)
    wanted = {"path": "a file name", "base64": "a string"}.get(key, "an http(s) or data URL; a file is named by 'path'")
    raise DataError(f"{where} {_shown(value)} is not {wanted}")


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where} {_shown(text)} is not base64 ({error})") from error


def _object(value: Any, where: str) -> Any:
    """What stands under `image` or `video`, in a form that `Image` or `Video` holds."""
    if isinstance(value, str) and value:
        return value if value.startswith(_URL_STARTS) else Path(value)
    if isinstance(value, (Path, bytes, Image, Video)):
        return value
    from PIL import Image as PilImage

    if isinstance(value, PilImage.Image):
        return value
    if not hasattr(value, "__array__"):
        raise DataError(f"{where} {_shown(value)} is not a PIL picture, an array, bytes, a path or a URL")
    array = np.asarray(value)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise DataError(
            f"{where} has dtype {array.dtype} and shape {list(array.shape)}; give uint8 [H, W, 3] or [H, W]"
        )
    return PilImage.fromarray(array)


def _num_frames(value: Any, where: str) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise DataError(f"{where}: num_frames {_shown(value)} is not a positive whole number")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"
