"""Pictures and clips as the command line names them, looked at before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vila.core.errors import MediaError
from vila.core.types import Image, Message, Part, Video


def media_path(name: str) -> Path | str:
    """A URL as it is, anything else as a path."""
    return name if "://" in name or name.startswith("data:") else Path(name).expanduser()


def image_of(name: str) -> Image:
    """A picture by its path or URL."""
    return Image(media_path(name))


def video_of(name: str, num_frames: int | None) -> Video:
    """A clip by its path or URL."""
    return Video(media_path(name), num_frames)


def open_pictures(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with every picture decoded: a bad one shows before weights are read, and a URL is fetched once.

    Raises MediaError for a picture that cannot be read and for a clip whose file is missing.
    """
    return tuple(replace(message, parts=tuple(map(_opened, message.parts))) for message in messages)


def opened(image: Image) -> Image:
    """The picture, decoded."""
    from vila.media.image import open_image

    return Image(open_image(image))


def _opened(part: Part) -> Part:
    if isinstance(part, Video):
        check_clip(part)
    return opened(part) if isinstance(part, Image) else part


def check_clip(video: Video) -> None:
    """Raises MediaError when the clip is a file that is not there; what it holds shows when it is decoded."""
    if isinstance(video.source, Path) and not video.source.is_file():
        what = "a directory, not a clip" if video.source.is_dir() else "no such file; check the path"
        raise MediaError(f"{video.source}: {what}")
