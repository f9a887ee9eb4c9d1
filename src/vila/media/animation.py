"""Animations that Pillow reads: GIF, APNG and animated WebP, one composed frame after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, cast

from PIL import Image as PilImage
from PIL import UnidentifiedImageError

from vila.core.errors import MediaError
from vila.media.image import decode_image, pillow_errors
from vila.media.limits import DecodeMeter, MeteredStream

_STILLS = ("JPEG", "BMP", "TIFF", "PPM", "JPEG2000")
# Pillow reads neither HEIC nor, in every build, AVIF; to FFmpeg they are videos of one frame.
_STILL_BRANDS = (b"avif", b"heic", b"heix", b"mif1")


class Animation:
    """An opened animation. A GIF or WebP of one image counts as one; a PNG has to be an APNG."""

    def __init__(self, image: PilImage.Image, meter: DecodeMeter) -> None:
        self._image, self._meter = image, meter
        # The image that an APNG shows where animations are not supported need not belong to the animation.
        self._hidden = 1 if getattr(image, "default_image", False) else 0
        meter.check_size(*image.size)
        with pillow_errors(meter.name):
            self.num_frames: int = getattr(image, "n_frames", 1) - self._hidden
        meter.check_frames(self.num_frames)

    @classmethod
    def open(cls, stream: MeteredStream, meter: DecodeMeter) -> Animation | None:
        """The animation in `stream`, or None when its format is not one of images. Raises MediaError on still ones."""
        head = stream.read(16)
        stream.seek(0)
        if head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS:
            raise _still(meter.name, head[8:12].decode("ascii").upper())
        with pillow_errors(meter.name):
            try:
                image = PilImage.open(cast("IO[bytes]", stream), formats=("GIF", "PNG", "WEBP", *_STILLS))
            except UnidentifiedImageError:
                return None
            kind = image.format or ""
            if kind in _STILLS or (kind == "PNG" and image.get_format_mimetype() != "image/apng"):
                raise _still(meter.name, kind)
        return cls(image, meter)

    def read(self, wanted: list[int], keep: Callable[[PilImage.Image], PilImage.Image]) -> dict[int, PilImage.Image]:
        """The frames `wanted` (ascending) in RGB, alpha dropped as `open_image` does it, and each passed to `keep`.

        Each frame builds on the one before, so every frame up to the last wanted one is decoded. The last frame of all
        is decoded too: it is what a file cut short lacks. Raises MediaError naming the frame.
        """
        frames: dict[int, PilImage.Image] = {}
        for index in range(self.num_frames):
            field = f"frame {index} of {self.num_frames}"
            with pillow_errors(self._meter.name, field):
                self._image.seek(index + self._hidden)
                # Frames of a GIF that reach beyond its canvas enlarge it.
                self._meter.count_frame(*self._image.size)
                self._image.load()
            if index in wanted:
                frame = decode_image(self._image, self._meter.name, field=field, limits=self._meter.limits)
                frames[index] = keep(frame)
        return frames


def _still(name: str, kind: str) -> MediaError:
    return MediaError(f"a still image ({kind}), not a video", file=name, hint="give it as an image")
