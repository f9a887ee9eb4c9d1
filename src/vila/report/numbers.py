"""Numbers as text for readers: grouped digits, percentages, durations."""

from __future__ import annotations

import math

MISSING = "\N{EN DASH}"
"""Text for a value that is None or not finite."""


def write_number(value: float) -> str:
    """Return a number with four significant digits or grouped thousands: 12,345 and 0.0123."""
    if not math.isfinite(value):
        return MISSING
    size = abs(value)
    if size and not 1e-4 <= size < 1e12:
        mantissa, _, power = f"{size:.3g}".partition("e")
        text = f"{mantissa}e{int(power)}" if power else mantissa
    elif isinstance(value, int) or size >= 1000 or size == round(size):
        text = f"{size:,.0f}"
    else:
        text = f"{size:.4g}"
    return f"\N{MINUS SIGN}{text}" if value < 0 else text


def write_percent(fraction: float) -> str:
    """Return a fraction as a percentage with a no-break space: 0.976 becomes 97.6 %."""
    return f"{100 * fraction:.1f}\N{NO-BREAK SPACE}%" if math.isfinite(fraction) else MISSING


def write_seconds(seconds: float) -> str:
    """Return a duration: 0.42 s, 42 s, 6 min 42 s, 2 h 5 min; only the space between two units may break."""
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
