"""Frames of videos as images that are decoded late: their number is known without opening the video."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from vila.core.errors import MediaError
from vila.core.types import Image, Stored, Video
from vila.core.vision_spec import VisionSpec
from vila.media.image import open_image
from vila.media.limits import DEFAULT_LIMITS
from vila.media.transform import Bytes, shrinker, square_bytes
from vila.media.video import open_frames


@dataclass(frozen=True, slots=True)
class ClipFrame:
    """One of the `count` images that stand for a video, `number` from 0; see `media.video.frame_indices`."""

    source: Path | str | bytes | Stored
    number: int
    count: int

    @property
    def name(self) -> str:
        """The video and the number of the image, counted from 1."""
        return f"{_name_of(self.source)} picture {self.number + 1} of {self.count}"

    def read(self) -> bytes:
        """The frame as PNG, which loses nothing. Raises MediaError naming the video.

        The frames of the video read last are kept, so reading them one after the other decodes it once. `open_squares`
        takes the frames themselves and keeps none.
        """
        stream = io.BytesIO()
        _kept_frames(Video(self.source), self.count)[self.number].save(stream, "PNG", compress_level=1)
        return stream.getvalue()


def frames_of(video: Video, default: int) -> list[Image]:
    """The images that stand for a video, unopened; `default` of them unless the video says how many.

    Raises MediaError naming the video when the number is larger than `MediaLimits.num_frames`, or less than one.
    """
    count, most = default if video.num_frames is None else video.num_frames, DEFAULT_LIMITS.num_frames
    if not 1 <= count <= most:
        raise MediaError(file=_name_of(video.source), field="num_frames", value=count, expected=f"1 to {most}")
    return [Image(ClipFrame(video.source, number, count)) for number in range(count)]


def open_squares(images: Iterable[Image], spec: VisionSpec) -> Iterator[Bytes]:
    """Every image made square at the tower's size, uint8 [3, S, S], in order.

    A video is decoded once for the frames of it that stand together, and each frame is made square as soon as it is
    decoded: whole frames do not pile up. Raises MediaError naming image or video.
    """
    for video, group in groupby(images, _video_of):
        if video is None:
            for image in group:
                yield square_bytes(open_image(image, exif_orientation=spec.exif_orientation), spec)
            continue
        frames = open_frames(*video, shrink=shrinker(spec))
        for image in group:
            if isinstance(image.source, ClipFrame):
                yield square_bytes(frames[image.source.number], spec)


def _video_of(image: Image) -> tuple[Video, int] | None:
    return (Video(image.source.source), image.source.count) if isinstance(image.source, ClipFrame) else None


_kept_frames = lru_cache(maxsize=1)(open_frames)


def _name_of(source: Path | str | bytes | Stored) -> str:
    return Image(source).name
