"""HTML report pages: blocks in reading order under headings, rendered to one file that makes no network request."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, ImageOps, UnidentifiedImageError

from vila.core.errors import MediaError
from vila.core.files import write_text
from vila.report.numbers import MISSING, write_number

# XML has no other control characters, and a lone surrogate has no encoding.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
MAX_SIDE = 320  # pixels; twice the width of a card, for high-density screens
_QUALITY = 80
TINY_SIDE = 128  # pixels; images up to this size are enlarged without interpolation


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """Image as a data URI. `tiny` images are enlarged without interpolation."""

    uri: str
    width: int
    height: int
    tiny: bool


def embed(source: Image.Image | Path | str | bytes, photo: bool = False) -> Thumbnail:
    """Return a thumbnail of at most MAX_SIDE pixels per side, with the EXIF orientation applied.

    photo: encode as JPEG, a fifth of the size, unless the image is tiny or transparent; otherwise PNG.
    Raises MediaError with the file if it cannot be read.
    """
    if isinstance(source, Image.Image):
        image = source
    else:
        name = f"<{len(source)} bytes>" if isinstance(source, bytes) else str(source)
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
                opened.load()
                image = opened
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
            raise MediaError(f"cannot be shown in the report ({error})", file=name) from error
    image = ImageOps.exif_transpose(image)
    has_alpha = "A" in image.getbands() or "transparency" in image.info
    image = image.convert("RGBA" if has_alpha else "RGB")
    tiny = max(image.size) <= TINY_SIDE
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    # A new image leaves EXIF and other metadata of the original behind.
    clean = Image.new(image.mode, image.size)
    clean.paste(image)
    kind = "jpeg" if photo and not (tiny or has_alpha) else "png"
    clean.save(stream, format=kind, optimize=True, **({"quality": _QUALITY} if kind == "jpeg" else {}))
    uri = f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
    return Thumbnail(uri, image.width, image.height, tiny)


Cell = str | int | float | None
ImageSource = Image.Image | Path | str | bytes


@dataclass(frozen=True, slots=True)
class Figure:
    """Large number with a note in small print, such as the value to compare it with."""

    value: Cell
    note: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """Gallery card: an image and lines of (label, text) below it. A line without a label is emphasised.

    good:    mark the card as right (True) or wrong (False); None for no mark.
    more:    further images, below the first.
    verdict: text of the mark in place of "right" or "wrong".
    """

    image: ImageSource | None
    lines: Sequence[tuple[str, str]]
    good: bool | None = None
    more: Sequence[ImageSource] = ()
    verdict: str = ""

    @property
    def images(self) -> list[ImageSource]:
        """All images in order."""
        return [*(() if self.image is None else (self.image,)), *self.more]


class Flow:
    """Blocks in reading order. All text is escaped; only plots, which are Markup, are inserted unchanged."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []

    def text(self, paragraph: str) -> Self:
        """Add a paragraph."""
        return self._add("text", paragraph=paragraph)

    def figures(self, values: Mapping[str, Cell | Figure]) -> Self:
        """Add large numbers by label; the first one is emphasised."""
        tiles = {label: value if isinstance(value, Figure) else Figure(value) for label, value in values.items()}
        return self._add("figures", tiles=[(label, write_cell(t.value), t.note) for label, t in tiles.items()])

    def plot(self, drawing: Markup, caption: str = "") -> Self:
        """Add a plot of `vila.report.plots`. A string that is not Markup is shown as text."""
        return self._add("plot", drawing=drawing, caption=caption)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "") -> Self:
        """Add a table. Columns of numbers are right-aligned; on narrow screens, long rows become lists.

        header: column names; empty for a plain list of names and values.
        Raises ValueError if a row is not as long as the header, or as the first row without a header.
        """
        width = len(header or (rows[0] if rows else ()))
        for number, row in enumerate(rows):
            if len(row) != width:
                raise ValueError(f"table row {number} has {len(row)} cells, expected {width}: {list(header)!r}")
        numeric = [bool(header) and _is_numeric([row[i] for row in rows], i == 0) for i in range(width)]
        written = [[write_cell(cell) for cell in row] for row in rows]
        return self._add("table", header=list(header), rows=written, numeric=numeric, caption=caption)

    def gallery(self, cards: Sequence[Card], caption: str = "", photos: bool = False) -> Self:
        """Add images with labelled lines; photos: encode as JPEG. Raises MediaError for an unreadable image."""
        shown = [
            {
                "images": [embed(each, photos) for each in c.images],
                "lines": list(c.lines),
                "good": c.good,
                "verdict": c.verdict or ("right" if c.good else "wrong"),
            }
            for c in cards
        ]
        return self._add("gallery", cards=shown, caption=caption)

    def code(self, text: str, caption: str = "") -> Self:
        """Add preformatted text; long lines wrap."""
        return self._add("code", text=text, caption=caption)

    def details(self, summary: str) -> Flow:
        """Add a collapsed part and return it, to be filled."""
        inner = Flow()
        self._add("details", summary=summary, blocks=inner.blocks)
        return inner

    def _add(self, kind: str, **data: Any) -> Self:
        self.blocks.append({"kind": kind, **data})
        return self


class Page(Flow):
    """HTML document. Blocks added before the first `section` appear under the title."""

    def __init__(self, title: str, subtitle: str = "", footer: str = "") -> None:
        super().__init__()
        self.title, self.subtitle, self.footer = title, subtitle, footer
        self._lead = self.blocks
        self._sections: list[dict[str, Any]] = []

    def section(self, title: str, intro: str = "") -> Self:
        """Start a section; blocks added afterwards belong to it."""
        self.blocks = []
        anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        taken = sum(s["anchor"] == anchor or s["anchor"].startswith(f"{anchor}--") for s in self._sections)
        anchor = f"{anchor}--{taken + 1}" if taken else anchor
        self._sections.append({"title": title, "intro": intro, "anchor": anchor, "blocks": self.blocks})
        return self

    def render(self) -> str:
        """Return the HTML document."""
        html = render_template(
            "page.html.j2",
            title=self.title,
            subtitle=self.subtitle,
            footer=self.footer,
            lead=self._lead,
            sections=self._sections,
        )
        return printable(html)

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        write_text(path, self.render())


def write_cell(value: Cell) -> str:
    """Return a cell as text: numbers are grouped and rounded, None is a dash."""
    if value is None:
        return MISSING
    return value if isinstance(value, str) else write_number(value)


# "97.6 %", "1,234", "6 min 42 s", a dash: a number and at most short units.
_AMOUNT = r"\d[\d.,]*(\s?(%|[^\W\d]{1,3}))?"
_NUMBER = re.compile(rf"{MISSING}|[-+\u2212]?{_AMOUNT}(\s{_AMOUNT})*")


def _is_numeric(column: Sequence[Cell], is_first: bool) -> bool:
    """Return whether a column holds numbers; names in the first column may start with a digit ("1 Align")."""
    texts = [cell for cell in column if isinstance(cell, str)]
    if is_first and texts:
        return False
    return any(cell is not None for cell in column) and all(_NUMBER.fullmatch(text) for text in texts)


def printable(text: str) -> str:
    """Return `text` with characters that XML or UTF-8 cannot hold replaced by U+FFFD."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def render_template(name: str, **values: Any) -> Markup:
    """Return a template of this package filled with `values`, which are escaped unless they are Markup."""
    return Markup(printable(_environment().get_template(name).render(**values)))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("vila.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["long_word"] = lambda text: any(len(word) > 24 for word in str(text).split())
    return environment
