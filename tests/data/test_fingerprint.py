"""Fingerprints distinguish a changed file from a copied one, hashed whole or by samples."""

import os

import pytest

from vila.core.errors import DataError
from vila.data import fingerprint
from vila.data.fingerprint import compare_files, fingerprint_files


@pytest.fixture(params=["whole", "sampled"])
def file(request, tmp_path, monkeypatch):
    """A file of 3 MiB that is hashed whole, or by samples because it is in a large set."""
    if request.param == "sampled":
        monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 2**20)
    path = tmp_path / "shard.tar"
    path.write_bytes(os.urandom(3 * 2**20))
    return path


def write_at(path, offset):
    with path.open("r+b") as stream:
        stream.seek(offset)
        old = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([old[0] ^ 1]))
    os.utime(path, ns=(0, 10**18))


def test_an_untouched_file_is_not_read_again(file, monkeypatch):
    before = fingerprint_files({"a": file})
    monkeypatch.setattr(fingerprint, "_fingerprint", None)
    assert compare_files(before, {"a": file}) == ([], before)


def test_a_copy_with_another_time_is_unchanged_and_its_new_time_is_kept(file):
    before = fingerprint_files({"a": file})
    os.utime(file, ns=(0, 10**18))
    changes, same = compare_files(before, {"a": file})
    assert changes == []
    assert same["a"] == before["a"]._replace(mtime_ns=10**18)


@pytest.mark.parametrize("offset", [0, 3 * 2**20 - 1])
def test_a_changed_first_or_last_byte_is_a_change(file, offset):
    before = fingerprint_files({"a": file})
    write_at(file, offset)
    (change,), same = compare_files(before, {"a": file})
    assert change.name == "a"
    assert change.before.startswith("sha256 ") and change.before != change.now
    assert same == {}


def test_small_sets_are_hashed_whole_and_large_ones_by_samples(file):
    whole = fingerprint_files({"a": file})["a"].pieces == 0
    before = fingerprint_files({"a": file})
    write_at(file, 100_000)
    assert bool(compare_files(before, {"a": file})[0]) == whole


def test_a_small_file_in_a_large_set_is_hashed_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 10)
    (tmp_path / "config.json").write_text("{" + " " * 100 + "}")
    assert fingerprint_files({"c": tmp_path / "config.json"})["c"].pieces == 0


def test_other_sizes_and_added_or_missing_files_are_changes(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text("12")
    before = fingerprint_files({name: tmp_path / name for name in "abc"})
    (tmp_path / "a").write_text("123")
    changes, same = compare_files(before, {"a": tmp_path / "a", "b": tmp_path / "b", "d": tmp_path / "a"})
    assert {change.name: (change.before, change.now) for change in changes} == {
        "a": ("2 bytes", "3 bytes"), "c": ("there", "missing"), "d": ("not there", "new"),
    }  # fmt: skip
    assert list(same) == ["b"]


def test_a_missing_file_is_an_error_with_its_name(tmp_path):
    with pytest.raises(DataError) as caught:
        fingerprint_files({"a": tmp_path / "a"})
    assert caught.value.file == str(tmp_path / "a")
