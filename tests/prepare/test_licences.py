"""Licences of the data sets, and the generated file."""

from scripts import make_docs
from vila.prepare.licences import data_licences
from vila.prepare.vflan import SETS


def test_the_file_in_the_repository_is_up_to_date():
    text = make_docs.LICENCES.read_text(encoding="utf-8")
    assert make_docs.licence_text(text) == text


def test_every_prepared_set_is_listed_once_with_a_source():
    names = [entry.name for entry in data_licences()]
    assert len(names) == len(set(names))
    assert all(entry.source.startswith("https://") for entry in data_licences())
    for wanted in [name for group in SETS.values() for name in group]:
        assert any(name.startswith(f"M3IT: {wanted}") for name in names), wanted
    for wanted in ("LLaVA-CC3M", "MMC4", "COYO", "FLAN", "ShareGPT4V", "OBELICS", "The Cauldron", "FineVision", "easy"):
        assert any(name.startswith(wanted) for name in names), wanted
