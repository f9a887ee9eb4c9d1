"""Transform of RGB images to the vision tower's float32 input, bit-equal to the CLIP and SigLIP processors.

The reference is transformers' PIL backend after the released code's `image_aspect_ratio`, with Pillow 13. The transform
has two halves, `square_bytes` and `normalise`: between processes and in shared memory, images are uint8, a quarter of
the size. Two optimizations keep the result bit-equal: pixels that a constant border or a crop makes unnecessary are not
computed, and bytes are converted to float in one division.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image as PilImage

from vila.core.errors import UnknownNameError
from vila.core.vision_spec import IMAGE_MODES, VisionSpec

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
    """Resample axis 0 from `length` to `size` positions; return positions `first` to `first + count` of the result.

    lines: uint8 [n, m], m independent lines: positions `start` to `start + n` of the source, whose other positions all
           have the value `fill`, uint8 [m].
    Returns uint8 [count, m], bit-equal to `PIL.Image.resize(..., BICUBIC)` of the full source, which is never built.
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
        # Integers below 2**53: float64 sums them exactly, in any order.
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
    """Return the first source position that contributes to `position` of the result, and the integer weights."""
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

_BICUBIC = PilImage.Resampling.BICUBIC
# Maximum pixels of an intermediate image; above, `resample_lines` computes the needed part only.
_MAX_CANVAS = 1 << 25


def pixels(image: PilImage.Image, spec: VisionSpec) -> Pixels:
    """Return the vision tower's input, float32 [3, S, S] with S = `spec.image_size`. image: RGB, see `open_image`."""
    return normalise(square_bytes(image, spec), spec)


def square_bytes(image: PilImage.Image, spec: VisionSpec) -> Bytes:
    """Resize an RGB image to a square, uint8 [3, S, S] with S = `spec.image_size`.

    `pad` centres the image on a square of the mean colour and resizes it; `resize` ignores the aspect ratio; `square`
    resizes the short edge and crops the centre, or equals `resize` for a tower whose processor does not crop. All are
    bicubic, antialiased, and rounded to bytes as in Pillow.
    """
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB image, got mode {image.mode!r}; use vila.media.image.open_image")
    if spec.image_mode == "pad":
        # "pad" fills with the tower's mean colour, truncated to a byte: (122, 116, 104) for CLIP.
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
    """Return a function that resizes an RGB image to the tower's square.

    `square_bytes` maps such a square to itself, so video frames can be resized while the video is decoded.
    """
    return lambda image: PilImage.fromarray(square_bytes(image, spec).transpose(1, 2, 0))


def normalise(squares: Bytes, spec: VisionSpec, out: Pixels | None = None) -> Pixels:
    """Normalise uint8 images [..., 3, S, S] to float32 of the same shape, written to `out` if given.

    Operations and their order are those of transformers, except that it multiplies by 1/255 in float64 and rounds to
    float32; for every byte that equals the float32 division by 255.
    """
    out = np.empty(squares.shape, np.float32) if out is None else out
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    # Plane by plane: one plane stays in the CPU cache over the four passes.
    for index in np.ndindex(squares.shape[:-2]):
        plane, channel = out[index], index[-1]
        plane[...] = squares[index]
        plane /= 255
        plane -= mean[channel]
        plane /= std[channel]
    return out


def _resize(image: PilImage.Image, width: int, height: int) -> PilImage.Image:
    """Resize with antialiased bicubic filtering, one axis after the other, rounding to bytes after each."""
    between = (width, image.height) if _width_first(image.size, (width, height)) else (image.width, height)
    if between != image.size:  # otherwise Pillow would copy it
        image = image.resize(between, _BICUBIC)
    return image.resize((width, height), _BICUBIC)


def _width_first(old: tuple[int, int], new: tuple[int, int]) -> bool:
    """Return whether Pillow 13, which made the golden images, resizes the width first; sizes are (width, height).

    Pillow up to 12.1 always did; pull request 9549 changed that for heights that shrink most. Because of the rounding
    between the passes, the order changes some bytes, so it is fixed here for all Pillow versions. Square to square, as
    in `pad`, is width first in all of them.
    """
    return old[1] - new[1] <= max(0, 2 * (old[0] - new[0]))


def _pad(image: PilImage.Image, size: int, background: tuple[int, ...]) -> PilImage.Image:
    width, height = image.size
    side, left, top = max(width, height), max(0, height - width) // 2, max(0, width - height) // 2
    if width >= height:
        # A constant row stays constant, so only the rows of the image need the first pass.
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
    """Resize the short edge to `size`, the long edge in proportion (rounded down), and crop the centre."""
    width, height = image.size
    long_edge = int(size * max(width, height) / min(width, height))
    edge = (long_edge - size) // 2
    # A pass processes each line independently, so the lines that the crop drops are left out of the second pass.
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
