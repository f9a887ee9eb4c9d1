"""Images and videos as the command line names them, checked before a model is loaded."""

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
    """An image by its path or URL."""
    return Image(media_path(name))


def video_of(name: str, num_frames: int | None) -> Video:
    """A video by its path or URL."""
    return Video(media_path(name), num_frames)


def open_pictures(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with every image read: a bad one shows before weights are read, and a URL is fetched once.

    Raises MediaError for an image that cannot be decoded and for a video whose file is missing.
    """
    return tuple(replace(message, parts=tuple(map(_opened, message.parts))) for message in messages)


def opened(image: Image) -> Image:
    """The image with its encoded bytes in memory, checked: whether its EXIF turns it is for the model's settings."""
    return read_image(image)[0]


def read_image(image: Image) -> tuple[Image, tuple[int, int]]:
    """The image with its encoded bytes in memory, and its (width, height). Raises MediaError if decoding fails."""
    from PIL import Image as PilImage

    from vila.media.image import open_image
    from vila.media.source import Loaded, open_source

    if not isinstance(image.source, PilImage.Image):
        stream, name = open_source(image.source, "an image")
        with stream:
            image = Image(Loaded(name, stream.read()))
    return image, open_image(image).size


def _opened(part: Part) -> Part:
    if isinstance(part, Video):
        check_clip(part)
    return opened(part) if isinstance(part, Image) else part


def check_clip(video: Video) -> None:
    """Raises MediaError when the video is a file that is not there; its content is checked when it is decoded."""
    if isinstance(video.source, Path) and not video.source.is_file():
        problem = "a directory, not a video" if video.source.is_dir() else "no such file"
        raise MediaError(problem, file=video.source, hint="give the path of one file")
