"""A page: blocks in reading order under headings, rendered to one HTML file that loads nothing from anywhere."""

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
from vila.report.scale import MISSING, write_number
from vila.report.svg import printable

# --- picture
# Pictures inside a page: thumbnails as data URIs.


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


Cell = str | int | float | None
Picture = Image.Image | Path | str | bytes


@dataclass(frozen=True, slots=True)
class Figure:
    """A big number and, in small print, what it is to be compared with."""

    value: Cell
    note: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """A picture of a gallery and lines of (label, text) below it; a line without a label stands out as the card's own.

    `good` marks the card as right or wrong, None leaves it unmarked. `more`: further pictures, below the first.
    `verdict`: a word in place of "right" or "wrong".
    """

    image: Picture | None
    lines: Sequence[tuple[str, str]]
    good: bool | None = None
    more: Sequence[Picture] = ()
    verdict: str = ""

    @property
    def pictures(self) -> list[Picture]:
        """All pictures, the first one first."""
        return [*(() if self.image is None else (self.image,)), *self.more]


class Flow:
    """Blocks in reading order. Every text is escaped; only plots, which are Markup, are taken as they are."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []

    def text(self, paragraph: str) -> Self:
        """A paragraph."""
        return self._add("text", paragraph=paragraph)

    def figures(self, values: Mapping[str, Cell | Figure]) -> Self:
        """Big numbers by label; the first one is the headline."""
        tiles = {label: value if isinstance(value, Figure) else Figure(value) for label, value in values.items()}
        return self._add("figures", tiles=[(label, write_cell(t.value), t.note) for label, t in tiles.items()])

    def plot(self, drawing: Markup, caption: str = "") -> Self:
        """A plot from `lines` or `bars`. A string that is not Markup is shown as text."""
        return self._add("plot", drawing=drawing, caption=caption)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "") -> Self:
        """A table; columns of numbers are set flush right, and on a phone long rows become lists.

        header: names of the columns; an empty one makes a plain list of names and values.
        Raises ValueError when a row is not as long as the header, or as the first row where there is none.
        """
        width = len(header or (rows[0] if rows else ()))
        for number, row in enumerate(rows):
            if len(row) != width:
                raise ValueError(f"table row {number} has {len(row)} cells, expected {width}: {list(header)!r}")
        numeric = [bool(header) and _is_numeric([row[i] for row in rows], i == 0) for i in range(width)]
        written = [[write_cell(cell) for cell in row] for row in rows]
        return self._add("table", header=list(header), rows=written, numeric=numeric, caption=caption)

    def gallery(self, cards: Sequence[Card], caption: str = "", photos: bool = False) -> Self:
        """Pictures with labelled lines; photos: as JPEG. Raises MediaError naming a picture that cannot be read."""
        shown = [
            {
                "images": [embed(each, photos) for each in c.pictures],
                "lines": list(c.lines),
                "good": c.good,
                "verdict": c.verdict or ("right" if c.good else "wrong"),
            }
            for c in cards
        ]
        return self._add("gallery", cards=shown, caption=caption)

    def code(self, text: str, caption: str = "") -> Self:
        """Text set as code; long lines wrap, and line breaks stay."""
        return self._add("code", text=text, caption=caption)

    def details(self, summary: str) -> Flow:
        """A part that the reader unfolds; fill what is returned."""
        inner = Flow()
        self._add("details", summary=summary, blocks=inner.blocks)
        return inner

    def _add(self, kind: str, **data: Any) -> Self:
        self.blocks.append({"kind": kind, **data})
        return self


class Page(Flow):
    """A document: what is added before the first `section` stands under the title, the rest under its section."""

    def __init__(self, title: str, subtitle: str = "", footer: str = "") -> None:
        super().__init__()
        self.title, self.subtitle, self.footer = title, subtitle, footer
        self._lead = self.blocks
        self._sections: list[dict[str, Any]] = []

    def section(self, title: str, intro: str = "") -> Self:
        """Begin a section; what is added from now on belongs to it."""
        self.blocks = []
        anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        taken = sum(s["anchor"] == anchor or s["anchor"].startswith(f"{anchor}--") for s in self._sections)
        anchor = f"{anchor}--{taken + 1}" if taken else anchor
        self._sections.append({"title": title, "intro": intro, "anchor": anchor, "blocks": self.blocks})
        return self

    def render(self) -> str:
        """The whole file as text."""
        html = _environment().get_template("page.html.j2").render(
            title=self.title, subtitle=self.subtitle, footer=self.footer, lead=self._lead, sections=self._sections
        )  # fmt: skip
        return printable(html)

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        write_text(path, self.render())


def write_cell(value: Cell) -> str:
    """A value as a reader sees it: text as it is, numbers grouped and rounded, a dash for nothing."""
    if value is None:
        return MISSING
    return value if isinstance(value, str) else write_number(value)


# "97.6 %", "1,234", "6 min 42 s", a dash: a number and at most short units.
_AMOUNT = r"\d[\d.,]*(\s?(%|[^\W\d]{1,3}))?"
_NUMBER = re.compile(rf"{MISSING}|[-+\u2212]?{_AMOUNT}(\s{_AMOUNT})*")


def _is_numeric(column: Sequence[Cell], is_first: bool) -> bool:
    """Whether a column holds numbers; names in the first one may begin with a digit ("1 Align")."""
    texts = [cell for cell in column if isinstance(cell, str)]
    if is_first and texts:
        return False
    return any(cell is not None for cell in column) and all(_NUMBER.fullmatch(text) for text in texts)


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
