"""Files that preparation writes and reads back: damage is an error that names file and field, or is done over."""

import json
import shutil

import pytest

from vila.core.errors import ConfigError, DataError
from vila.prepare.coyo import read_selection
from vila.prepare.download import DownloadedImage, DownloadJournal, Failure
from vila.prepare.merge_shards import merge_shards, read_index
from vila.prepare.work_units import Counts, check_settings, unit_path, unit_record_path, write_unit

ODD = ["[" * 5000, "[]", "{", "\0" * 100, '"x"', "1" * 5000, "\ud83d".encode(errors="surrogatepass")]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def part(out, unit="a", samples=5):
    counts = Counts()
    counts.read = counts.written = samples
    write_unit(out, unit, "text", [{"n": n} for n in range(samples)], counts, [{"row": 1, "reason": "r"}])


def gathered(out):
    return merge_shards(out, "flan", "text", ["a"], per_shard=2)


def refusal(read, kind=DataError):
    with pytest.raises(kind) as caught:
        read()
    return caught.value


@pytest.mark.parametrize("content", ODD)
def test_own_json_that_holds_something_else_names_the_file(content, tmp_path):
    index = write(tmp_path / "index.json", content)
    assert refusal(lambda: read_index(tmp_path)).file == str(index)
    selection = write(tmp_path / "x.selected.json", content)
    assert refusal(lambda: read_selection(selection)).file == str(selection)
    settings = write(tmp_path / "settings.json", content)
    assert refusal(lambda: check_settings(tmp_path, {"a": 1}), ConfigError).file == str(settings)
    part(tmp_path / "o")
    record = write(unit_record_path(tmp_path / "o", "a"), content)
    assert refusal(lambda: gathered(tmp_path / "o")).file == str(record)


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("counts", 3, "counts"),
        ("counts", {"in": "5", "out": 5}, "counts.in"),
        ("counts", {"in": 5, "out": 5, "dropped": {"x": -1}}, "counts.dropped.x"),
        ("shards", {}, "shards"),
        ("shards", [3], "shards"),
        ("shards", [{"samples": 1.5}], "shards[0].samples"),
    ],
)
def test_an_index_with_a_value_of_another_type_names_the_field(name, value, field, tmp_path):
    part(tmp_path)
    index = gathered(tmp_path)
    write(tmp_path / "index.json", json.dumps({**index, name: value}))
    assert refusal(lambda: gathered(tmp_path)).field == field


def test_a_part_that_is_not_as_it_was_written_is_named(tmp_path):
    part(tmp_path)
    whole = shutil.copytree(tmp_path, tmp_path / "copy")
    path = unit_path(whole, "a", "text")
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    assert refusal(lambda: gathered(whole)).file == str(path)
    path.write_bytes(content.replace(b'{"n": 0}\n{', b'{"n": 0} {'))  # of the same size, with a line less
    assert refusal(lambda: gathered(whole)).hint
    path.unlink()
    assert refusal(lambda: gathered(whole)).file == str(path)
    assert gathered(tmp_path)["counts"]["out"] == 5


def test_a_list_of_failures_that_is_damaged_is_named(tmp_path):
    part(tmp_path)
    path = write(tmp_path / "parts" / "a.failures.jsonl", '{"row": 1}\n{"ro\n')
    error = refusal(lambda: gathered(tmp_path))
    assert (error.file, error.record) == (str(path), "line 2")


def journal(path):
    with DownloadJournal(path) as spool:
        spool.append([(f"u{n}", DownloadedImage(bytes([n]) * 50, "jpg")) for n in range(4)])
        spool.append([("f", Failure("http", "404", 2))])
    return path.read_bytes()


def test_a_journal_with_a_flipped_bit_loses_that_frame_and_says_so(tmp_path):
    path = tmp_path / "u.spool"
    whole = journal(path)
    for place in range(0, len(whole), 11):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with DownloadJournal(path) as spool:
            known = [n for n in range(4) if f"u{n}" in spool]
            assert known == list(range(len(known)))
            assert all(spool.read(f"u{n}").content == bytes([n]) * 50 for n in known)
            assert spool.dropped_bytes > 0 or len(known) == 4


@pytest.mark.parametrize(
    "tail",
    [
        b"[" * 5000 + b"\n",
        b'{"url": "x", "size": -1, "sha256": ""}\n',
        b'{"url": "x", "size": 1e300, "sha256": ""}\n',
        b'{"url": "x", "size": 4611686018427387904, "sha256": ""}\n',
        b'{"url": ["x"], "size": 0, "sha256": ""}\n',
        b'{"url": "x", "size": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}\n',
        bytes(5000),
        b"[]\n",
    ],
)
def test_whatever_follows_the_frames_of_a_journal_is_dropped(tail, tmp_path):
    path = tmp_path / "u.spool"
    whole = journal(path)
    path.write_bytes(whole + tail)
    with DownloadJournal(path) as spool:
        assert "u3" in spool and "f" in spool and spool.dropped_bytes == len(tail)
    assert path.read_bytes() == whole
