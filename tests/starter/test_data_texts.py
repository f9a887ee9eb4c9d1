"""The starter's packaged text: present, licensed, plain, small, and split without overlap."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path

import pytest

from vila.core.errors import UnknownNameError
from vila.starter import data

TEXT_DIR = Path(str(files("vila.starter"))) / "text"


def word_ngrams(passages: Iterable[str], n: int = 8) -> set[tuple[str, ...]]:
    """Runs of `n` words inside a passage, without case and punctuation."""
    found: set[tuple[str, ...]] = set()
    for passage in passages:
        words = re.findall(r"[a-z0-9']+", passage.lower())
        found.update(zip(*(words[i:] for i in range(n)), strict=False))
    return found


def test_instruction_pairs_are_complete_sorted_and_distinct() -> None:
    pairs = data.instruction_pairs()
    names = [name for name, _, _ in pairs]
    assert len(pairs) >= 350
    assert names == sorted(set(names))
    assert len({instruction for _, instruction, _ in pairs}) == len(pairs)
    assert all(part and part == part.strip() for row in pairs for part in row)


def test_responses_do_not_repeat_themselves() -> None:
    for name, _, response in data.instruction_pairs():
        words = response.split()
        sixes = list(zip(*(words[i:] for i in range(6)), strict=False))
        assert all(sixes.count(six) <= 2 for six in set(sixes)), name


def test_instructions_stay_clear_of_image_questions() -> None:
    asked = re.compile(r"\b(image|picture|photo|colou?rs?|shapes?|circle|triangle|rectangle)\b", re.IGNORECASE)
    assert [row for row in data.instruction_pairs() if asked.search(row[1])] == []


def test_sizes_are_in_range() -> None:
    pairs_bytes = (TEXT_DIR / "instructions.jsonl").stat().st_size
    assert 150_000 <= pairs_bytes <= 210_000
    assert len(data.english_eval()) >= 25_000  # 4.5 characters a token or so: 6,000 tokens with a margin
    assert len(data.english_calibration()) >= 45_000
    assert sum(path.stat().st_size for path in TEXT_DIR.rglob("*") if path.is_file()) <= 400_000


@pytest.mark.parametrize("name", data.TEXT_FILES)
def test_files_hold_printable_ascii_and_end_with_a_newline(name: str) -> None:
    raw = (TEXT_DIR / name).read_bytes()
    assert raw.endswith(b"\n") and not raw.endswith(b"\n\n")
    assert set(raw) <= {10, *range(32, 127)}


def test_passages_hold_no_control_characters_but_newlines() -> None:
    for _, instruction, response in data.instruction_pairs():
        assert instruction.isprintable()
        assert response.replace("\n", "").isprintable()


@pytest.mark.parametrize("prose", [data.english_eval, data.english_calibration])
def test_prose_is_paragraphs_of_sentences(prose: Callable[[], str]) -> None:
    for paragraph in prose().rstrip("\n").split("\n\n"):
        assert "\n" not in paragraph and "  " not in paragraph
        assert len(paragraph.split()) >= 15
        assert paragraph[-1] in ".?!\"')"


def test_no_two_texts_share_a_run_of_eight_words() -> None:
    grams = {
        "instructions": word_ngrams(part for _, *row in data.instruction_pairs() for part in row),
        "eval": word_ngrams(data.english_eval().split("\n\n")),
        "calibration": word_ngrams(data.english_calibration().split("\n\n")),
    }
    for one, other in itertools.combinations(grams, 2):
        assert not grams[one] & grams[other], f"{one} and {other} overlap"


def test_every_file_has_a_licence_note() -> None:
    notes = (TEXT_DIR / "LICENSES.md").read_text(encoding="utf-8")
    for expected in (
        *data.TEXT_FILES,
        "Apache-2.0",
        "Python Software Foundation; All Rights Reserved",
        "public domain",
    ):
        assert expected in notes
    assert {path.name for path in TEXT_DIR.iterdir()} == {*data.TEXT_FILES, "LICENSES.md"}


def test_sha256_is_that_of_the_file() -> None:
    for name in data.TEXT_FILES:
        assert data.text_sha256(name) == hashlib.sha256((TEXT_DIR / name).read_bytes()).hexdigest()


def test_unknown_text_is_named_with_a_suggestion() -> None:
    with pytest.raises(UnknownNameError) as caught:
        data.text_sha256("english_evl.txt")
    assert caught.value.near[0] == "english_eval.txt"


def test_texts_load_without_torch() -> None:
    code = "import sys, vila.starter.data as t; t.instruction_pairs(); sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=env).returncode == 0
