"""What plots are drawn with: escaped SVG elements, estimated text widths, and the frame that holds both renderings."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

# Attributes repeat the light colours that the page's style sheet names, so an SVG is legible by itself;
# inside a page the sheet's classes override them and follow the reader's light or dark preference.
LINE_COLOURS = ("#1d5fbf", "#c2610c", "#11806a", "#8a4bb5", "#b82f55", "#69707a")
BAR_COLOURS = ("#1d5fbf", "#8b929c", "#c6cbd1", "#c2610c", "#11806a", "#8a4bb5")
INK, MUTED, GRID, TRACK, PAPER = "#16191d", "#59606a", "#e4e7ea", "#f0f2f4", "#fdfdfd"

# XML knows no other control characters, and half of a surrogate pair has no encoding.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True, slots=True)
class Sheet:
    """One rendering of a plot: the size of its viewBox, which is its size on screen, and of its letters, in pixels."""

    name: str
    width: float
    height: float
    font: float


# Wide for screens, narrow for phones: letters stay legible only where a viewBox is shown near its own size.
WIDE = Sheet("wide", 760, 300, 12.5)
NARROW = Sheet("narrow", 358, 250, 12)


@dataclass(frozen=True, slots=True)
class Key:
    """One entry of a legend: the style class of its colour, the colour, a name, and an optional remark."""

    style: str
    colour: str
    name: str
    remark: str = ""


def printable(text: str) -> str:
    """`text` with the characters that neither XML nor UTF-8 can hold replaced by a mark."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def element(name: str, *children: str, **attributes: str | float) -> Markup:
    """An XML element. Children that are not Markup are escaped; attributes are written `stroke_width`, `class_`."""
    parts = "".join(f' {key.rstrip("_").replace("_", "-")}="{_write(value)}"' for key, value in attributes.items())
    inside = "".join(escape(printable(child)) if not isinstance(child, Markup) else child for child in children)
    return Markup(f"<{name}{parts}>{inside}</{name}>" if children else f"<{name}{parts}/>")


def text_element(words: str, x: float, y: float, *, size: float, strong: bool = False, anchor: str = "start") -> Markup:
    """A line of text; strong text has the colour of ink, the rest is muted."""
    return element(
        "text",
        words,
        class_="ink" if strong else "muted",
        x=x,
        y=y,
        font_size=size,
        text_anchor=anchor,
        fill=INK if strong else MUTED,
    )


def whisker(start: tuple[float, float], end: tuple[float, float]) -> list[Markup]:
    """An interval: a thin line between two places, level or upright, with a short bar across each end."""
    (x1, y1), (x2, y2) = start, end
    across = (0.0, 3.5) if y1 == y2 else (3.5, 0.0)
    lines = [(x1, y1, x2, y2)]
    lines += [(x - across[0], y - across[1], x + across[0], y + across[1]) for x, y in (start, end)]
    return [
        element("line", class_=f"whisker {layer}", x1=a, y1=b, x2=c, y2=d, stroke=colour, stroke_width=width)
        for layer, colour, width in (("halo", PAPER, 3.5), ("core", INK, 1.5))
        for a, b, c, d in lines
    ]


def svg(sheet: Sheet, height: float, label: str, description: str, shapes: Sequence[Markup]) -> Markup:
    """The SVG of one rendering, named for screen readers."""
    return element(
        "svg",
        element("title", label),
        element("desc", description),
        *shapes,
        xmlns="http://www.w3.org/2000/svg",
        class_=sheet.name,
        viewBox=f"0 0 {_write(sheet.width)} {_write(height)}",
        role="img",
        aria_label=label,
        font_family="system-ui, sans-serif",
    )


def frame(title: str, legend: Sequence[Key], renderings: Sequence[Markup], note: str = "") -> Markup:
    """Title, legend and note as text that wraps, around the renderings; the style sheet shows the one that fits."""
    keys = [
        element(
            "li",
            element("span", " ", class_=f"swatch {key.style}"),
            element("span", key.name, *([element("small", f" {key.remark}")] if key.remark else [])),
        )
        for key in legend
    ]
    return element(
        "div",
        *([element("p", title, class_="plot-title")] if title else []),
        *([element("ul", *keys, class_="legend")] if keys else []),
        *renderings,
        *([element("p", note, class_="note")] if note else []),
        class_="plot",
    )


def text_width(words: str, size: float) -> float:
    """About how wide `words` are at `size` pixels, on the generous side of the fonts that systems have."""
    return size * sum(1.0 if unicodedata.east_asian_width(c) in "WF" else 0.62 for c in words)


def wrap(words: str, width: float, size: float, max_lines: int = 3) -> list[str]:
    """`words` broken into lines of at most `width` pixels; what does not fit `max_lines` ends in an ellipsis."""
    lines = [""]
    for word in printable(words).split():
        joined = f"{lines[-1]} {word}".strip()
        if text_width(joined, size) <= width or not lines[-1]:
            lines[-1] = joined
        else:
            lines.append(word)
    cut = lines[:max_lines]
    lost = len(lines) > max_lines
    for index, line in enumerate(cut):
        clip = lost and index == max_lines - 1
        while line and text_width(line, size) > width - (size if clip else 0):
            line, clip = line[:-1], True
        cut[index] = f"{line.rstrip()}\N{HORIZONTAL ELLIPSIS}" if clip else line
    return cut


def _write(value: str | float) -> str:
    if isinstance(value, str):
        return str(escape(printable(value)))
    return f"{value:.2f}".rstrip("0").rstrip(".")
