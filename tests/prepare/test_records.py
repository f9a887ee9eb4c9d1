"""Records of published files in every compression format, and broken files."""

import gzip
import io
import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vila.core import reading
from vila.core.errors import DataError
from vila.prepare import records
from vila.prepare.records import read_parquet, read_rows, text_problem

ROWS = [{"a": n, "t": "\u00e9" * n} for n in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zipped(content: bytes, name: str = "x.jsonl") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, text in ((name, content), ("readme.txt", "no rows")):
            # The same bytes at any time: they are names of parameters.
            archive.writestr(zipfile.ZipInfo(member), text, zipfile.ZIP_DEFLATED)
    return stream.getvalue()


@pytest.mark.parametrize("name, content", [
    ("x.jsonl", LINES), ("x.jsonl.gz", gzip.compress(LINES, mtime=0)), ("x.jsonl.zip", zipped(LINES)),
    ("x.jsonl", b"\n" + LINES.rstrip() + b"\n\n"),
])  # fmt: skip
def test_records_are_equal_in_every_format(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [row for _, row in read_rows(tmp_path / name)] == ROWS


def test_parquet_rows_have_numbers_and_the_requested_columns(tmp_path):
    pq.write_table(pa.table({"a": list(range(3000)), "b": ["x"] * 3000}), tmp_path / "x.parquet", row_group_size=700)
    rows = list(read_parquet(tmp_path / "x.parquet", ["a"]))
    assert rows[0] == (1, {"a": 0}) and rows[-1] == (3000, {"a": 2999}) and len(rows) == 3000


@pytest.mark.parametrize("name, content, record, word", [
    ("x.jsonl", LINES[:-4], "line 5", "not JSON"),
    ("x.jsonl", b'{"a": 1}\n[1]\n', "line 2", ""),
    ("x.jsonl", b'{"a": \xff}\n', "line 1", "UTF-8"),
    ("x.jsonl", b"[" * 100_000 + b"\n", "line 1", "JSON ("),
    ("x.jsonl", b'{"a": 1' + b"0" * 5000 + b"}\n", "line 1", "JSON ("),
    ("x.jsonl", LINES + bytes(100), "line 6", "zero bytes"),
    ("x.jsonl", LINES.decode().encode("utf-16"), None, "UTF-16"),
    ("x.jsonl", gzip.compress(LINES, mtime=0), None, "gzip"),
    ("x.jsonl.gz", gzip.compress(LINES, mtime=0)[:-12], "line 5", "EOFError"),
    ("x.jsonl.gz", gzip.compress(LINES, mtime=0) + b"more", "line 6", "BadGzipFile"),
    ("x.jsonl.gz", LINES, "line 1", "BadGzipFile"),
    ("x.jsonl.gz", zipped(LINES), "line 1", "zip"),
    ("x.zip", zipped(LINES)[:60], None, "BadZipFile"),
    ("x.zip", zipped(LINES, "x.bin"), None, "no .jsonl file"),
    ("x.zip", zipped(LINES) + b"more", None, "after"),
    ("x.zip", b"more" + zipped(LINES), None, "before"),
    ("x.zip", zipped(LINES) + zipped(LINES), None, "before"),
    ("x.zip", gzip.compress(LINES, mtime=0), None, "gzip"),
    ("x.zip", zipped(LINES).replace(b"\x14\0\0\0\x08\0", b"\x14\0\x01\0\x08\0"), "member 'x.jsonl'", "encrypted"),
    ("x.parquet", b"PAR1 and no more", None, "damaged"),
    ("x.parquet", LINES, None, "damaged"),
    ("x.csv", b"a,b", None, ""),
])  # fmt: skip
def test_a_broken_file_is_refused_by_name(tmp_path, name, content, record, word):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(tmp_path / name))
    error = caught.value
    assert error.file.removesuffix(" (x.jsonl)") == str(tmp_path / name)
    assert error.record == record and word in error.problem


def test_all_gzip_members_are_read_and_macos_files_in_a_zip_are_not(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(LINES, mtime=0) + gzip.compress(LINES, mtime=0))
    assert [row for _, row in read_rows(tmp_path / "x.jsonl.gz")] == ROWS * 2
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("x.jsonl", LINES)
        archive.writestr("__MACOSX/._x.jsonl", b"\0\5\x16\7")
        archive.comment = b"made by hand"
    assert [row for _, row in read_rows(tmp_path / "x.zip")] == ROWS


def test_a_lone_surrogate_is_read_and_reported(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": "\\ud83d"}\n{"a": "\\ud83d\\ude00"}\n')
    assert [bool(text_problem(row)) for _, row in read_rows(tmp_path / "x.jsonl")] == [True, False]


def test_parquet_with_text_that_is_not_utf8_is_named(tmp_path):
    buffers = [None, pa.py_buffer(b"\0\0\0\0\4\0\0\0"), pa.py_buffer(b"caf\xe9")]
    pq.write_table(pa.table({"a": pa.Array.from_buffers(pa.string(), 1, buffers)}), tmp_path / "x.parquet")
    with pytest.raises(DataError) as caught:
        list(read_rows(tmp_path / "x.parquet"))
    assert caught.value.file == str(tmp_path / "x.parquet") and caught.value.record


@pytest.mark.parametrize("name, pack", [("x.jsonl.zip", zipped), ("x.jsonl.gz", gzip.compress)])
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch, name, pack):
    monkeypatch.setattr(records, "_MIN_LIMIT_BYTES", 100_000)
    (tmp_path / name).write_bytes(pack(b'{"a": 1}\n' * 200_000))
    read = 0
    with pytest.raises(DataError) as caught:
        for _ in read_rows(tmp_path / name):
            read += 1
    assert caught.value.file.startswith(str(tmp_path / name)) and caught.value.expected
    assert 0 < read < 199_000


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_RECORD_BYTES", 1000)
    (tmp_path / "x.jsonl").write_bytes(b'{"a": "' + b"x" * 5000)
    with pytest.raises(DataError) as caught:
        list(read_rows(tmp_path / "x.jsonl"))
    assert caught.value.record == "line 1" and "1,000" in caught.value.expected
