"""Streamed JSON arrays: same values as json, independent of the chunk size."""

import json

import pytest

from tests.eval.checks import refused
from vila.core.errors import DataError
from vila.eval import annotation_files
from vila.eval.annotation_files import iter_array

ROWS = [{"id": 1, "text": 'a "b" ] } \u00e9\u4e2d'}, [1, [2.5]], "x", 12, -3.25e2, True, None, {}, 123456]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_values_equal_those_of_json_for_any_chunk_size(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(annotation_files, "_CHUNK_CHARS", chunk)
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"n": 12345, "info": {"rows": [0]}, "rows": ROWS, "after": 1}, indent=indent))
    assert list(iter_array(path, "rows")) == ROWS
    path.write_text(json.dumps(ROWS, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(iter_array(path)) == ROWS
    path.write_text(' { "rows" : [ ] }')
    assert list(iter_array(path, "rows")) == []


@pytest.mark.parametrize(
    ("text", "read", "mention"),
    [
        ('{"rows": [1, 2', 2, "character 14: unexpected end"),
        ('{"rows": [1, {"a": ', 1, "character 13"),
        ('{"rows": [1 2]}', 1, "expected , or ] but found '2'"),
        ('{"rows" [1]}', 0, "expected :"),
        ('{"lines": [1]}', 0, "rows"),
        ('{"rows": 5}', 0, "an array under 'rows'"),
        ("", 0, "is empty"),
        ("  ", 0, "end of the file"),
    ],
)
def test_errors_come_after_the_readable_elements(tmp_path, text, read, mention):
    path = tmp_path / "a.json"
    path.write_text(text)
    rows = []
    with refused(mention, file=path.name):
        for row in iter_array(path, "rows"):
            rows.append(row)
    assert len(rows) == read


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'["\xff"]')
    with refused("UTF-8", file="a.json"):
        list(iter_array(path))


@pytest.mark.parametrize("key", ["", "rows"])
@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[1, 2] 3", "text after"),
        ("[1, 2]\n[3]", "text after"),
        ("[1, 2]\0", "text after"),
        ('["\\ud83d"]', "unpaired surrogate"),
        ("[" + "[" * 100_000, "near"),
        ("[" + "1" * 5000 + "]", "near"),
    ],
)
def test_every_value_is_sound_and_nothing_follows_the_last_one(tmp_path, key, text, word):
    path = tmp_path / "a.json"
    path.write_text(text if not key else f'{{"a": [[1], {{}}], "rows": {text}, "b": 1}}')
    with pytest.raises(DataError) as caught:
        list(iter_array(path, key))
    assert caught.value.file == str(path)
    assert key or word in caught.value.problem


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"rows": [1]', "end of the file"),
        ('{"rows": [1]} more', "text after"),
        ('{"rows": [1], "rows": [2]}', "twice"),
        ('{"rows": [1], "b"', "end of the file"),
        ('{"b": [1, 2 3], "rows": []}', "expected ,"),
    ],
)
def test_the_rest_of_the_object_is_parsed_too(tmp_path, text, word):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        list(iter_array(path, "rows"))
    assert word in caught.value.problem


def test_a_value_over_the_limit_is_refused_and_damage_is_found_without_reading_on(tmp_path, monkeypatch):
    monkeypatch.setattr(annotation_files, "MAX_RECORD_BYTES", 5000)
    monkeypatch.setattr(annotation_files, "_CHUNK_CHARS", 1000)
    path = tmp_path / "a.json"
    path.write_text('["' + "x" * 100_000 + '"]')
    with refused("5,000"):
        list(iter_array(path))
    path.write_text('[{"a": x}, ' + "1, " * 100_000 + "1]")
    with refused("character 1"):
        list(iter_array(path))
    path.write_text('{"long": [' + "1, " * 100_000 + '1], "rows": [7]}')
    assert list(iter_array(path, "rows")) == [7]
