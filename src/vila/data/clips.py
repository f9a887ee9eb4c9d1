"""Frames of clips as pictures that are decoded late: how many there are is known without opening the clip."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from PIL import Image as PilImage

from vila.core.errors import MediaError
from vila.core.types import Image, Stored, Video
from vila.media.image import open_image
from vila.media.video import MAX_FRAMES, open_frames


@dataclass(frozen=True, slots=True)
class ClipFrame:
    """One of the `count` pictures that stand for a clip, `number` from 0; see `media.video.frame_indices`."""

    source: Path | str | bytes | Stored
    number: int
    count: int

    @property
    def name(self) -> str:
        """The clip and which of its pictures this is, counted from 1."""
        return f"{_name_of(self.source)} picture {self.number + 1} of {self.count}"

    def read(self) -> bytes:
        """The frame as PNG, which loses nothing. Raises MediaError naming the clip.

        The frames of the clip read last are kept, so reading them one after the other decodes it once. `open_pictures`
        takes the frames themselves and keeps none.
        """
        stream = io.BytesIO()
        _kept_frames(Video(self.source), self.count)[self.number].save(stream, "PNG", compress_level=1)
        return stream.getvalue()


def frames_of(video: Video, default: int) -> list[Image]:
    """The pictures that stand for a clip, unopened; `default` of them unless the clip says how many.

    Raises MediaError naming the clip when it is more than a clip can give, or less than one.
    """
    count = default if video.num_frames is None else video.num_frames
    if not 1 <= count <= MAX_FRAMES:
        raise MediaError(f"{_name_of(video.source)}: num_frames is {count}, expected 1 to {MAX_FRAMES}")
    return [Image(ClipFrame(video.source, number, count)) for number in range(count)]


def open_pictures(images: Iterable[Image]) -> Iterator[PilImage.Image]:
    """Every picture in RGB, in order; a clip is decoded once for the frames of it that stand together.

    Raises MediaError naming picture or clip.
    """
    for clip, group in groupby(images, _clip_of):
        if clip is None:
            yield from map(open_image, group)
            continue
        frames = open_frames(*clip)
        yield from (frames[image.source.number] for image in group if isinstance(image.source, ClipFrame))


def _clip_of(image: Image) -> tuple[Video, int] | None:
    return (Video(image.source.source), image.source.count) if isinstance(image.source, ClipFrame) else None


_kept_frames = lru_cache(maxsize=1)(open_frames)


def _name_of(source: Path | str | bytes | Stored) -> str:
    return Image(source).name
