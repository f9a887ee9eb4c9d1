"""The one pixel transform: an RGB picture becomes the tower's float32 array. Equal to the CLIP and SigLIP processors.

The reference is transformers' PIL backend behind the original's `image_aspect_ratio`, with Pillow 13.
Two liberties that change no byte: what a constant border or a crop makes needless is not computed, and normalising
is a table of 256 values a channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image as PilImage

from vila.core.errors import UnknownNameError
from vila.core.vision_spec import IMAGE_MODES, VisionSpec
from vila.media.resample import resample_lines

Pixels = npt.NDArray[np.float32]

_BICUBIC = PilImage.Resampling.BICUBIC
# Pixels of an intermediate picture. Above, the part that is needed is computed without building the whole.
_MAX_CANVAS = 1 << 25


def pixels(image: PilImage.Image, spec: VisionSpec) -> Pixels:
    """The float32 array [3, S, S] that the vision tower reads, S = `spec.image_size`.

    image: RGB; `vila.media.image.open_image` makes one.
    `pad` centres the picture on a square of the mean colour and resizes it, `resize` ignores the aspect, `square`
    resizes the short edge and crops the centre, or is `resize` for a tower whose processor crops nothing. All are
    bicubic and antialiased, and round to bytes as Pillow does.
    """
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB picture, not {image.mode!r}; open it with vila.media.image.open_image")
    if spec.image_mode == "pad":
        # "pad" fills with the tower's mean colour, cut to a byte: (122, 116, 104) for CLIP.
        background = tuple(int(value * 255) for value in spec.mean)
        square = _pad(image, spec.image_size, background)
    elif spec.image_mode == "resize" or (spec.image_mode == "square" and not spec.center_crop):
        square = _resize(image, spec.image_size, spec.image_size)
    elif spec.image_mode == "square":
        square = _center_crop(image, spec.image_size)
    else:
        raise UnknownNameError("image mode", spec.image_mode, IMAGE_MODES)
    table = _normalised_bytes(tuple(spec.mean), tuple(spec.std))
    out = np.empty((3, spec.image_size, spec.image_size), np.float32)
    for channel, plane in enumerate(square.split()):
        # Indexing a plane of its own is four times as fast as np.take from strided bytes.
        out[channel] = table[channel][np.asarray(plane)]
    return out


def stack_pixels(arrays: Sequence[Pixels]) -> Pixels:
    """One array [N, 3, S, S] from N arrays [3, S, S], in their order. Raises ValueError when sizes differ or N is 0."""
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) != 1:
        raise ValueError(f"expected pictures of one shape to stack, got {shapes or 'none'}")
    return np.stack(arrays)


@lru_cache(maxsize=16)
def _normalised_bytes(mean: tuple[float, ...], std: tuple[float, ...]) -> Pixels:
    """float32 [3, 256]: the normalised value of every byte, by the arithmetic and in the order of transformers."""
    scaled = (np.arange(256).astype(np.float64) * (1 / 255)).astype(np.float32)
    table: Pixels = (scaled - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]
    table.setflags(write=False)
    return table


def _resize(image: PilImage.Image, width: int, height: int) -> PilImage.Image:
    """Bicubic and antialiased, one axis after the other, rounding to bytes after each."""
    between = (width, image.height) if _width_first(image.size, (width, height)) else (image.width, height)
    return image.resize(between, _BICUBIC).resize((width, height), _BICUBIC)


def _width_first(old: tuple[int, int], new: tuple[int, int]) -> bool:
    """The order of the two passes in Pillow 13, which the golden pictures were made with; (width, height) each.

    Pillow up to 12.1 always resized the width first; its pull request 9549 changed that for heights that shrink most.
    Rounding between the passes makes the orders differ by a little here and there, so ours is one in every version.
    A square to a square, thus `pad`, is width first in all of them.
    """
    return old[1] - new[1] <= max(0, 2 * (old[0] - new[0]))


def _pad(image: PilImage.Image, size: int, background: tuple[int, ...]) -> PilImage.Image:
    width, height = image.size
    side, left, top = max(width, height), max(0, height - width) // 2, max(0, width - height) // 2
    if width >= height:
        # A constant row stays constant, so only rows of the picture need the first pass.
        rows = image.resize((size, height), _BICUBIC)
        canvas = PilImage.new("RGB", (size, side), background)
        canvas.paste(rows, (0, top))
    elif side * side <= _MAX_CANVAS:
        canvas = PilImage.new("RGB", (side, side), background)
        canvas.paste(image, (left, 0))
    else:
        columns = np.asarray(image).transpose(1, 0, 2).reshape(width, height * 3)
        fill = np.tile(np.array(background, np.uint8), height)
        squeezed = resample_lines(columns, length=side, size=size, start=left, fill=fill)
        canvas = PilImage.fromarray(squeezed.reshape(size, height, 3).transpose(1, 0, 2))
    return _resize(canvas, size, size)


def _center_crop(image: PilImage.Image, size: int) -> PilImage.Image:
    """Short edge to `size`, long edge in proportion, rounded down; then the central square, half pixels to the left."""
    width, height = image.size
    long_edge = int(size * max(width, height) / min(width, height))
    edge = (long_edge - size) // 2
    # Each pass treats its lines alone, so what the crop drops need not take part in the second.
    if width >= height:
        return (
            image.resize((long_edge, height), _BICUBIC)
            .crop((edge, 0, edge + size, height))
            .resize((size, size), _BICUBIC)
        )
    if _width_first(image.size, (size, long_edge)):
        image = image.resize((size, height), _BICUBIC)
    if image.width * long_edge <= _MAX_CANVAS:
        rows = image.resize((image.width, long_edge), _BICUBIC).crop((0, edge, image.width, edge + size))
    else:
        lines = np.asarray(image).reshape(height, image.width * 3)
        kept = resample_lines(lines, length=height, size=long_edge, first=edge, count=size)
        rows = PilImage.fromarray(kept.reshape(size, image.width, 3))
    return rows.resize((size, size), _BICUBIC)
