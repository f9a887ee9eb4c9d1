"""Foreign files: library exceptions carry the file's name; JSON that is not sound is refused with its location."""

import pytest

from vila.core import reading
from vila.core.errors import ConfigError, DataError, LayoutError
from vila.core.files import write_jsonl
from vila.core.reading import (
    file_errors,
    foreign_content,
    parse_json,
    read_json,
    read_json_object,
    read_jsonl,
    read_text,
)


def test_a_library_exception_becomes_an_error_with_the_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text("{}")
    with pytest.raises(LayoutError) as caught, file_errors(file, LayoutError, record=3, hint="write it again"):
        raise KeyError("su")
    error = caught.value
    assert (error.file, error.record, error.hint) == (str(file), 3, "write it again")
    assert "KeyError" in error.problem
    assert isinstance(error.__cause__, KeyError)


def test_a_vila_error_passes_the_boundary_unchanged(tmp_path):
    ours = ConfigError("x")
    with pytest.raises(ConfigError) as caught, file_errors(tmp_path / "a", LayoutError):
        raise ours
    assert caught.value is ours


def test_an_interrupt_passes_the_boundary(tmp_path):
    with pytest.raises(KeyboardInterrupt), file_errors(tmp_path / "a"):
        raise KeyboardInterrupt


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(DataError) as caught:
        read_json(tmp_path / "absent.json")
    assert caught.value.file == str(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("head", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"<!DOCTYPE html><p>", "web page"),
        (b"\0" * 64, "zero"),
        (b"", "empty"),
        ("{}".encode("utf-16"), "UTF-16"),
        (b"PAR1" + bytes(60), "parquet"),
        (b"a.txt".ljust(257, b"\0") + b"ustar\x0000", "tar"),
    ],
)
def test_content_of_another_kind_is_named(tmp_path, head, word):
    problem, _ = foreign_content(head)
    assert word in problem
    file = tmp_path / "x.bin"
    file.write_bytes(head)
    with pytest.raises(DataError) as caught, file_errors(file):
        raise ValueError("header too large")
    assert caught.value.problem == problem


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a": \n x}',
        b'"\xff"',
        b"[" * 100_000,
        b"1" * 5000,
        b"",
        '{"a": 1}'.encode("utf-16"),
        b'{"a": "\\ud83d"}',
        b'{"\\ud83d": 1}',
    ],
)
def test_json_that_is_not_sound_is_an_error_with_file_and_record(raw):
    with pytest.raises(LayoutError) as caught:
        parse_json(raw, file="a.json", record=7, error=LayoutError)
    assert (caught.value.file, caught.value.record) == ("a.json", 7)


def test_sound_json_is_read_with_or_without_a_byte_order_mark():
    assert parse_json(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}', file=None) == {"a": "\U0001f600"}
    assert parse_json('"\\ud83d"', file=None, surrogates=True) == "\ud83d"


def test_a_key_that_occurs_twice_is_found_in_linear_time():
    raw = "{" + ",".join(f'"{n}": 0' for n in range(200_000)) + ', "7": 1}'
    with pytest.raises(DataError) as caught:
        parse_json(raw, file="a.json", unique_keys=True)
    assert "'7'" in caught.value.problem
    assert parse_json(raw, file="a.json")["7"] == 1


def test_json_files_name_line_and_column(tmp_path):
    (tmp_path / "a.json").write_text('{"a": \n x}')
    with pytest.raises(DataError) as caught:
        read_json(tmp_path / "a.json")
    assert "line 2 column 2" in caught.value.problem
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(DataError) as caught:
        read_json_object(tmp_path / "a.json")
    assert caught.value.value == [1]
    write_jsonl(tmp_path / "c.jsonl", [1, {"a": 2}])
    assert list(read_jsonl(tmp_path / "c.jsonl")) == [(1, 1), (2, {"a": 2})]
    (tmp_path / "c.jsonl").write_text("1\n\n{\n")
    with pytest.raises(DataError) as caught:
        list(read_jsonl(tmp_path / "c.jsonl"))
    assert (caught.value.file, caught.value.record) == (str(tmp_path / "c.jsonl"), "line 3")


def test_the_expected_kind_of_content_is_not_foreign(tmp_path):
    file = tmp_path / "x.zip"
    file.write_bytes(b"PK\x03\x04 and no more")
    assert foreign_content(file.read_bytes(), "zip") is None
    with pytest.raises(DataError) as caught, file_errors(file, kind="zip"):
        raise ValueError("bad magic")
    assert "bad magic" in caught.value.problem


@pytest.mark.parametrize("content", [b"caf\xe9", "text".encode("utf-16"), b"\x1f\x8b\x08", b""])
def test_text_that_is_not_utf8_is_refused_with_the_file_and_a_remedy(content, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    if content:
        with pytest.raises(DataError) as caught:
            read_text(tmp_path / "a.txt")
        assert caught.value.file == str(tmp_path / "a.txt") and caught.value.hint
    else:
        assert read_text(tmp_path / "a.txt") == ""


def test_utf16_without_a_byte_order_mark_is_refused():
    with pytest.raises(DataError) as caught:
        parse_json('{"a": 1}'.encode("utf-16-le"), file="a.json")
    assert "UTF-16" in caught.value.problem


def test_a_value_over_several_lines_is_named_as_such(tmp_path):
    (tmp_path / "a.jsonl").write_text('{\n "a": 1\n}\n')
    with pytest.raises(DataError) as caught:
        list(read_jsonl(tmp_path / "a.jsonl"))
    assert caught.value.record == "line 1" and "several lines" in caught.value.hint


def test_a_line_over_the_limit_is_refused_before_it_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_RECORD_BYTES", 1000)
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n"' + b"x" * 5000)
    with pytest.raises(DataError) as caught:
        list(read_jsonl(tmp_path / "a.jsonl"))
    assert caught.value.record == "line 2" and "1,000" in caught.value.expected


def test_a_log_loses_the_line_that_a_kill_cut_short_and_nothing_else(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a":')
    assert [row["a"] for _, row in read_jsonl(tmp_path / "a.jsonl", appended=True)] == [1, 2]
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a":\n{"a": 3}\n')
    with pytest.raises(DataError) as caught:
        list(read_jsonl(tmp_path / "a.jsonl", appended=True))
    assert caught.value.record == "line 2"


def test_zero_bytes_at_the_end_of_a_file_are_no_empty_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + bytes(100))
    with pytest.raises(DataError) as caught:
        list(read_jsonl(tmp_path / "a.jsonl"))
    assert caught.value.record == "line 2"
