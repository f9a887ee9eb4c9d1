"""Long arrays read piece by piece: the same values as json gives, wherever a piece ends."""

import json

import pytest

from vila.core.errors import DataError
from vila.eval import json_array
from vila.eval.json_array import iter_array

ROWS = [{"id": 1, "text": 'a "b" ] } \u00e9\u4e2d'}, [1, [2.5]], "x", 12, -3.25e2, True, None, {}, 123456]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_values_equal_those_of_json_whatever_the_size_of_pieces(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(json_array, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"n": 12345, "info": {"rows": [0]}, "rows": ROWS, "after": 1}, indent=indent))
    assert list(iter_array(path, "rows")) == ROWS
    path.write_text(json.dumps(ROWS, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(iter_array(path)) == ROWS
    path.write_text(' { "rows" : [ ] }')
    assert list(iter_array(path, "rows")) == []


@pytest.mark.parametrize(
    ("text", "read", "message"),
    [
        ('{"rows": [1, 2', 2, "not whole JSON near character 14: the file ends early"),
        ('{"rows": [1, {"a": ', 1, "not whole JSON near character 13"),
        ('{"rows": [1 2]}', 1, "expected , or ] but found '2'"),
        ('{"rows" [1]}', 0, "expected : after a name"),
        ('{"lines": [1]}', 0, "has no 'rows'"),
        ('{"rows": 5}', 0, "expected an array under 'rows'"),
        ("", 0, "the file ends early"),
    ],
)
def test_faults_are_told_after_what_could_be_read(tmp_path, text, read, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    rows = []
    with pytest.raises(DataError, match=message) as raised:
        for row in iter_array(path, "rows"):
            rows.append(row)
    assert len(rows) == read
    assert str(path) in str(raised.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'["\xff"]')
    with pytest.raises(DataError, match=r"a.json: not UTF-8 text"):
        list(iter_array(path))
