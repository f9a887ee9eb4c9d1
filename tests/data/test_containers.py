"""Data files of another type than their extension, with extra content, or damaged: one error that names the file."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.good import GOOD
from tests.data.shards import PIXELS, refusal, write_lines, write_list, write_parquet, write_tar
from tests.pages import numbers
from vila.core.errors import DataError
from vila.data.dataset import DatasetEntry, open_dataset
from vila.data.readers import json as json_scanner
from vila.data.readers import tar as tar_scanner
from vila.data.readers.json import scan_json
from vila.data.readers.parquet import row_group_sizes
from vila.data.readers.records import open_records
from vila.data.readers.tar import scan_tar

LLAVA = {"id": "0", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
MEMBERS = [("a.jpg", PIXELS), ("a.txt", "A cat."), ("b.jpg", PIXELS * 100), ("b.txt", "B")]


def spans(scan, path):
    return [tuple(map(int, row)) for rows in scan(path, lambda amount: None) for row in rows]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (json.dumps([LLAVA]).encode("utf-16"), "UTF-16"),
        (json.dumps([LLAVA]).encode("utf-16-le"), "zero bytes"),
        (json.dumps(LLAVA, indent=2).encode(), "several lines"),
        (b"\xef\xbb\xbf" + json.dumps(LLAVA, indent=2).encode(), "several lines"),
        ((json.dumps(LLAVA, indent=2) + "\n").encode() * 20, "several lines"),
        (json.dumps({"data": [LLAVA]}, indent=1).encode(), "'data'"),
        (json.dumps({"data": [LLAVA] * 1000}).encode(), "'data'"),
        (json.dumps({"data": [LLAVA]}).encode(), "'data'"),
        (json.dumps({"info": {"a": [{"b": 1}]}, "images": [{}], "annotations": [{}]}, indent=1).encode(), "'annotat"),
        (gzip.compress(b"[]", mtime=0), "gzip"),
        (bz2.compress(b"[]"), "bzip2"),
        (lzma.compress(b"[]"), "xz"),
        (b"PAR1" + bytes(100) + b"PAR1", "parquet"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "Git LFS"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"image,question,answer\na.png,What?,A cat\nb.png,Who?,A dog\n", "CSV"),
        (b"id: 1\nimage: a.png\n", "YAML"),
        (b'1\n"two"\n', "not of objects"),
        (b"once upon a time\nthere was\n", "not JSON"),
        (bytes(5000), "zero bytes"),
        (b"\xff\xd8\xff\xe0 not text\n", "neither text"),
    ],
)
def test_text_that_is_neither_a_list_nor_json_lines_is_one_error_of_the_file(content, word, tmp_path):
    path = tmp_path / "d.json"
    path.write_bytes(content)
    error = refusal(lambda: open_records(path))
    assert error.file == str(path) and error.record is None
    assert word in error.problem and error.hint


def test_a_tar_named_json_is_an_error(tmp_path):
    path = write_tar(tmp_path / "d.json", MEMBERS)
    assert "tar" in refusal(lambda: open_records(path)).problem


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}\n{"a": \n{"a": 2}\n',
        '{"data": [{"a": 1}]}\n{"data": []}',
        '{"messages": [{"role": "user"}]}\n{"a": 1}',
        'not JSON\n{"a": 1}\n',
        '{"a": "' + "x" * 200_000 + '"}\n{"b": [{"c": 1}]}',
        '{"images": [' + ", ".join(['{"bytes": "x"}'] * 20_000) + '], "texts": []}',
    ],
)
def test_a_damaged_line_is_not_an_error_of_the_file(text, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(text)
    assert len(spans(scan_json, path)) == len(text.strip().split("\n"))


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"a": 1}, null, {"b": 2}]', 1),
        ('[5, {"a": 1}]', 0),
        ('[{"a": 1} x, {"b": 2}]', 1),
        ('["a, b", {"x": 1}]', 0),
        ('[{"a": 1}, {"b": 2}, 7]', 2),
        ('[{"a": 1}]\n[{"a": 2}]', "one list"),
        ('[{"a": 1}]\0\0', "one list"),
        ('[{"a": 1}]\n# end', "one list"),
        ('[{"a": 1}}', "]"),
        ('[{"a": 1},]', [1, 1]),
        ('[{"a": 1}{"a": 1}]', [2, 0]),
    ],
)
def test_anything_but_objects_in_a_list_is_an_error(text, problem, block, tmp_path, monkeypatch):
    monkeypatch.setattr(json_scanner, "BLOCK", block)
    path = tmp_path / "d.json"
    path.write_text(text)
    error = refusal(lambda: spans(scan_json, path))
    assert error.file == str(path)
    # The element that is no object, what was expected at the end, or the numbers of objects and of commas.
    assert problem in (error.record, error.expected, numbers(error.problem))


def test_zero_bytes_after_json_lines_are_an_invalid_record(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"a": 1}\n' + bytes(64))
    rows = open_records(path)
    assert len(rows) == 2 and rows[0].value == {"a": 1}
    refusal(lambda: rows[1])


@pytest.mark.parametrize("block", [1, 5, 64, 1 << 20])
def test_lines_longer_than_a_block_are_found(block, tmp_path, monkeypatch):
    monkeypatch.setattr(json_scanner, "BLOCK", block)
    rows = [{"n": n, "text": "x" * (n * 7)} for n in range(30)]
    path = tmp_path / "d.jsonl"
    path.write_text("\n\n \n".join(map(json.dumps, rows)) + "\n \t\r\n")
    content = path.read_bytes()
    assert [json.loads(content[a : a + b]) for a, b in spans(scan_json, path)] == rows


@pytest.mark.parametrize("text", ['{"a": "%s"}\n', '[{"a": "%s"}]', '{"a": "%s', '[{"a": "%s'])
@pytest.mark.parametrize("block", [64, 1 << 20])
def test_a_record_over_the_limit_is_an_error_with_its_number(text, block, tmp_path, monkeypatch):
    monkeypatch.setattr(json_scanner, "BLOCK", block)
    monkeypatch.setattr(json_scanner, "MAX_RECORD_BYTES", 1000)
    path = tmp_path / "d.json"
    small = '{"a": 1}'
    head = f"[{small}, " if text.startswith("[") else f"{small}\n"
    path.write_text(head + text.lstrip("[") % ("x" * 2000))
    error = refusal(lambda: spans(scan_json, path))
    assert (error.file, error.record) == (str(path), 1) and "1,000" in error.expected


def test_a_line_of_many_blocks_takes_linear_time_and_little_memory(tmp_path, monkeypatch):
    import tracemalloc

    monkeypatch.setattr(json_scanner, "BLOCK", 1 << 12)
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"a": "' + b"x" * (1 << 24) + b'"}\n')
    tracemalloc.start()
    assert spans(scan_json, path) == [(0, path.stat().st_size)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_concatenated_archives_are_read_to_the_end(tmp_path):
    one = write_tar(tmp_path / "1.tar", MEMBERS).read_bytes()
    two = write_tar(tmp_path / "2.tar", [("c.jpg", PIXELS), ("c.txt", "C")]).read_bytes()
    path = tmp_path / "d.tar"
    path.write_bytes(one + two + one[:0])
    rows = open_records(path)
    assert [rows[n].read_text("txt") for n in range(len(rows))] == ["A cat.", "B", "C"]
    path.write_bytes(one + two + one)
    error = refusal(lambda: open_records(path))
    assert error.record == "member 'a.jpg'"


@pytest.mark.parametrize("garbage", [b"x", b"\n", b"PK\x03\x04" * 300, b"\x1f\x8b" + bytes(600), b"\xff" * 512])
@pytest.mark.parametrize("zeros", [512, 1024, 10240])
def test_bytes_after_the_end_of_an_archive_are_an_error(garbage, zeros, tmp_path):
    whole = write_tar(tmp_path / "d.tar", MEMBERS).read_bytes().rstrip(b"\0")
    end = -(-len(whole) // 512) * 512
    path = tmp_path / "d.tar"
    path.write_bytes(whole.ljust(end + zeros, b"\0") + garbage)
    error = refusal(lambda: open_records(path))
    assert error.file == str(path) and f"from byte {end + zeros}" in error.problem


def test_a_cut_archive_before_another_one_is_an_error(tmp_path):
    one = write_tar(tmp_path / "1.tar", MEMBERS).read_bytes()
    path = tmp_path / "d.tar"
    path.write_bytes(one + one[:700])
    assert refusal(lambda: open_records(path)).file == str(path)


def header(name=b"a.txt", size=b"00000000000", kind=b"0", rest=b""):
    """A header block with a right checksum."""
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0") + b"00000000000\0"
    block += b" " * 8 + kind + bytes(100) + b"ustar\0" + b"00" + rest
    block = block.ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


END = bytes(1024)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (header(size=b"\xff" * 11 + b"\x00"), "size"),  # CVE-2025-8194: tarfile never ends
        (header(size=b"\xff" * 12), "size"),
        (header(size=b"-0000001000"), "size"),
        (header(size=b"0x1000"), "size"),
        (header(size=b"\x80" + b"\x7f" * 11), "end-of-archive"),
        (header(size=b"77777777777"), "end-of-archive"),
        (header(name=b"././@LongLink", kind=b"L", size=b"77777777777"), "end-of-archive"),
        (header(name=b"././@LongLink", kind=b"L", size=b"\xff" * 12), "size"),
        (header(kind=b"x", size=b"00000000020") + b"16 size=-100000\n".ljust(512, b"\0") + header(), "size"),
        (header(kind=b"x", size=b"00000000020") + b"99 size=100000\n".ljust(512, b"\0") + header(), "pax"),
        (header(kind=b"x", size=b"00000000020") + b"0 a=b\n".ljust(512, b"\0") + header(), "pax"),
        (header(kind=b"x", size=b"00000000020") + b"16 size=99999999".ljust(512, b"\0") + header(), "pax"),
        (header(kind=b"S"), "sparse"),
        (
            header(kind=b"x", size=b"00000000030") + b"22 GNU.sparse.major=1\n\0\0".ljust(512, b"\0") + header(),
            "sparse",
        ),
        (header(kind=b"1"), "hard link"),
        (header(kind=b"2"), "symbolic link"),
        (header(kind=b"3"), "device"),
        (header(kind=b"6"), "pipe"),
        (header(kind=b"M"), "multi-volume"),
        (header(kind=b"Q"), "unknown type"),
    ],
)
def test_members_that_are_not_regular_files_and_wrong_sizes_are_errors(content, word, tmp_path):
    path = tmp_path / "d.tar"
    path.write_bytes(header(b"0.txt") + content + END)
    error = refusal(lambda: open_records(path))
    assert error.file == str(path) and error.hint
    assert word in error.problem


def test_a_name_over_the_limit_is_an_error_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_scanner, "MAX_HEADER_BYTES", 1000)
    path = tmp_path / "d.tar"
    for kind in (b"L", b"x"):
        path.write_bytes(header(kind=kind, size=b"%011o" % 2000) + b"n" * 2048 + header() + END)
        assert {2000, 1000} <= set(numbers(refusal(lambda: open_records(path)).problem))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_and_sizes_are_those_of_tarfile_in_every_format(form, tmp_path):
    names = ["a.txt", "é/b.txt", "f" * 90 + "/" + "g" * 90 + ".txt", "./h.txt", "d/" * 20 + "e.TXT"]
    if form != tarfile.USTAR_FORMAT:
        names += ["n" * 300 + ".txt", "中" * 60 + ".txt"]
    path = tmp_path / "d.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = number * 300
            tar.addfile(info, io.BytesIO(bytes([65 + number]) * info.size))
            folder = tarfile.TarInfo(f"folder{number}")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
    found = list(tar_scanner.tar_members(path))
    with tarfile.open(path) as tar:
        expected = [member for member in tar.getmembers() if member.isfile()]
    assert [(m.name, m.offset, m.size) for m in found] == [(m.name, m.offset_data, m.size) for m in expected]
    rows = open_records(path)
    assert [rows[n].read_text("txt") for n in range(len(rows))] == [chr(65 + n) * n * 300 for n in range(len(names))]


def test_names_that_are_not_utf8_can_be_printed(tmp_path):
    path = tmp_path / "d.tar"
    path.write_bytes(header(b"caf\xe9.txt") + END)
    assert open_records(path)[0].name.encode()


def test_text_of_a_shard_over_the_limit_is_an_error_with_the_member(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_scanner, "MAX_RECORD_BYTES", 1000)
    path = write_tar(tmp_path / "d.tar", [("a.jpg", b"x" * 2000), ("a.json", "x" * 2000)])
    assert refusal(lambda: open_records(path)).record == "member 'a.json'"


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (gzip.compress(bytes(10240), mtime=0), "gzip"),
        (b"PK\x03\x04" + bytes(600), "zip"),
        (b"PAR1" + bytes(600), "parquet"),
        (b'{"a": 1}\n' * 100, "text"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (bytes(20480), "zero bytes"),
        (b"\x01" * 1024, "not a tar archive"),
    ],
)
def test_a_file_named_tar_that_is_not_one_is_an_error(content, word, tmp_path):
    path = tmp_path / "d.tar"
    path.write_bytes(content)
    error = refusal(lambda: open_records(path))
    assert error.file == str(path) and word in error.problem and error.hint


def test_an_archive_without_members_has_no_samples(tmp_path):
    assert spans(scan_tar, write_tar(tmp_path / "d.tar", [])) == []
    assert spans(scan_tar, write_tar(tmp_path / "e.tar", [("BZh.jpg", b"1")])) == [(0, 1024)]


def test_an_index_with_a_flipped_bit_anywhere_is_built_again(tmp_path, own_cache):
    path = write_lines(tmp_path / "d.jsonl", [{"n": n} for n in range(20)])
    expected = [row.value for row in map(open_records(path).__getitem__, range(20))]
    (file,) = (own_cache / "index").iterdir()
    whole = file.read_bytes()
    for place in [*range(0, 200, 7), *range(4096, len(whole), 5)]:
        for bit in (0, 7):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            file.write_bytes(damaged)
            rows = open_records(path)
            assert [rows[n].value for n in range(len(rows))] == expected, (place, bit)


@pytest.mark.parametrize(
    "damaged", [b"[" * 4096, b'{"length": "x"}', b"[]", b'{"length": 1e999, "crc32": 0}', b"1" * 4096, b"\xff" * 4096]
)
def test_a_damaged_index_file_is_built_again(damaged, tmp_path, own_cache):
    path = write_list(tmp_path / "d.json", [{"n": 1}])
    open_records(path)
    (file,) = (own_cache / "index").iterdir()
    file.write_bytes(damaged.ljust(4096) + bytes(16))
    assert open_records(path)[0].value == {"n": 1}


def test_concatenated_parquet_files_are_an_error(tmp_path):
    parts = [write_parquet(tmp_path / f"{n}.parquet", [{"inputs": "x" * n, "targets": "y"}] * n) for n in (3, 7)]
    path = tmp_path / "d.parquet"
    for order in (parts, parts[::-1]):
        path.write_bytes(b"".join(part.read_bytes() for part in order))
        assert "concatenated" in refusal(lambda: open_records(path)).problem


@pytest.mark.parametrize("garbage", [b"x", bytes(8), b"PAR1", b"more\n" * 100])
def test_bytes_after_parquet_are_an_error(garbage, tmp_path):
    path = write_parquet(tmp_path / "d.parquet", [{"inputs": "x", "targets": "y"}] * 3)
    path.write_bytes(path.read_bytes() + garbage)
    error = refusal(lambda: open_records(path))
    assert error.file == str(path) and error.hint


def test_a_damaged_footer_is_an_error_with_the_file(tmp_path):
    path = write_parquet(tmp_path / "d.parquet", [{"inputs": "x", "targets": "y"}] * 3)
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    refused = 0
    for place in range(footer, len(whole), 3):
        for value in (0, 127, 255):
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                assert sum(row_group_sizes(path)) == 3
            except DataError as error:
                refused += 1
                assert error.file == str(path) and error.hint
    assert refused > 50


def test_columns_outside_the_file_are_an_error(tmp_path):
    path = write_parquet(tmp_path / "d.parquet", [{"inputs": "x" * 500, "targets": "y"}] * 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + whole[300:])
    error = refusal(lambda: open_records(path))
    assert error.file == str(path) and error.record == "row group 1"


def test_parquet_with_page_indexes_is_read(tmp_path):
    table = pa.Table.from_pylist([{"inputs": f"x{n}", "targets": "y"} for n in range(100)])
    pq.write_table(table, tmp_path / "d.parquet", write_page_index=True, row_group_size=10)
    assert open_records(tmp_path / "d.parquet")[99].value["inputs"] == "x99"


def test_a_dictionary_of_bytes_and_views_stay_in_the_file(tmp_path):
    array = pa.array([PIXELS, b"two", PIXELS])
    path = tmp_path / "d.parquet"
    pq.write_table(
        pa.table({"image": array.dictionary_encode(), "text": pa.array(["a"] * 3).dictionary_encode()}), path
    )
    row = open_records(path)[2]
    assert row.value["image"].read() == PIXELS and row.value["text"] == "a"


def test_text_in_parquet_that_is_not_utf8_is_an_error(tmp_path):
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\4\0\0\0"), pa.py_buffer(b"caf\xe9")])
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"inputs": bad, "targets": ["y"]}), path)
    error = refusal(lambda: open_records(path)[0])
    assert (error.file, error.record) == (str(path), 0)


def test_two_columns_of_one_name_are_an_error(tmp_path):
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["inputs", "inputs"]), path)
    error = refusal(lambda: open_records(path)[0])
    assert (error.file, error.field) == (str(path), "inputs")


@pytest.mark.parametrize(
    "content", [b"", b'{"a": 1}\n' * 20, gzip.compress(b"PAR1", mtime=0), b"PAR1" + bytes(100) + b"PAR1"]
)
def test_a_file_named_parquet_that_is_not_one_is_an_error(content, tmp_path):
    path = tmp_path / "d.parquet"
    path.write_bytes(content)
    error = refusal(lambda: open_records(path))
    assert error.file == str(path) and error.hint


def entry(form, path, **options):
    return open_dataset(DatasetEntry(form, str(path), options=options))


READ_ALIKE = {
    ("messages", "webdataset"), ("llava_json", "llava_json_v15", "messages", "video_json"),
    ("vflan", "flan", "webdataset"), ("coyo", "webdataset"), ("webdataset", "vflan", "coyo"),
}  # fmt: skip


@pytest.mark.parametrize("form", sorted({form for form, _ in GOOD}))
@pytest.mark.parametrize("case", GOOD, ids="-".join)
def test_a_file_in_another_format_is_one_error_with_the_right_format(form, case, tmp_path):
    own, container = case
    path = GOOD[case](tmp_path)
    if form == own:
        assert len(entry(form, path)) >= 3
    elif not any({form, own} <= set(alike) for alike in READ_ALIKE):
        error = refusal(lambda: entry(form, path))
        assert error.file == str(path) and error.record is None
        assert f"format {own}" in error.hint or f"'{own}'" in (error.problem + error.hint), str(error)


@pytest.mark.parametrize(
    ("records", "word"),
    [
        ([{"instruction": "i", "input": "", "output": "o"}], "Alpaca"),
        ([{"data": [LLAVA]}], "'data'"),
        ([{"speech": []}] * 50, "'speech'"),
        ([{}] * 3, "empty"),
    ],
)
def test_records_of_no_format_are_one_error_with_their_content(records, word, tmp_path):
    path = write_lines(tmp_path / "d.jsonl", records)
    error = refusal(lambda: entry("messages", path))
    assert error.file == str(path) and word in error.problem


def test_one_valid_record_or_damaged_values_are_not_an_error_of_the_file(tmp_path):
    good = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    path = write_lines(tmp_path / "d.jsonl", [{"data": [{}]}] * 3 + [good] * 5)
    assert len(entry("llava_json", path)) == 8
    path = write_lines(tmp_path / "e.jsonl", [{"conversations": [{"from": "gpt", "value": True}]}] * 3)
    assert len(entry("llava_json", path)) == 3


@pytest.mark.parametrize("name", ["d.csv", "d.ndjson", "d.JSONL", "d.xyz"])
def test_a_file_of_another_extension_is_an_error_with_a_hint(name, tmp_path):
    write_lines(tmp_path / name, [LLAVA])
    error = refusal(lambda: entry("llava_json", tmp_path / name))
    assert error.file == str(tmp_path / name) and bool(error.hint) == (name != "d.xyz")
    assert ".jsonl" in refusal(lambda: entry("llava_json", tmp_path / name)).expected


def test_a_directory_without_shards_is_an_error_with_its_extensions(tmp_path):
    write_lines(tmp_path / "d.jsonl", [LLAVA])
    assert refusal(lambda: entry("webdataset", tmp_path)).value == [".jsonl"]


def test_a_filter_keeps_damaged_records_so_that_they_are_reported(tmp_path):
    rows = [{"text_list": ["a"], "image_info": [{"matched_text_index": 0, "image_name": "p.png"}]}, {"text_list": 3}]
    path = write_lines(tmp_path / "d.jsonl", [rows[0], rows[1], {"text_list": ["a"], "image_info": []}])
    source = entry("mmc4", path, without_images="drop")
    assert len(source) == 2 and refusal(lambda: source[1]).record == 1
