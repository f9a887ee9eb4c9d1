"""Search paths of benchmark files."""

import pytest

from vila.core.errors import DataError
from vila.eval.annotations import AnnotatedBenchmark


class Gqa(AnnotatedBenchmark):
    name = "gqa"
    load_items = score = None


@pytest.fixture
def home(tmp_path):
    home = tmp_path / "eval" / "gqa"
    (home / "data" / "images").mkdir(parents=True)
    (home / "data" / "q.json").write_text("{}")
    return home


def test_a_file_is_found_from_both_folders_and_in_every_place(home):
    for folder in (home.parent, home, home / "data"):
        assert Gqa(folder).find_file("q.json", "data/q.json") == home / "data" / "q.json"


def test_earlier_places_come_first(home):
    (home / "q.json").write_text("{}")
    assert Gqa(home.parent).find_optional("q.json", "data/q.json") == home / "q.json"


def test_missing_file_is_reported_with_all_paths_and_its_source(home):
    assert Gqa(home).find_optional("p.json") is None
    with pytest.raises(DataError) as raised:
        Gqa(home.parent).find_file("p.json", "data/p.json", source="https://example.org")
    places = [home / "p.json", home.parent / "p.json", home / "data" / "p.json", home.parent / "data" / "p.json"]
    assert raised.value.field == "gqa" and ", ".join(map(str, places)) in raised.value.problem
    assert "https://example.org" in raised.value.hint


def test_images_need_not_be_there(home):
    assert Gqa(home.parent).image_folder("images", "data/images") == home / "data" / "images"
    assert Gqa(home.parent).image_folder("test2015") == home / "test2015"
    assert Gqa(home).image_folder("test2015") == home / "test2015"
