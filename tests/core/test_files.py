"""Files are whole or absent."""

import errno

import pytest

from vila.core.errors import VilaError
from vila.core.files import atomic_path, remove_partials, sha256_tree, write_json
from vila.core.reading import read_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_written_file_replaces_the_old_one_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    write_json(path, {"b": "\u00e9"})
    assert read_json(path) == {"b": "\u00e9"}
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_an_error_while_writing_leaves_the_old_file_and_no_trace(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_path(path) as part:
        part.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "x"), RuntimeError("I/O error: No space left on device")])
def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, error):
    message = r"big: no space left on the device \(\d+ MiB free\); nothing was written"
    with pytest.raises(VilaError, match=message), atomic_path(tmp_path / "big") as part:
        part.write_text("half")
        raise error
    assert names(tmp_path) == []


def test_a_directory_is_replaced_whole(tmp_path):
    for word in ("one", "two"):
        with atomic_path(tmp_path / "d") as part:
            part.mkdir()
            (part / word).write_text(word)
    assert names(tmp_path / "d") == ["two"]


def test_a_directory_lost_in_the_middle_of_its_replacement_comes_back(tmp_path):
    holder = tmp_path / ".d.x1y2z3.partial"
    (holder / "replaced").mkdir(parents=True)
    (holder / "replaced" / "old").write_text("old")
    remove_partials(tmp_path)
    assert names(tmp_path) == ["d"]
    assert (tmp_path / "d" / "old").read_text() == "old"


def test_the_hash_of_a_tree_sees_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    first = sha256_tree(tmp_path)
    (tmp_path / "a").write_text("2")
    second = sha256_tree(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, sha256_tree(tmp_path)}) == 3
