"""Pictures inside a page: thumbnails as data URIs."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from vila.core.errors import MediaError

MAX_SIDE = 320  # pixels; twice the width of a card, for screens of double density
_QUALITY = 80
TINY_SIDE = 128  # pixels; pictures up to here are enlarged in whole squares rather than blurred


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A picture as a data URI; `tiny` ones are shown enlarged, pixel by pixel."""

    uri: str
    width: int
    height: int
    tiny: bool


def embed(source: Image.Image | Path | str | bytes, photo: bool = False) -> Thumbnail:
    """A thumbnail of a PIL image, a file or encoded bytes, turned as its EXIF says, at most MAX_SIDE on a side.

    photo: JPEG, a fifth of the size, for all but tiny and transparent pictures; otherwise PNG.
    Raises MediaError naming the file when it cannot be read.
    """
    if isinstance(source, Image.Image):
        picture = source
    else:
        name = f"<{len(source)} bytes>" if isinstance(source, bytes) else str(source)
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
                opened.load()
                picture = opened
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
            raise MediaError(f"{name}: cannot be shown in the report ({error})") from error
    picture = ImageOps.exif_transpose(picture)
    has_alpha = "A" in picture.getbands() or "transparency" in picture.info
    picture = picture.convert("RGBA" if has_alpha else "RGB")
    tiny = max(picture.size) <= TINY_SIDE
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    # A new image leaves EXIF and other metadata of the original behind.
    clean = Image.new(picture.mode, picture.size)
    clean.paste(picture)
    kind = "jpeg" if photo and not (tiny or has_alpha) else "png"
    clean.save(stream, format=kind, optimize=True, **({"quality": _QUALITY} if kind == "jpeg" else {}))
    uri = f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
    return Thumbnail(uri, picture.width, picture.height, tiny)
