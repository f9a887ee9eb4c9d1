"""Content of written pages: elements of an HTML report, tables of a Markdown file."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

_VOID = {"meta", "link", "img", "br", "hr"}


class HtmlPage(HTMLParser):
    """Elements of an HTML page as an ElementTree. Asserts that every tag is closed in order."""

    def __init__(self, html: str | Path) -> None:
        super().__init__()
        self._builder = ElementTree.TreeBuilder()
        self._open: list[str] = []
        self.feed(html.read_text(encoding="utf-8") if isinstance(html, Path) else html)
        self.close()
        assert not self._open
        self.root = self._builder.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._builder.start(tag, {name: value or "" for name, value in attributes})
        if tag in _VOID:
            self._builder.end(tag)
        else:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._builder.start(tag, {name: value or "" for name, value in attributes})
        self._builder.end(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self._builder.end(tag)

    def handle_data(self, data: str) -> None:
        if self._open:
            self._builder.data(data)

    @property
    def subtitle(self) -> str:
        """Text below the title."""
        return _text(next(one for one in self.root.iter("p") if one.get("class") == "subtitle"))

    @property
    def sections(self) -> list[str]:
        """Anchors of the sections."""
        return [one.attrib["id"] for one in self.root.iter("section")]

    @property
    def figures(self) -> dict[str, list[str]]:
        """Value and note of each large number, by label."""
        tiles = (one for one in self.root.iter("div") if one.get("class") == "tile")
        return {_text(tile[0]): [_text(one) for one in tile[1:]] for tile in tiles}

    @property
    def rows(self) -> dict[str, list[str]]:
        """Further cells of each table row, by its first cell; header rows included."""
        return {_text(row[0]): [_text(cell) for cell in row[1:]] for row in self.root.iter("tr")}

    @property
    def captions(self) -> list[str]:
        """Captions of tables, plots and galleries."""
        return [_text(one) for one in self.root.iter("figcaption")]

    @property
    def plots(self) -> list[str]:
        """Titles of the plots."""
        return [_text(one) for one in self.root.iter("p") if one.get("class") == "plot-title"]

    @property
    def cards(self) -> list[list[str]]:
        """Lines of each gallery card, labels left out."""
        found = (one for one in self.root.iter("li") if one.get("class", "").startswith("card"))
        return [[_text(line) for line in card.iter("dd")] for card in found]

    @property
    def images(self) -> list[str]:
        """Addresses of the images."""
        return [one.attrib["src"] for one in self.root.iter("img")]


def markdown_rows(text: str) -> dict[str, list[str]]:
    """Further cells of each row of the tables of a Markdown text, by the first cell."""
    rows = (re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in text.splitlines() if line.startswith("|"))
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in rows}


def numbers(text: str) -> list[float]:
    """Numbers in a text, without thousands separators."""
    return [float(one.replace(",", "")) for one in re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?", text)]


def _text(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split()).replace("\N{NO-BREAK SPACE}", " ")
