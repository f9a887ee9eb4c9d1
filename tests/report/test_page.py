"""Pages: one file, nothing loaded from anywhere, every text escaped."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from markupsafe import Markup
from PIL import Image

from vila.core.errors import MediaError
from vila.report.html import MAX_SIDE, Card, Figure, Page, embed
from vila.report.plots import Group, Series, bar_plot, line_plot

EVIL = "<script>alert(1)</script><img src=https://example.com/x onerror=y>"
VOID = {"meta", "link", "img", "br", "hr"}


class Reader(HTMLParser):
    """Collects elements and checks that every tag is closed in order."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def image(size=(8, 6), colour="red"):
    return Image.new("RGB", size, colour)


def full_page(text="plain"):
    page = Page(text, text, text)
    page.figures({text: 0.5, "two": Figure(12345, text)}).text(text)
    page.section(text, text).plot(line_plot([Series(text, [(0, 1), (1, 2)])], title=text, smoothing=0.5), text)
    page.section(text).plot(bar_plot([Group(text, {text: 1.0, "b": 2.0})], title=text), text)
    page.section("c").table([text, "n", "m", "o"], [[text, 1, 2.5, None], ["b", 3, 4.5, "x"]], text)
    page.section("d").gallery([Card(image(), [(text, text), ("", text)], True), Card(None, [("a", text)], False)], text)
    page.code(text, text).details(text).text(text).code(text).table((), [(text, text)])
    return page


def test_page_is_well_formed_and_every_kind_of_block_is_in_it():
    tags = {tag for tag, _ in Reader(full_page().render()).elements}
    assert {"h1", "h2", "dl", "svg", "table", "img", "pre", "details", "summary", "nav", "footer"} <= tags


def test_all_text_is_escaped():
    html = full_page(EVIL).render()
    elements = Reader(html).elements
    assert not [tag for tag, _ in elements if tag == "script"]
    assert not [a for _, attributes in elements for a in attributes if a.startswith("on")]
    assert len([tag for tag, _ in elements if tag == "img"]) == 1
    assert "&lt;script&gt;" in html


def test_nothing_is_loaded_from_anywhere():
    html = full_page(EVIL).render()
    for tag, attributes in Reader(html).elements:
        for name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    style = "".join(re.findall(r"<style>(.*?)</style>", html, re.S))
    assert style and not re.search(r"url\(|@import|https?:", style)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html


def test_a_drawing_that_is_not_markup_is_shown_as_text():
    assert "<svg" not in Page("t").plot("<svg></svg>").render()
    assert "<svg>" in Page("t").plot(Markup("<svg></svg>")).render()


def test_sections_have_ascii_anchors_that_differ():
    page = Page("t")
    for title in ("Loss", "Loss", "\u5f62 & Farbe", "\u5f62", "Loss"):
        page.section(title)
    elements = Reader(page.render()).elements
    ids = [attributes["id"] for tag, attributes in elements if tag == "section"]
    assert len(set(ids)) == 5 and all(re.fullmatch(r"[a-z0-9-]+", i) for i in ids)
    assert [a["href"] for tag, a in elements if tag == "a"] == [f"#{i}" for i in ids]


def test_columns_of_numbers_are_set_flush_right():
    html = Page("t").table(["name", "n", "share", "text"], [["1 a", 1234, "97.6 %", "3 blue mice"]]).render()
    cells = [(a.get("data-label"), a.get("class")) for tag, a in Reader(html).elements if tag == "td"]
    assert cells == [("n", "number"), ("share", "number"), ("text", None)]
    assert "1,234" in html


def test_a_table_row_of_the_wrong_length_is_an_error():
    with pytest.raises(ValueError, match=r"\b1\b.*\b1\b.*\b2\b"):  # row, its cells, those of the header
        Page("t").table(["a", "b"], [["x", 1], ["y"]])


def test_details_are_filled_in_place():
    page = Page("t")
    page.details("unfold").text("folded words")
    page.text("words after")
    html = page.render()
    assert html.index("unfold") < html.index("folded words") < html.index("</details>") < html.index("words after")


def test_gallery_embeds_images_and_marks_right_and_wrong(tmp_path):
    path = tmp_path / "a.png"
    image().save(path)
    cards = [
        Card(path, [("", "q")], True),
        Card(path.read_bytes(), [], False),
        Card(str(path), []),
        Card(image(), []),
    ]
    elements = Reader(Page("t").gallery(cards).render()).elements
    images = [a for tag, a in elements if tag == "img"]
    assert len({a["src"] for a in images}) == 1
    assert images[0]["src"].startswith("data:image/png;base64,") and images[0]["class"] == "tiny"
    assert [a["class"] for tag, a in elements if tag == "li" and a.get("class", "").startswith("card")] == [
        "card good", "card bad", "card", "card",
    ]  # fmt: skip


def test_a_card_shows_all_its_images_in_order():
    colours = ["red", "green", "blue"]
    first, *more = (image(colour=colour) for colour in colours)
    cards = [Card(first, [("", "q")], more=more), Card(None, [], more=more), Card(first, [])]
    page = Page("t").gallery(cards).render()
    shown = [a["src"] for tag, a in Reader(page).elements if tag == "img"]
    uris = [embed(image(colour=colour)).uri for colour in colours]
    assert shown == [*uris, *uris[1:], uris[0]]


def test_an_embedded_image_keeps_its_pixels():
    source = image((5, 3), (1, 2, 3))
    with Image.open(io.BytesIO(base64.b64decode(embed(source).uri.split(",")[1]))) as back:
        assert (back.size, back.mode, back.tobytes()) == (source.size, "RGB", source.tobytes())


def test_large_images_become_thumbnails_and_lose_their_metadata():
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "secret place"  # orientation: a quarter turn; description
    image((800, 400)).save(stream, "JPEG", exif=exif)
    thumbnail = embed(stream.getvalue())
    assert (thumbnail.width, thumbnail.height, thumbnail.tiny) == (MAX_SIDE // 2, MAX_SIDE, False)
    assert b"secret" not in base64.b64decode(thumbnail.uri.split(",")[1])


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "F"])
def test_images_of_every_mode_can_be_embedded(mode):
    assert embed(Image.new(mode, (4, 4))).uri.startswith("data:image/png;base64,")


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    for image, name in ((tmp_path / "no.png", str(tmp_path / "no.png")), (b"hello", "<5 bytes>")):
        with pytest.raises(MediaError) as caught:
            embed(image)
        assert caught.value.file == name


def test_saving_is_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "report.html"
    page = Page("t").text("half a surrogate \ud800 and a NUL \x00")
    page.save(target)
    assert target.read_text(encoding="utf-8") == page.render()
    assert [p.name for p in target.parent.iterdir()] == ["report.html"]


def test_the_same_page_renders_to_the_same_text():
    assert full_page().render() == full_page().render()
