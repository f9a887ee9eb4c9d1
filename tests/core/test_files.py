"""Files are whole or absent."""

import errno
import json
import os
from pathlib import Path

import pytest

from tests.other_process import killed_writer
from vila.core import files
from vila.core.errors import ConfigError, VilaError
from vila.core.files import (
    atomic_path,
    check_writable,
    portable_path,
    remove_partials,
    resolve_path,
    sha256_tree,
    without_home,
    write_json,
)
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
    with pytest.raises(VilaError) as caught, atomic_path(tmp_path / "big") as part:
        part.write_text("half")
        raise error
    assert caught.value.file == str(tmp_path / "big")
    assert names(tmp_path) == []


def test_a_directory_is_replaced_whole(tmp_path):
    for word in ("one", "two"):
        with atomic_path(tmp_path / "d") as part:
            part.mkdir()
            (part / word).write_text(word)
    assert names(tmp_path / "d") == ["two"]


def test_the_next_writer_removes_remains_of_a_killed_one(tmp_path):
    killed_writer(tmp_path / "d")
    with atomic_path(tmp_path / "d") as part:
        part.mkdir()
    assert names(tmp_path) == ["d"]
    assert names(tmp_path / "d") == []


def test_a_directory_that_was_being_replaced_when_its_writer_died_is_put_back(tmp_path):
    (tmp_path / "a.d").mkdir()
    (tmp_path / "a.d" / "old").write_text("old")
    killed_writer(tmp_path / "a.d", replaced=True)
    assert not (tmp_path / "a.d").exists()
    remove_partials(tmp_path, "a.d")
    assert names(tmp_path) == ["a.d"]
    assert names(tmp_path / "a.d") == ["old"]


def test_a_live_writer_is_left_alone_by_a_second_one_and_by_cleaning(tmp_path):
    with atomic_path(tmp_path / "a") as first:
        first.write_text("first")
        with atomic_path(tmp_path / "a") as second:
            second.write_text("second")
            remove_partials(tmp_path)
            assert first.exists()
            assert second.exists()
        assert (tmp_path / "a").read_text() == "second"
    assert (tmp_path / "a").read_text() == "first"
    assert names(tmp_path) == ["a"]


def test_remains_of_an_earlier_version_without_a_lock_are_restored_after_an_hour(tmp_path):
    holder = tmp_path / ".d.x1y2z3.partial"
    (holder / "replaced").mkdir(parents=True)
    (holder / "replaced" / "old").write_text("old")
    remove_partials(tmp_path)
    assert holder.exists()
    os.utime(holder, (0, 0))
    remove_partials(tmp_path)
    assert names(tmp_path) == ["d"]
    assert (tmp_path / "d" / "old").read_text() == "old"


@pytest.mark.parametrize("left", [(), ("writer.lock",)], ids=["empty", "lock without owner"])
def test_remains_of_a_writer_killed_at_start_or_end_are_removed_at_once(tmp_path, left):
    holder = tmp_path / ".d.partial"
    holder.mkdir()
    for name in left:
        (holder / name).touch()
    remove_partials(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("moment", ["open", "flock"])
def test_a_writer_whose_directory_is_removed_before_it_locked_makes_another(tmp_path, monkeypatch, moment):
    calls = []
    opened, locked = Path.open, files.try_lock

    def remove_first(path, mode="r", *arguments, **options):
        if moment == "open" and mode == "x+" and not calls:
            calls.append(1)
            remove_partials(tmp_path)
        return opened(path, mode, *arguments, **options)

    def remove_before(stream, **options):
        if moment == "flock" and options.get("wait") and not calls:
            calls.append(1)
            remove_partials(tmp_path)
        return locked(stream, **options)

    monkeypatch.setattr(Path, "open", remove_first)
    monkeypatch.setattr("vila.core.files.try_lock", remove_before)
    with atomic_path(tmp_path / "a") as part:
        part.write_text("whole")
    assert calls
    assert (tmp_path / "a").read_text() == "whole"
    assert names(tmp_path) == ["a"]


def test_without_locks_a_writer_is_dead_when_its_process_on_this_host_is(tmp_path, monkeypatch):
    dead = killed_writer(tmp_path / "dead")
    elsewhere = killed_writer(tmp_path / "elsewhere")
    owner = json.loads((elsewhere / "writer.lock").read_text())
    (elsewhere / "writer.lock").write_text(json.dumps({**owner, "host": "another-host"}))
    monkeypatch.setattr("vila.core.files.try_lock", lambda *_, **__: None)
    remove_partials(tmp_path)
    assert not dead.exists()
    assert elsewhere.exists()


@pytest.mark.parametrize("name", ["replaced", "writer.lock"])
def test_a_target_may_have_the_name_of_a_file_that_the_writer_uses(tmp_path, name):
    for word in ("one", "two"):
        with atomic_path(tmp_path / name) as part:
            part.mkdir()
            (part / word).touch()
    assert names(tmp_path) == [name]
    assert names(tmp_path / name) == ["two"]


def test_every_file_and_every_changed_directory_is_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(str(Path(f"/proc/self/fd/{handle}").readlink())))
    with atomic_path(tmp_path / "new" / "d") as part:
        (part / "below").mkdir(parents=True)
        (part / "below" / "file").write_text("1")
    written = {Path(path).name for path in synced}
    assert {"file", "below", "d", "new", tmp_path.name} <= written
    # The rename is durable only when the directory it happened in is.
    assert synced[-1] == str(tmp_path / "new")


@pytest.mark.parametrize("name", ["new", "new/below", "."])
def test_a_directory_that_can_be_written_is_not_made_by_the_check(tmp_path, name):
    check_writable(tmp_path / name)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["file", "file/below", "file/below/it"])
def test_a_directory_below_a_file_cannot_be_written(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        check_writable(tmp_path / name, field="--output")
    assert (caught.value.field, caught.value.value) == ("--output", str(tmp_path / name))


def test_a_full_or_read_only_file_system_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ConfigError) as caught:
        check_writable(tmp_path, field="output.dir")
    assert (caught.value.field, caught.value.value) == ("output.dir", str(tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        "file/a.json",
        "folder",
        f"{'n' * 250}.json",
        f"{'n' * 300}/a.json",
        "zero\0byte",
    ],
)
def test_a_file_that_cannot_be_written_is_named_with_its_option(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    before = names(tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_writable(tmp_path / name, field="--output", is_file=True)
    assert (caught.value.field, caught.value.value) == ("--output", str(tmp_path / name))
    assert names(tmp_path) == before


@pytest.mark.parametrize("path", ["/dev/null", "/dev/full", "/proc/new/file"])
def test_devices_and_system_directories_cannot_be_written(path):
    with pytest.raises(ConfigError):
        check_writable(Path(path), is_file=True)


def test_an_atomic_write_does_not_replace_a_device():
    with pytest.raises(VilaError), atomic_path(Path("/dev/null")):
        pass
    assert Path("/dev/null").is_char_device()


def test_a_file_or_directory_that_exists_may_be_replaced(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    check_writable(tmp_path / "file", is_file=True)
    check_writable(tmp_path / "folder", is_replaced=True)
    with pytest.raises(ConfigError):
        check_writable(tmp_path / "file", is_replaced=True)
    assert names(tmp_path) == ["file", "folder"]


def test_too_little_disk_space_is_an_error_before_the_start(tmp_path):
    check_writable(tmp_path / "new", num_bytes=1)
    with pytest.raises(ConfigError):
        check_writable(tmp_path / "new", num_bytes=2**60)


def test_a_path_in_a_report_is_relative_to_it_or_to_the_home_directory(tmp_path, monkeypatch):
    home, run = tmp_path / "home" / "ann", tmp_path / "home" / "ann" / "work" / "runs" / "a" / "eval"
    for folder in (run, home / "work" / "data", home / "work" / "runs" / "a" / "model", tmp_path / "home" / "x"):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "work")
    cases = {"runs/a/model": "../model", str(home / "work" / "data"): "../../../data", "owner/name": "owner/name"}
    assert {name: portable_path(name, run) for name in cases} == cases
    assert portable_path("~/work/data", run) == "../../../data"
    assert portable_path("", run) == ""
    # From outside of the home directory, and to the outside of it.
    assert portable_path(home / "work" / "data", tmp_path / "run") == "~/work/data"
    assert portable_path("/usr", run) == "/usr"
    for name in ("runs/a/model", str(home / "work" / "data")):
        assert resolve_path(portable_path(name, run), run).resolve() == Path(name).resolve()
    assert resolve_path("~/work/data", run) == home / "work" / "data"
    assert without_home(f"{home}/x: no such file") == "~/x: no such file"


def test_the_hash_of_a_tree_sees_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    first = sha256_tree(tmp_path)
    (tmp_path / "a").write_text("2")
    second = sha256_tree(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, sha256_tree(tmp_path)}) == 3
