"""Rows of published files in every packing, and every way in which such a file can be broken."""

import gzip
import io
import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vila.core.errors import DataError
from vila.prepare import records
from vila.prepare.records import read_rows

ROWS = [{"a": n, "t": "\u00e9" * n} for n in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zipped(content: bytes, name: str = "x.jsonl") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
        archive.writestr("readme.txt", "no rows")
    return stream.getvalue()


@pytest.mark.parametrize("name, content", [
    ("x.jsonl", LINES), ("x.jsonl.gz", gzip.compress(LINES)), ("x.jsonl.zip", zipped(LINES)),
    ("x.jsonl", b"\n" + LINES.rstrip() + b"\n\n"),
])  # fmt: skip
def test_rows_are_the_same_in_every_packing(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [row for _, row in read_rows(tmp_path / name)] == ROWS


def test_parquet_rows_have_numbers_and_only_the_columns_asked_for(tmp_path):
    pq.write_table(pa.table({"a": list(range(3000)), "b": ["x"] * 3000}), tmp_path / "x.parquet", row_group_size=700)
    rows = list(read_rows(tmp_path / "x.parquet", ["a"]))
    assert rows[0] == (1, {"a": 0}) and rows[-1] == (3000, {"a": 2999}) and len(rows) == 3000


@pytest.mark.parametrize("name, content, message", [
    ("x.jsonl", LINES[:-4], r"x.jsonl line 5: not JSON .*may be cut short, download it again"),
    ("x.jsonl", b'{"a": 1}\n[1]\n', "line 2: list where an object was expected"),
    ("x.jsonl", b'{"a": \xff}\n', "line 1: not JSON"),
    ("x.jsonl", b"[" * 100_000 + b"\n", "line 1: not JSON"),
    ("x.jsonl.gz", gzip.compress(LINES)[:-12], "cannot be unpacked .*download it again"),
    ("x.jsonl.gz", LINES, "line 1: cannot be unpacked"),
    ("x.zip", zipped(LINES)[:60], "cannot be unpacked .*download it again"),
    ("x.zip", zipped(LINES, "x.bin"), "holds no .jsonl file"),
    ("x.zip", zipped(LINES).replace(b"\x14\0\0\0\x08\0", b"\x14\0\x01\0\x08\0"), "cannot be unpacked"),
    ("x.parquet", b"PAR1 and no more", "not a whole parquet file"),
    ("x.csv", b"a,b", "expected .jsonl, .jsonl.gz, .jsonl.zip or .parquet"),
])  # fmt: skip
def test_a_broken_file_is_an_error_that_names_it(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(tmp_path / name))
    assert name in str(caught.value)


@pytest.mark.parametrize("name, pack", [("x.jsonl.zip", zipped), ("x.jsonl.gz", gzip.compress)])
def test_a_bomb_is_refused_before_it_is_unpacked_whole(tmp_path, monkeypatch, name, pack):
    monkeypatch.setattr(records, "_FREE_BYTES", 100_000)
    (tmp_path / name).write_bytes(pack(b'{"a": 1}\n' * 200_000))
    read = 0
    with pytest.raises(DataError, match="unpacks to over .* refused as a bomb"):
        for _ in read_rows(tmp_path / name):
            read += 1
    assert 0 < read < 199_000


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 1000)
    (tmp_path / "x.jsonl").write_bytes(b'{"a": "' + b"x" * 5000)
    with pytest.raises(DataError, match="line 1: longer than 1,000 bytes"):
        list(read_rows(tmp_path / "x.jsonl"))
