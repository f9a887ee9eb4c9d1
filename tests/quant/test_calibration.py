"""Calibration sequences as in the AWQ release; bad files and short texts are refused by name."""

import json

import pytest
import torch

from tests import tiny
from vila.core.errors import DataError
from vila.core.types import Message
from vila.quant.calibration import (
    join_calibrations,
    packaged_documents,
    read_documents,
    sample_calibration,
    text_calibration,
)
from vila.starter import data


def letters(text, tokenizer=None):
    """One id a character, after a beginning of sequence."""
    return {"input_ids": [1, *map(ord, text)]}


def test_documents_are_joined_and_cut_and_the_tail_is_dropped():
    found = text_calibration(["  abc ", "", "de", "fghi"], letters, name="n", length=5, seed=None)
    flat = [1, *b"abc", 1, *b"de", 1, *b"fghi"]
    assert [row.ids for row in found.sequences] == [tuple(flat[:5]), tuple(flat[5:10])]
    assert found.metadata() == {"name": "n", "sha256": found.sha256, "rows": 2, "tokens": 10}


def test_documents_longer_than_a_sequence_are_skipped_and_so_are_those_past_the_limit():
    given = ["abc", "far too long", "defg", "hij"]
    found = text_calibration(given, letters, length=4, max_documents=1, seed=None)
    assert [row.ids for row in found.sequences] == [(1, *b"abc")]
    with pytest.raises(DataError) as caught:
        text_calibration(given, letters, length=2, seed=None)
    assert (caught.value.field, caught.value.value) == ("tokens", 0)


def test_ids_are_taken_as_they_are():
    found = text_calibration([[5, 6], [7, 8]], letters, length=2, seed=None)
    assert [row.ids for row in found.sequences] == [(5, 6), (7, 8)]


def test_the_seed_decides_the_order_and_the_hash_names_the_calibration():
    given = [f"{number:03d}" for number in range(20)]
    one, same, other = (text_calibration(given, letters, length=4, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.sequences != other.sequences and one.sha256 != other.sha256
    assert len(text_calibration(given, letters, length=4, max_sequences=3).sequences) == 3


def test_the_packaged_text_is_not_the_one_that_quality_is_measured_on():
    packaged = packaged_documents()
    assert "\n\n".join(map(str, packaged)) + "\n" == data.english_calibration()
    assert not set(packaged) & set(data.english_eval().rstrip("\n").split("\n\n"))
    rows = text_calibration(packaged, tiny.tokenizer()).sequences
    assert len(rows) >= 16 and {len(row.ids) for row in rows} == {512}


def test_files_of_both_kinds(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\nlines\n\n\n\n")
    assert [str(one).strip() for one in read_documents(tmp_path / "a.txt")] == ["one", "two\nlines"]
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"ids": [3, 4]}\n')
    assert read_documents(tmp_path / "b.jsonl") == ["x", [3, 4]]


@pytest.mark.parametrize(
    ("name", "content", "record"),
    [
        ("a.txt", b"", None),
        ("a.txt", b"\n\n \n", None),
        ("a.txt", b"\xe9t\xe9", None),
        ("a.txt", "text".encode("utf-16"), None),
        ("a.txt", b"\x1f\x8b\x08", None),
        ("a.json", b'[{"text": "x"}]', None),
        ("a.parquet", b"PAR1", None),
        ("a.jsonl", b'{"text": "\xe9t\xe9"}', "line 1"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}', "line 2"),
        ("a.jsonl", b'{"text": "half \\ud83d"}', "line 1"),
        ("a.jsonl", b'{"ids": [1, true]}', "line 1"),
        ("a.jsonl", b'{"ids": [1, 256]}', "line 1"),
        ("a.jsonl", b'{"ids": [1, -1]}', "line 1"),
        ("a.jsonl", b'{"ids": [1, ' + b"9" * 5000 + b"]}", "line 1"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.jsonl", b'{"text": ', "line 1"),
        ("a.jsonl", b"", None),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, record):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_documents(tmp_path / name, vocab_size=256)
    assert (caught.value.file, caught.value.record) == (str(tmp_path / name), record)


def test_a_missing_file_and_too_little_text_are_named(tmp_path):
    with pytest.raises(DataError) as caught:
        read_documents(tmp_path / "none.txt")
    assert caught.value.file == str(tmp_path / "none.txt")
    with pytest.raises(DataError) as caught:
        text_calibration(["abc"], letters, name="mine")
    assert (caught.value.file, caught.value.value, caught.value.expected) == ("mine", 4, "at least 512")


def test_conversations_about_images_are_whole_sequences_with_their_placeholders():
    _, processor = tiny.vila()
    asked = [Message.of("user", tiny.image(0), "what?"), Message.of("assistant", "noise")]
    found = sample_calibration([asked, asked], processor, name="vqa")
    ids = processor.tokens(asked, prompt=False).ids
    assert [row.ids for row in found.sequences] == [tuple(ids)] * 2
    assert found.sequences[0].ids.count(processor.image_token_id) == 4
    assert len(found.sequences[0].media) == 1
    other = [Message.of("user", tiny.image(1), "what?"), Message.of("assistant", "noise")]
    assert sample_calibration([asked, other], processor, name="vqa").sha256 != found.sha256
    with pytest.raises(DataError) as caught:
        sample_calibration([asked], processor, name="vqa", max_tokens=8)
    assert (caught.value.record, caught.value.expected) == ("conversation 0", "1 to 8")
    with pytest.raises(DataError) as caught:
        sample_calibration([], processor, name="vqa")
    assert (caught.value.file, caught.value.record) == ("vqa", None)


def test_text_and_images_join():
    _, processor = tiny.vila()
    asked = [Message.of("user", tiny.image(0), "what?"), Message.of("assistant", "noise")]
    text = text_calibration(["abc"], letters, name="text", length=4)
    both = join_calibrations(text, sample_calibration([asked], processor, name="vqa"))
    assert both.name == "text+vqa"
    assert [bool(row.media) for row in both.sequences] == [False, True]
    assert both.sha256 != text.sha256
    json.dumps(both.metadata())
    assert torch.tensor(both.sequences[0].ids).dtype == torch.int64
