"""Files that preparation writes and reads back: damage raises an error with file and field, or is repaired."""

import json
import shutil

import pytest

from vila.core.errors import ConfigError, DataError
from vila.prepare.coyo import read_selection
from vila.prepare.merge_shards import merge_shards, read_index
from vila.prepare.resumable_download import DownloadedImage, DownloadJournal, Failure
from vila.prepare.work_units import Counts, check_settings, unit_path, unit_record_path, write_unit

ODD = ["[" * 5000, "[]", "{", "\0" * 100, '"x"', "1" * 5000, "\ud83d".encode(errors="surrogatepass")]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def unit(out, unit="a", samples=5):
    counts = Counts()
    counts.read = counts.written = samples
    write_unit(out, unit, "text", [{"n": n} for n in range(samples)], counts, [{"row": 1, "reason": "r"}])


def merged(out):
    return merge_shards(out, "flan", "text", ["a"], per_shard=2)


def refusal(read, kind=DataError):
    with pytest.raises(kind) as caught:
        read()
    return caught.value


@pytest.mark.parametrize("content", ODD)
def test_invalid_json_of_our_own_files_names_the_file(content, tmp_path):
    index = write(tmp_path / "index.json", content)
    assert refusal(lambda: read_index(tmp_path)).file == str(index)
    selection = write(tmp_path / "x.selected.json", content)
    assert refusal(lambda: read_selection(selection)).file == str(selection)
    settings = write(tmp_path / "settings.json", content)
    assert refusal(lambda: check_settings(tmp_path, {"a": 1}), ConfigError).file == str(settings)
    unit(tmp_path / "o")
    record = write(unit_record_path(tmp_path / "o", "a"), content)
    assert refusal(lambda: merged(tmp_path / "o")).file == str(record)


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
def test_an_index_with_a_value_of_a_wrong_type_names_the_field(name, value, field, tmp_path):
    unit(tmp_path)
    index = merged(tmp_path)
    write(tmp_path / "index.json", json.dumps({**index, name: value}))
    assert refusal(lambda: merged(tmp_path)).field == field


def test_a_changed_unit_file_is_named(tmp_path):
    unit(tmp_path)
    whole = shutil.copytree(tmp_path, tmp_path / "copy")
    path = unit_path(whole, "a", "text")
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    assert refusal(lambda: merged(whole)).file == str(path)
    path.write_bytes(content.replace(b'{"n": 0}\n{', b'{"n": 0} {'))  # of the same size, with a line less
    assert refusal(lambda: merged(whole)).hint
    path.unlink()
    assert refusal(lambda: merged(whole)).file == str(path)
    assert merged(tmp_path)["counts"]["out"] == 5


def test_a_damaged_list_of_failures_is_named(tmp_path):
    unit(tmp_path)
    path = write(tmp_path / "parts" / "a.failures.jsonl", '{"row": 1}\n{"ro\n')
    error = refusal(lambda: merged(tmp_path))
    assert (error.file, error.record) == (str(path), "line 2")


def write_journal(path):
    with DownloadJournal(path) as journal:
        journal.append([(f"u{n}", DownloadedImage(bytes([n]) * 50, "jpg")) for n in range(4)])
        journal.append([("f", Failure("http", "404", 2))])
    return path.read_bytes()


def test_a_journal_with_a_flipped_bit_loses_the_entries_from_there(tmp_path):
    path = tmp_path / "u.spool"
    whole = write_journal(path)
    for place in range(0, len(whole), 11):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with DownloadJournal(path) as journal:
            known = [n for n in range(4) if f"u{n}" in journal]
            assert known == list(range(len(known)))
            assert all(journal.read(f"u{n}").content == bytes([n]) * 50 for n in known)
            assert journal.dropped_bytes > 0 or len(known) == 4


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
def test_data_after_the_last_entry_of_a_journal_is_dropped(tail, tmp_path):
    path = tmp_path / "u.spool"
    whole = write_journal(path)
    path.write_bytes(whole + tail)
    with DownloadJournal(path) as journal:
        assert "u3" in journal and "f" in journal and journal.dropped_bytes == len(tail)
    assert path.read_bytes() == whole
