"""Animations that Pillow reads: GIF, APNG and animated WebP, one composed frame after the other."""

from __future__ import annotations

from typing import IO

from PIL import Image as PilImage
from PIL import UnidentifiedImageError

from vila.core.errors import MediaError
from vila.core.types import Image
from vila.media.image import open_image

_STILLS = ("JPEG", "BMP", "TIFF", "PPM", "JPEG2000")
# Pillow reads neither HEIC nor, in every build, AVIF; to FFmpeg they are clips of one frame.
_STILL_BRANDS = (b"avif", b"heic", b"heix", b"mif1")


class Animation:
    """An opened animation. A GIF or WebP of one picture counts as one; a PNG has to be an APNG."""

    def __init__(self, picture: PilImage.Image, name: str) -> None:
        self._picture, self._name = picture, name
        # The picture that an APNG shows where animations are not supported need not belong to the animation.
        self._hidden = 1 if getattr(picture, "default_image", False) else 0
        try:
            self.num_frames: int = getattr(picture, "n_frames", 1) - self._hidden
        except MemoryError:
            raise
        except Exception as error:
            raise MediaError(f"{name}: cannot be decoded ({_reason(error)}); {_COPY_AGAIN}") from error

    @classmethod
    def open(cls, stream: IO[bytes], name: str) -> Animation | None:
        """The animation in `stream`, or None when this is no format of pictures. Raises MediaError on other stills."""
        head = stream.read(16)
        stream.seek(0)
        if head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS:
            raise _still(name, head[8:12].decode("ascii").upper())
        try:
            picture = PilImage.open(stream, formats=("GIF", "PNG", "WEBP", *_STILLS))
        except UnidentifiedImageError:
            return None
        except (PilImage.DecompressionBombError, PilImage.DecompressionBombWarning) as error:
            raise MediaError(f"{name}: {str(error).rstrip('.')}; shrink it first") from error
        except MemoryError:
            raise
        except Exception as error:
            raise MediaError(f"{name}: cannot be decoded ({_reason(error)}); {_COPY_AGAIN}") from error
        kind = picture.format or ""
        if kind in _STILLS or (kind == "PNG" and picture.get_format_mimetype() != "image/apng"):
            raise _still(name, kind)
        return cls(picture, name)

    def read(self, wanted: list[int]) -> dict[int, PilImage.Image]:
        """The frames `wanted` (ascending) in RGB, alpha dropped as `open_image` does it; no others stay in memory.

        The last frame is decoded in any case: it is what a file cut short lacks. Raises MediaError naming the frame.
        """
        frames = {index: self._frame(index) for index in wanted}
        if self.num_frames - 1 not in frames:
            self._frame(self.num_frames - 1)
        return frames

    def _frame(self, index: int) -> PilImage.Image:
        try:
            self._picture.seek(index + self._hidden)
            return open_image(Image(self._picture))
        except MemoryError:
            raise
        except MediaError as error:
            raise MediaError(f"{self._name}: frame {index} of {self.num_frames}: {error}") from error
        except Exception as error:
            raise MediaError(
                f"{self._name}: frame {index} of {self.num_frames} cannot be decoded ({_reason(error)}); {_COPY_AGAIN}"
            ) from error


_COPY_AGAIN = "it may be damaged or cut short, copy it again"


def _reason(error: Exception) -> str:
    # Pillow's decoders raise almost anything on a broken file: OSError, SyntaxError, ValueError, struct.error, ...
    return str(error) or type(error).__name__


def _still(name: str, kind: str) -> MediaError:
    return MediaError(f"{name}: a still picture ({kind}), not a clip; give it as an Image")
