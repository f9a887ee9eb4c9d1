"""Axes and numbers: which values to mark, where they fall, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

MISSING = "\N{EN DASH}"
_HUGE = 1e100
_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, slots=True)
class Axis:
    """A straight or logarithmic map from values `low`..`high` to pixels `start`..`end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """The pixel of `value`; on a logarithmic axis `value` must be positive."""
        if self.log:
            share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def can_place(value: float | None, log: bool = False) -> TypeGuard[float]:
    """Whether an axis can show `value`: finite, below 1e100, and on a logarithmic axis above 1e-100."""
    return value is not None and abs(value) < _HUGE and (value > 1 / _HUGE or not log)


def span(values: Iterable[float], log: bool = False) -> tuple[float, float]:
    """The ends of an axis that holds the `values` that can be placed, with some air; always low < high.

    A straight axis starts at zero when zero is near.
    """
    kept = [v for v in values if can_place(v, log)]
    low, high = (min(kept), max(kept)) if kept else (0.1, 1.0)
    if log:
        return (low, high) if high > 1.1 * low else (low / 1.5, high * 1.5)
    if max(abs(low), abs(high)) < 1 / _HUGE:
        return 0.0, 1.0
    if 0 <= low <= 0.35 * high:
        return 0.0, high
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return low - abs(low) / 10, high + abs(high) / 10
    air = (high - low) / 20
    return low - air, high + air


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values inside low..high, 1, 2 or 5 times a power of ten apart; some `about` of them."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 5) if m * power >= raw * 0.999), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Dividing by the whole number 1 / step keeps 0.3 from becoming 0.30000000000000004.
    inverse = round(1 / step) if 1e-12 < step < 1 else 0
    return [n / inverse if inverse else n * step for n in range(first, last + 1)]


def log_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values inside low..high for a logarithmic axis: 1-2-5 steps, or powers of ten over many decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d * (1 + 1e-9) <= high * (1 + 2e-9)]
        if len(ticks) <= 2 * about - 2:
            break
    else:
        ticks = ticks[:: math.ceil(len(ticks) / about)]
    return ticks if len(ticks) >= 3 else linear_ticks(low, high, about)


def write_ticks(ticks: Sequence[float], log: bool = False) -> list[str]:
    """Short labels: one unit and, on a straight axis, one number of decimals for all. 0, 20k, 40k; 0.5, 1.0, 1.5."""
    biggest = max(map(abs, ticks), default=0.0)
    smallest = min((abs(t) for t in ticks if t), default=1.0)
    if biggest >= 1e12 or smallest < 1e-6:
        return [_exponent(t) for t in ticks]
    scale, unit = next(((s, u) for s, u in _UNITS if biggest >= 10 * s), (1.0, ""))
    scaled = [t / scale for t in ticks]
    digits = [_decimals(v) for v in scaled]
    if not log:
        digits = [max(digits, default=0)] * len(digits)
    return [
        "0" if not value else f"{value:.{places}f}{unit}".replace("-", "\N{MINUS SIGN}")
        for value, places in zip(scaled, digits, strict=True)
    ]


def write_number(value: float) -> str:
    """A number for a reader: 12,345 and 0.0123; four digits that count; a dash for what is not finite."""
    if not math.isfinite(value):
        return MISSING
    size = abs(value)
    if size and not 1e-4 <= size < 1e12:
        text = _exponent(size)
    elif isinstance(value, int) or size >= 1000 or size == round(size):
        text = f"{size:,.0f}"
    else:
        text = f"{size:.4g}"
    return f"\N{MINUS SIGN}{text}" if value < 0 else text


def write_percent(share: float, places: int = 1) -> str:
    """A fraction as a percentage: 0.976 becomes 97.6 %, the space being one that does not break."""
    return f"{100 * share:.{places}f}\N{NO-BREAK SPACE}%" if math.isfinite(share) else MISSING


def write_seconds(seconds: float) -> str:
    """A duration: 0.42 s, 42 s, 6 min 42 s, 2 h 5 min; lines break only between hours, minutes and seconds."""
    if not math.isfinite(seconds):
        return MISSING
    gap = "\N{NO-BREAK SPACE}"
    if seconds < 10:
        return f"{seconds:.2g}{gap}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{gap}s"
    if whole < 3600:
        return f"{whole // 60}{gap}min" + (f" {whole % 60}{gap}s" if whole % 60 else "")
    return f"{whole // 3600}{gap}h" + (f" {whole % 3600 // 60}{gap}min" if whole % 3600 // 60 else "")


def _decimals(value: float) -> int:
    return next((n for n in range(9) if abs(round(value, n) - value) <= 1e-9 * abs(value)), 9)


def _exponent(value: float) -> str:
    mantissa, _, power = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(power)}" if power else mantissa
