"""How downloaded pictures are stored: as they came, or shrunk to the short side that the tower needs."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

from PIL import Image as PilImage
from PIL import UnidentifiedImageError

from vila.core.errors import ConfigError
from vila.core.types import Image
from vila.media.image import ORIENTATION, open_image, orientation_of
from vila.media.limits import DEFAULT_LIMITS
from vila.prepare.spool import Picture

MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded; with one decoder per core that bounds the memory."""

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_FORMATS = ("JPEG", "PNG", "WEBP")


@dataclass(frozen=True, slots=True)
class ResizeRule:
    """Shrink pictures whose short side is over `short_side` pixels to it, bicubic, as JPEG. `None` loses nothing.

    The original shrinks to 336 and writes JPEG at Pillow's quality of 75, whatever came. Ours writes 90, and a JPEG,
    PNG or WebP that is small enough keeps its bytes; where nothing may be lost, other formats become PNG. A tower that
    sees more than 336 pixels needs a larger short side.
    """

    short_side: int | None = 336
    quality: int = 90

    @property
    def facts(self) -> dict[str, int | None]:
        """The rule as settings that are stored."""
        return {"short_side": self.short_side, "quality": self.quality}

    def __post_init__(self) -> None:
        if self.short_side is not None and self.short_side < 1:
            raise ConfigError(f"resize.short_side: {self.short_side}; expected a number of pixels, or none")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"resize.quality: {self.quality}; expected 1 to 100")


SHORT_SIDE_336 = ResizeRule()
KEEP = ResizeRule(short_side=None)


def stored_picture(content: bytes, rule: ResizeRule, max_pixels: int = MAX_PIXELS) -> Picture:
    """A downloaded image as it will be stored. It is decoded in any case: what does not decode is no image.

    Pixels are stored as they came. An image that is encoded anew keeps its EXIF orientation, and no other EXIF, so that
    training decides whether to turn it. Raises MediaError saying what is wrong with it.
    """
    picture = open_image(
        Image(content), exif_orientation=False, limits=replace(DEFAULT_LIMITS, image_pixels=max_pixels)
    )
    size = shrunk_size(picture.size, rule.short_side)
    extension = _extension(content)
    if size == picture.size and extension:
        return Picture(content, extension)
    if size != picture.size:
        picture = picture.resize(size, PilImage.Resampling.BICUBIC)
    stream, metadata = io.BytesIO(), {}
    if (orientation := orientation_of(content)) != 1:
        metadata["exif"] = PilImage.Exif()
        metadata["exif"][ORIENTATION] = orientation
    if rule.short_side is None:
        picture.save(stream, "PNG", **metadata)
        return Picture(stream.getvalue(), "png")
    picture.save(stream, "JPEG", quality=rule.quality, **metadata)
    return Picture(stream.getvalue(), "jpg")


def shrunk_size(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """(width, height) in pixels after the rule; the aspect is kept to the nearest pixel.

    >>> shrunk_size((1000, 500), 336)
    (672, 336)
    """
    short = min(size)
    if short_side is None or short <= short_side:
        return size
    width, height = (max(short_side, round(side * short_side / short)) for side in size)
    return width, height


def _extension(content: bytes) -> str:
    try:
        with PilImage.open(io.BytesIO(content), formats=_FORMATS) as picture:
            return _EXTENSIONS.get(picture.format or "", "")
    except UnidentifiedImageError:
        return ""
