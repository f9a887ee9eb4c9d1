"""Load images from paths, bytes, URLs, archives and PIL objects as RGB. Problems raise MediaError naming the image."""

from __future__ import annotations

import io
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image as PilImage
from PIL import ImageFile, TiffImagePlugin, UnidentifiedImageError
from PIL.Image import Transpose

from vila.core.errors import MediaError, VilaError
from vila.core.reading import foreign_content
from vila.core.types import Image, MediaRef
from vila.media.container import jpeg_scans
from vila.media.http import data_url_bytes, fetch, redact_url
from vila.media.limits import DEFAULT_LIMITS, IsCancelled, MediaLimits, Readable, never

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def open_source(
    source: Path | str | bytes | MediaRef,
    what: str,
    *,
    base: Path | None = None,
    allow_private: bool = False,
    allowed_domains: Sequence[str] = (),
    max_bytes: int = DEFAULT_LIMITS.image_bytes,
    timeout_s: float = DEFAULT_LIMITS.image_fetch_s,
    cancelled: IsCancelled = never,
) -> tuple[IO[bytes], str]:
    """Open encoded media. Returns a stream and the source's name for messages.

    what:                 expected content for error messages, with its article: `an image`.
    base:                 directory that relative paths are resolved against.
    max_bytes, timeout_s: limits for URLs; files may have any size.
    allow_private, allowed_domains, cancelled: see `fetch`.
    """
    if isinstance(source, bytes):
        return io.BytesIO(source), f"<{len(source)} bytes>"
    if isinstance(source, MediaRef):
        return io.BytesIO(source.read()), source.name
    if isinstance(source, str) and source[:5].lower() == "data:":
        return io.BytesIO(data_url_bytes(source, max_bytes=max_bytes)), redact_url(source)
    if isinstance(source, str) and _URL.match(source):
        content = fetch(
            source,
            max_bytes=max_bytes,
            timeout_s=timeout_s,
            allow_private=allow_private,
            allowed_domains=allowed_domains,
            cancelled=cancelled,
        )
        return io.BytesIO(content), redact_url(source)
    path = Path(source) if base is None else base / source
    return _open_path(path, what), str(path)


@dataclass(frozen=True, slots=True)
class LoadedMedia:
    """Encoded media in memory; `name` is for messages."""

    name: str
    content: bytes

    def read(self) -> bytes:
        """Return the encoded bytes."""
        return self.content


def _open_path(path: Path, what: str) -> IO[bytes]:
    name = str(path)[:200]
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return path.open("rb")
    except FileNotFoundError as error:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise MediaError(f"no such file{where}", file=name, hint="check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise MediaError(f"cannot be opened ({reason})", file=repr(name)) from error
    kind = "a directory" if stat.S_ISDIR(mode) else "a special file"
    raise MediaError(f"{kind}, not {what}", file=name, hint="give the path of one file")


# Other Pillow plugins run a program (EPS) or accept nearly any file (TGA).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
_READABLE = "JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000 or AVIF"
_COPY_AGAIN = "the file may be damaged or truncated: copy it again"


def open_image(
    image: Image,
    *,
    base: Path | None = None,
    allow_private: bool = False,
    limits: MediaLimits = DEFAULT_LIMITS,
    exif_orientation: bool = True,
) -> PilImage.Image:
    """Decode an image to RGB.

    base:             directory that relative paths are resolved against.
    allow_private:    also fetch URLs from private addresses.
    limits:           larger images are rejected before decoding; Pillow's own pixel limit applies too.
    exif_orientation: apply the EXIF orientation; docs/images.md lists which caller passes which value.

    As in the released code, the alpha channel is dropped (not blended), an animation yields its first frame, and CMYK
    and palettes are converted by Pillow. Unlike it, a truncated file raises an error instead of being filled with grey,
    and values of more than 8 bits are scaled instead of clipped (see `_to_bytes`). The result has no EXIF.
    Thread-safe. `PIL.ImageFile.LOAD_TRUNCATED_IMAGES`, if the process sets it, still admits truncated files.
    Raises MediaError.
    """
    source = image.source
    if isinstance(source, PilImage.Image):
        return decode_image(source, image.name, limits=limits, exif_orientation=exif_orientation)
    stream, name = open_source(
        source,
        "an image",
        base=base,
        allow_private=allow_private,
        max_bytes=limits.image_bytes,
        timeout_s=limits.image_fetch_s,
    )
    with stream, _open(stream, name) as opened:
        check_size(opened.size, name, limits)
        if opened.format in ("JPEG", "MPO"):
            check_scans(stream, name, limits)
        with pillow_errors(name):
            scaled = _scale_16_bit_colour(opened, stream)
        return decode_image(scaled, name, limits=limits, exif_orientation=exif_orientation)


def decode_image(
    image: PilImage.Image,
    name: str,
    *,
    field: str | None = None,
    limits: MediaLimits = DEFAULT_LIMITS,
    exif_orientation: bool = True,
) -> PilImage.Image:
    """Decode an image that Pillow has opened to RGB; see `open_image`. name, field: for errors."""
    check_size(image.size, name, limits)
    with pillow_errors(name, field):
        image.load()
        turn = _TURNS.get(_orientation(image)) if exif_orientation else None
        rgb = _to_rgb(image, name, field)
        for key in _METADATA:
            rgb.info.pop(key, None)  # so that the orientation is not applied twice
        return rgb if turn is None else rgb.transpose(turn)


def check_size(size: tuple[int, int], name: str, limits: MediaLimits) -> None:
    """Raise MediaError if an image has no pixels, too many pixels, or too long a side. size: (width, height)."""
    width, height = size
    if min(size) < 1:
        raise MediaError("no pixels", file=name, value=size)
    if width * height > limits.image_pixels or max(size) > limits.side:
        is_many = width * height > limits.image_pixels
        raise MediaError(
            "too many pixels" if is_many else "a side is too long",
            file=name,
            field="image_pixels" if is_many else "side",
            value=size,
            expected=f"at most {limits.image_pixels:,} pixels" if is_many else f"at most {limits.side:,} on a side",
            hint="resize it" if is_many else "split it",
        )


def check_scans(stream: Readable, name: str, limits: MediaLimits) -> None:
    """Raise MediaError if a JPEG image has too many scans. The stream position is unchanged."""
    position = stream.tell()
    if jpeg_scans(stream, limits.jpeg_scans) > limits.jpeg_scans:
        expected = f"at most {limits.jpeg_scans}"
        raise MediaError("too many scans", file=name, field="jpeg_scans", expected=expected, hint="encode it again")
    stream.seek(position)


def encoded_size(content: bytes) -> tuple[int, int] | None:
    """Return (width, height) from the header of an encoded image; None if Pillow does not recognize it."""
    try:
        with _open(io.BytesIO(content), "") as opened:
            return opened.size
    except MediaError:
        return None


def orientation_of(content: bytes) -> int:
    """Return the EXIF orientation of an encoded image, 1 to 8; 1 (upright) if Pillow does not recognize it."""
    try:
        with _open(io.BytesIO(content), "") as opened:
            return _orientation(opened)
    except MediaError:
        return 1


def _open(stream: IO[bytes], name: str) -> ImageFile.ImageFile:
    head = stream.read(64)
    if not head:
        raise MediaError("empty file", file=name, hint="download or copy it again")
    stream.seek(0)
    with pillow_errors(name):
        try:
            return PilImage.open(stream, formats=_formats())
        except UnidentifiedImageError as error:
            raise _not_an_image(stream, head, name) from error


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    PilImage.init()
    return tuple(name for name in _FORMATS if name in PilImage.OPEN)


@contextmanager
def pillow_errors(name: str, field: str | None = None) -> Iterator[None]:
    """Convert any exception of Pillow to MediaError."""
    try:
        yield
    except (VilaError, MemoryError):
        raise
    except (PilImage.DecompressionBombError, PilImage.DecompressionBombWarning) as error:
        problem, hint = str(error).rstrip("."), "resize it"
        raise MediaError(problem, file=name, field="image_pixels", hint=hint) from error
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others for broken files.
        reason = str(error) or type(error).__name__
        raise MediaError(f"cannot be decoded ({reason})", file=name, field=field, hint=_COPY_AGAIN) from error


ORIENTATION = 0x0112
"""EXIF tag of the orientation."""
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""Transpositions by orientation; 1 is upright."""
_METADATA = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
"""Keys of `Image.info` that can contain an orientation."""


def _orientation(image: PilImage.Image) -> int:
    """Return the EXIF orientation, 1 to 8. Absent or broken EXIF and values out of range count as 1.

    For TIFF always 1: Pillow itself applies the orientation while decoding.
    """
    if image.format == "TIFF":
        return 1
    try:
        value = image.getexif().get(ORIENTATION)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - broken EXIF, see `pillow_errors`; the pixels are intact
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_rgb(image: PilImage.Image, name: str, field: str | None) -> PilImage.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image, name, field)
    elif image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.copy()
        del image.info["transparency"]  # dropped on purpose; Pillow would warn
    elif image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")  # Pillow cannot convert these to RGB directly
    elif image.mode == "LAB":
        raise MediaError("Pillow cannot convert its pixels to RGB", file=name, field="mode", value="LAB",
                         hint="convert it to RGB")  # fmt: skip
    return image.convert("RGB")


_DEPTHS = (8, 10, 12, 14, 16)


def _to_bytes(values: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
    """Scale integers from 0 to 65,535 to bytes: the high 8 bits of the smallest depth that holds the largest value.

    Depths are 8, 10, 12, 14 and 16 bits, those of cameras and scanners. So an 8 or 12-bit image stored with 16 bits
    does not turn black, and a true 16-bit image keeps its high byte, as Pillow reads 16-bit colour. The depth is chosen
    per image: two images of one series may be scaled differently.
    """
    high = int(values.max())
    depth = next(depth for depth in _DEPTHS if high < 1 << depth)
    return (values >> (depth - 8)).astype(np.uint8)


def _eight_bits(image: PilImage.Image, name: str, field: str | None) -> PilImage.Image:
    """Scale grey values of more than 8 bits to bytes. Pillow's own conversion clips values above 255 to white.

    Integers of 16 or 32 bits, signed or not, are scaled by `_to_bytes`. Floats are in 0..1, or in 0..255 if any is
    above 1. Raises MediaError for values outside these ranges.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    limit = 255 if image.mode == "F" else 65_535
    if not (low >= 0 and high <= limit):
        raise MediaError(
            f"grey values from {low} to {high}",
            file=name,
            field="mode",
            value=image.mode,
            expected=f"values from 0 to {limit}",
            hint="convert it to 8 bits",
        )
    if image.mode == "F":
        return PilImage.fromarray((np.rint(values * 255) if high <= 1 else values).astype(np.uint8))
    return PilImage.fromarray(_to_bytes(values))


_SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_ALL_DEPTHS_BUT_16 = 1 << _DEPTHS[-2] - 8


def _scale_16_bit_colour(opened: ImageFile.ImageFile, stream: IO[bytes]) -> PilImage.Image:
    """Apply the scaling of `_to_bytes` to an image with 16 bits per colour; return any other image unchanged.

    Pillow keeps only the high bytes of 16-bit colour. If these show that all values fit in 14 bits, the low bytes are
    read too, by decoding a second time in the other byte order.
    """
    rawmodes = {_rawmode(tile) for tile in opened.tile}
    rawmode = rawmodes.pop() if len(rawmodes) == 1 else ""
    if rawmode[:-1] not in ("RGB;16", "RGBA;16", "RGBX;16", "LA;16"):
        return opened
    opened.load()
    high = np.asarray(opened.convert("RGB"))
    if high.max() >= _ALL_DEPTHS_BUT_16:
        return opened
    stream.seek(0)
    with PilImage.open(stream, formats=[opened.format or ""]) as again:
        # The four bytes of an LA;16 pixel read as RGBA: grey high, grey low, alpha high, alpha low.
        other = "RGBA" if rawmode == "LA;16B" else rawmode[:-1] + _SWAPPED[rawmode[-1]]
        again.tile = [_with_rawmode(tile, other) for tile in again.tile]
        again.load()
        low = np.asarray(again)[..., 1:2] if other == "RGBA" else np.asarray(again.convert("RGB"))
    scaled = PilImage.fromarray(_to_bytes(high.astype(np.uint16) << 8 | low))
    scaled.info = opened.info
    return scaled


# A tile of Pillow is (codec, box, offset, args), a named tuple since Pillow 11.
def _rawmode(tile: Any) -> str:
    """Return the raw mode that a tile's decoder unpacks: `RGB;16B`, ..."""
    args = tile[3]
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _with_rawmode(tile: Any, rawmode: str) -> Any:
    args = (rawmode, *tile[3][1:]) if isinstance(tile[3], tuple) else rawmode
    return tile._replace(args=args) if hasattr(tile, "_replace") else (*tile[:3], args)


_MAGIC = {b"\x89PNG": "PNG", b"\xff\xd8": "JPEG", b"GIF8": "GIF", b"RIFF": "WebP", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
_UNSUPPORTED = ("unknown pixel mode", "unknown data organization")


def _not_an_image(stream: IO[bytes], head: bytes, name: str) -> MediaError:
    """Return the error for a file that Pillow does not identify, by its first bytes."""
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")
    if kind == "TIFF" and (unsupported := _unsupported_tiff(stream)):
        problem = "TIFF pixel layout that Pillow does not support; the file itself may be valid"
        hint = "convert it to RGB with 8 bits per sample"
        return MediaError(problem, file=name, field="BitsPerSample", value=unsupported, hint=hint)
    if kind:
        problem = f"not an image (starts like {kind}, but its header is damaged or truncated)"
        return MediaError(problem, file=name, hint="download or copy it again")
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
        return MediaError("HEIC images are not supported", file=name, hint="convert it to JPEG or PNG")
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.lower().startswith((b"<svg", b"<?xml")):
        problem, hint = f"not an image (starts with {_quoted(start)})", "if it is an SVG drawing, convert it to PNG"
        return MediaError(problem, file=name, hint=hint)
    if known := foreign_content(start):
        return MediaError(f"not an image ({known[0]})", file=name, hint=known[1])
    return MediaError(f"not an image (starts with {_quoted(start or head)})", file=name, expected=_READABLE)


def _unsupported_tiff(stream: IO[bytes]) -> tuple[int, ...] | None:
    """Return the bits per sample of a complete TIFF file whose pixel layout Pillow does not support; else None."""
    stream.seek(0)
    try:
        TiffImagePlugin.TiffImageFile(stream)
        return None
    except SyntaxError as error:
        if str(error) not in _UNSUPPORTED:
            return None
    stream.seek(0)
    directory = TiffImagePlugin.ImageFileDirectory_v2(stream.read(8))
    stream.seek(directory.next)
    directory.load(stream)
    offsets = directory.get(TiffImagePlugin.STRIPOFFSETS) or directory.get(TiffImagePlugin.TILEOFFSETS) or ()
    sizes = directory.get(TiffImagePlugin.STRIPBYTECOUNTS) or directory.get(TiffImagePlugin.TILEBYTECOUNTS) or ()
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=False)]
    is_complete = bool(ends) and max(ends) <= stream.seek(0, io.SEEK_END)
    bits = directory.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
    return (bits if isinstance(bits, tuple) else (bits,)) if is_complete else None


def _quoted(start: bytes) -> str:
    text = start[:9].decode("latin-1")
    return repr(text if start.isascii() and text.isprintable() else start[:8])
