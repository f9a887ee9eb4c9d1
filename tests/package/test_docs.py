"""Generated parts of pages are up to date; pages are short and ASCII."""

from pathlib import Path

import pytest

from scripts import make_docs

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
GENERATED = make_docs.pages()


@pytest.mark.parametrize("page", GENERATED, ids=lambda page: page.name)
def test_the_generated_parts_of_a_page_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert make_docs.regenerated(text) == text, f"{page.name} is stale; run: python scripts/make_docs.py"


def test_every_generated_part_is_on_one_page() -> None:
    names = [name for page in GENERATED for name in make_docs.part_names(page.read_text(encoding="utf-8"))]
    assert sorted(names) == sorted(make_docs.PARTS)


def test_regenerating_restores_rows_and_keeps_the_rest_of_the_page() -> None:
    text = (ROOT / "docs" / "recipe_fields.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| `stage.lr` |"))
    assert make_docs.regenerated(text.replace(f"{row}\n", "")) == text
    assert make_docs.regenerated(text.replace(row, row.replace("Peak", "Top"))) == text
    assert make_docs.regenerated(f"By hand.\n\n{text}") == f"By hand.\n\n{text}"


def test_an_unknown_part_is_named() -> None:
    with pytest.raises(ValueError, match="recipe-filds"):
        make_docs.regenerated("<!-- generated: recipe-filds -->\n<!-- end: recipe-filds -->\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_short_and_plain_ascii(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.isascii()
    assert page.name == "cli.md" or len(text.splitlines()) <= 250  # cli.md is generated
