"""Opening a picture: from a path, bytes, a URL or PIL, to RGB. Whatever is wrong becomes a MediaError naming it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image as PilImage
from PIL import UnidentifiedImageError

from vila.core.errors import MediaError
from vila.core.types import Image
from vila.media.source import open_source

MAX_PIXELS = 178_956_970
"""Where Pillow itself speaks of a bomb; it warns from half of this on."""
MAX_SIDE = 65_535
"""The longest side of a JPEG file. A 1 x 100,000,000 picture holds few pixels, but its padded square does not."""

# Others run a program (EPS), or accept nearly any file (TGA).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
_READABLE = "JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000 or AVIF"


def open_image(
    image: Image, *, base: Path | None = None, allow_private: bool = False, max_pixels: int = MAX_PIXELS
) -> PilImage.Image:
    """The picture in RGB, decoded, in memory of its own.

    base:          the folder that a relative path starts from.
    allow_private: also fetch URLs from this machine and its network.
    max_pixels:    refuse larger pictures before decoding them; Pillow's own limit holds besides.

    As in the original, the alpha channel is dropped (not blended), EXIF orientation is ignored, an animation gives its
    first frame, and CMYK and palettes are converted as Pillow does. Unlike the original: a truncated file is refused,
    not filled with grey; and values of more than 8 bits are scaled, not clipped to white (see `_eight_bits`).
    Raises MediaError naming the picture, the reason and what to do. Touches no global state, so threads may call it;
    a process that sets `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` gets truncated files all the same.
    """
    source = image.source
    if isinstance(source, PilImage.Image):
        return _decoded(source, image.name, max_pixels)
    stream, name = open_source(source, "an image", base=base, allow_private=allow_private)
    with stream:
        return _read(stream, name, max_pixels)


def _read(stream: IO[bytes], name: str, max_pixels: int) -> PilImage.Image:
    head = stream.read(64)
    if not head:
        raise MediaError(f"{name}: not an image (the file is empty); download or copy it again")
    stream.seek(0)
    try:
        opened = PilImage.open(stream, formats=_formats())
    except UnidentifiedImageError as error:
        raise MediaError(f"{name}: not an image ({_looks_like(head)})") from error
    except (PilImage.DecompressionBombError, PilImage.DecompressionBombWarning) as error:
        raise MediaError(f"{name}: {str(error).rstrip('.')}; shrink it first") from error
    except MemoryError:
        raise
    except Exception as error:
        raise _damaged(name, error) from error
    with opened:
        return _decoded(opened, name, max_pixels)


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    PilImage.init()
    return tuple(name for name in _FORMATS if name in PilImage.OPEN)


def _decoded(picture: PilImage.Image, name: str, max_pixels: int) -> PilImage.Image:
    width, height = picture.size
    if width * height > max_pixels:
        raise MediaError(
            f"{name}: {width} x {height} = {width * height:,} pixels, over the limit of {max_pixels:,}; shrink it first"
        )
    if max(width, height) > MAX_SIDE:
        raise MediaError(f"{name}: {width} x {height}, with a side over {MAX_SIDE:,} pixels; cut it into parts")
    if min(width, height) < 1:
        raise MediaError(f"{name}: {width} x {height} holds no pixels")
    try:
        picture.load()
        if picture.mode == "I" or picture.mode == "F" or picture.mode.startswith("I;16"):
            picture = _eight_bits(picture, name)
        elif picture.mode == "P" and isinstance(picture.info.get("transparency"), bytes):
            picture = picture.copy()
            del picture.info["transparency"]  # Pillow would warn that it is dropped; it is meant to be
        return picture.convert("RGB")
    except (MediaError, MemoryError):
        raise
    except Exception as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> MediaError:
    # Pillow's decoders raise almost anything on a broken file: OSError, SyntaxError, ValueError, struct.error, ...
    reason = str(error) or type(error).__name__
    return MediaError(f"{name}: cannot be decoded ({reason}); it may be damaged or cut short, copy it again")


def _eight_bits(picture: PilImage.Image, name: str) -> PilImage.Image:
    """Grey values of more than 8 bits as bytes. Pillow's own conversion clips: all above 255 turns white.

    16-bit values keep their high byte, as Pillow itself reads 16-bit colour. 32-bit integers are taken for 16-bit ones
    (that is how Pillow opens a 16-bit PGM) unless all fit a byte. Floats are 0..1, or 0..255 where any is above 1.
    """
    values = np.asarray(picture)
    low, high = values.min(), values.max()
    limit = 255 if picture.mode == "F" else 65_535
    if not (low >= 0 and high <= limit):
        raise MediaError(f"{name}: grey values from {low} to {high}, expected 0 to {limit}; convert it to 8 bits")
    if picture.mode == "F":
        values = np.rint(values * 255) if high <= 1 else values
    elif picture.mode != "I" or high > 255:
        values = values >> 8
    return PilImage.fromarray(values.astype(np.uint8))


_MAGIC = {b"\x89PNG": "PNG", b"\xff\xd8": "JPEG", b"GIF8": "GIF", b"RIFF": "WebP", b"II*\0": "TIFF", b"MM\0*": "TIFF"}


def _looks_like(head: bytes) -> str:
    """What the first bytes say about a file that is no image, and what to do about it."""
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return f"starts like {kind}, but its header is damaged or cut short; download or copy it again"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; run `git lfs pull`"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
        return "HEIC; convert it to JPEG or PNG"
    if start.lower().startswith((b"<svg", b"<?xml")):
        return f"starts with {_quoted(start)}; if it is a drawing, convert it to PNG"
    if start.lower().startswith((b"<!doctype", b"<html")):
        return f"starts with {_quoted(start)}: a web page; give the address of the picture itself"
    return f"starts with {_quoted(start or head)}; expected {_READABLE}"


def _quoted(start: bytes) -> str:
    text = start[:9].decode("latin-1")
    return repr(text if start.isascii() and text.isprintable() else start[:8])
