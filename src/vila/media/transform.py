"""The one pixel transform: an RGB image becomes the tower's float32 array. Equal to the CLIP and SigLIP processors.

The reference is transformers' PIL backend behind the original's `image_aspect_ratio`, with Pillow 13.
It has two halves, so that a picture can travel between them as bytes, a quarter of the size. Two liberties change no
byte: what a constant border or a crop makes needless is not computed, and bytes become floats in one division.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image as PilImage

from vila.core.errors import UnknownNameError
from vila.core.vision_spec import IMAGE_MODES, VisionSpec

# --- resample
# Pillow's bicubic resampling along one axis, byte for byte, of the needed part of a line too long to build.


Bytes = npt.NDArray[np.uint8]

_BLOCK = 1 << 22  # float64 values held at once


def resample_lines(
    lines: Bytes,
    *,
    length: int,
    size: int,
    first: int = 0,
    count: int | None = None,
    start: int = 0,
    fill: Bytes | None = None,
) -> Bytes:
    """Resample axis 0 from `length` to `size` positions, and return positions `first` to `first + count` of the result.

    lines: uint8 [n, m], m independent lines side by side. They hold positions `start` to `start + n` of the source;
           every other position of it holds `fill`, uint8 [m].
    Returns uint8 [count, m]: what `PIL.Image.resize(..., BICUBIC)` makes of the whole source, without building it.
    """
    held, width = lines.shape
    count = size - first if count is None else count
    if fill is None and held != length:
        raise ValueError(f"{held} of {length} source positions are given, and no fill for the others")
    background = np.zeros(width, np.uint8) if fill is None else fill
    plan = [_weights(position, length, size) for position in range(first, first + count)]
    out = np.empty((count, width), np.uint8)
    block = max(1, _BLOCK // held)
    for left in range(0, width, block):
        part = slice(left, left + block)
        # Whole numbers below 2**53: float64 adds them without rounding, in any order.
        values = lines[:, part].astype(np.float64)
        constant = background[part].astype(np.float64)
        for row, (begin, weights) in enumerate(plan):
            low, high = max(begin, start), min(begin + len(weights), start + held)
            if low >= high:
                out[row, part] = background[part]
                continue
            inside = weights[low - begin : high - begin]
            total = inside @ values[low - start : high - start] + (weights.sum() - inside.sum()) * constant
            out[row, part] = np.clip(np.floor(total / (1 << _PRECISION) + 0.5), 0, 255)
    return out


# Pillow, src/libImaging/Resample.c: bicubic with a = -0.5, weights rounded to 22 bits, a byte after each axis.
_PRECISION = 22
_SUPPORT = 2.0


def _weights(position: int, length: int, size: int) -> tuple[int, npt.NDArray[np.float64]]:
    """The first source position that `position` of the result reads, and its weights as whole numbers."""
    scale = length / size
    filter_scale = max(scale, 1.0)
    support = _SUPPORT * filter_scale
    center = (position + 0.5) * scale
    begin = max(0, int(center - support + 0.5))
    end = min(length, int(center + support + 0.5))
    x = np.abs((np.arange(end - begin) + begin - center + 0.5) * (1.0 / filter_scale))
    near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    weights = weights / np.cumsum(weights)[-1]  # cumsum adds one by one, as Pillow does
    return begin, np.trunc(weights * (1 << _PRECISION) + np.where(weights < 0, -0.5, 0.5))


Pixels = npt.NDArray[np.float32]
transform_Bytes = npt.NDArray[np.uint8]

_BICUBIC = PilImage.Resampling.BICUBIC
# Pixels of an intermediate picture. Above, the part that is needed is computed without building the whole.
_MAX_CANVAS = 1 << 25


def pixels(image: PilImage.Image, spec: VisionSpec) -> Pixels:
    """The float32 array [3, S, S] that the vision tower reads, S = `spec.image_size`: `square_bytes`, normalised.

    image: RGB; `vila.media.image.open_image` makes one.
    """
    return normalise(square_bytes(image, spec), spec)


def square_bytes(image: PilImage.Image, spec: VisionSpec) -> transform_Bytes:
    """The picture made square at the tower's size, uint8 [3, S, S], S = `spec.image_size`.

    image: RGB.
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
    # Splitting in Pillow is faster than numpy's copy of a transposed array.
    return np.stack([np.asarray(plane) for plane in square.split()])


def shrinker(spec: VisionSpec) -> Callable[[PilImage.Image], PilImage.Image]:
    """A function that makes an RGB image square at the tower's size.

    `square_bytes` leaves such a square as it is, byte for byte, so frames of a video may be shrunk while it is decoded.
    """
    return lambda image: PilImage.fromarray(square_bytes(image, spec).transpose(1, 2, 0))


def normalise(squares: transform_Bytes, spec: VisionSpec, out: Pixels | None = None) -> Pixels:
    """What the tower reads of pictures [..., 3, S, S], uint8: float32 of the same shape, written to `out` if given.

    The arithmetic and its order are those of transformers, but for one step: it multiplies by 1/255 in float64 and
    rounds to float32, which for every byte is the byte divided by 255 in float32.
    """
    out = np.empty(squares.shape, np.float32) if out is None else out
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    # Plane by plane, as one stays in the processor's cache over the four passes.
    for place in np.ndindex(squares.shape[:-2]):
        plane, channel = out[place], place[-1]
        plane[...] = squares[place]
        plane /= 255
        plane -= mean[channel]
        plane /= std[channel]
    return out


def stack_pixels(arrays: Sequence[Pixels]) -> Pixels:
    """One array [N, 3, S, S] from N arrays [3, S, S], in their order. Raises ValueError when sizes differ or N is 0."""
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) != 1:
        raise ValueError(f"expected pictures of one shape to stack, got {shapes or 'none'}")
    return np.stack(arrays)


def _resize(image: PilImage.Image, width: int, height: int) -> PilImage.Image:
    """Bicubic and antialiased, one axis after the other, rounding to bytes after each."""
    between = (width, image.height) if _width_first(image.size, (width, height)) else (image.width, height)
    if between != image.size:  # otherwise Pillow would copy it
        image = image.resize(between, _BICUBIC)
    return image.resize((width, height), _BICUBIC)


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
