"""Pillow's bicubic resampling along one axis, byte for byte, of the needed part of a line too long to build."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

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
