"""From wheel to directory: made once, found again, made anew when damaged, never left half done."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors import SafetensorError

from tests.starter.wheels import Listener, make_wheel
from vila.core.errors import ConfigError, DownloadError, LayoutError, VilaError
from vila.core.files import cache_dir
from vila.starter import components
from vila.starter.components import ComponentSpec, extract_member, obtain_component, resolve_component


class Components:
    """A recipe whose wheel lies in the cache already, and a count of how often it was cooked."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.builds = 0
        wheel = make_wheel(cache / "wheels", {"tiny_part/data.txt": "seven"})
        self.recipe = ComponentSpec("tiny", wheel, "A tiny part.", self.build)

    def build(self, wheel: Path, folder: Path) -> None:
        self.builds += 1
        (folder / "deep").mkdir()
        extract_member(wheel, "tiny_part/data.txt", folder / "deep" / "data.txt")

    def obtain(self, listener: Listener | None = None) -> Path:
        return obtain_component(self.recipe, self.cache, listener or Listener())

    def failing(self, error: Exception) -> ComponentSpec:
        def build(wheel: Path, folder: Path) -> None:
            (folder / "half.bin").write_bytes(b"123")
            raise error

        return ComponentSpec("tiny", self.recipe.wheel, "", build)


@pytest.fixture
def setup(tmp_path: Path) -> Components:
    return Components(tmp_path / "cache")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_part_is_made_with_readme_licence_and_stamp_and_only_once(setup: Components) -> None:
    folder = setup.obtain()
    assert folder == setup.cache / "parts" / "tiny"
    assert names_in(folder) == ["LICENSE", "README.md", "deep", "part.json"]
    assert (folder / "deep" / "data.txt").read_text() == "seven"
    assert (folder / "LICENSE").read_text() == "Do as you like.\n"
    assert (folder / "README.md").read_text() == (
        "# tiny\n\nA tiny part.\n\n"
        "Made from tiny_part-1.0-py3-none-any.whl of https://pypi.org/project/tiny-part/ (licence: none).\n"
    )
    assert setup.obtain() == folder
    assert setup.builds == 1


def test_an_intact_component_is_found_in_a_read_only_cache(setup: Components, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = setup.obtain()
    (setup.cache / "wheels" / setup.recipe.wheel.filename).unlink()

    def refuse(cache: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(components, "_locked", refuse)
    assert setup.obtain() == folder


def shorten(folder: Path) -> None:
    (folder / "deep" / "data.txt").write_text("sev")


def alter(folder: Path) -> None:
    (folder / "deep" / "data.txt").write_text("SEVEN")
    os.utime(folder / "deep" / "data.txt", ns=(1, 1))


def remove(folder: Path) -> None:
    (folder / "deep" / "data.txt").unlink()


def break_stamp(folder: Path) -> None:
    (folder / "part.json").write_text('{"files": ')


def empty_stamp(folder: Path) -> None:
    (folder / "part.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (shorten, "deep/data.txt is damaged"),
        (alter, "deep/data.txt is damaged"),
        (remove, "deep/data.txt is missing"),
        (break_stamp, "part.json is missing or damaged"),
        (empty_stamp, "part.json is missing or damaged"),
    ],
)
def test_a_damaged_component_is_logged_and_converted_again(
    setup: Components, damage: Callable[[Path], None], reason: str
) -> None:
    folder = setup.obtain()
    damage(folder)
    listener = Listener()
    assert setup.obtain(listener) == folder
    assert listener.lines == [f"{folder}: {reason}; converting it again"]
    assert (folder / "deep" / "data.txt").read_text() == "seven"
    assert setup.builds == 2
    assert names_in(setup.cache / "parts") == ["tiny"]


def test_a_component_of_an_older_revision_is_converted_again(
    setup: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.obtain()
    monkeypatch.setattr(components, "REVISION", components.REVISION + 1)
    setup.obtain()
    assert setup.builds == 2


def test_copied_part_with_other_times_is_still_whole(setup: Components) -> None:
    folder = setup.obtain()
    os.utime(folder / "deep" / "data.txt", ns=(1, 1))
    setup.obtain()
    assert setup.builds == 1


def test_failed_conversion_leaves_nothing(setup: Components) -> None:
    with pytest.raises(LayoutError):
        obtain_component(setup.failing(LayoutError("odd")), setup.cache)
    assert names_in(setup.cache / "parts") == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_during_the_conversion_is_an_error_and_leaves_nothing(setup: Components, error: Exception) -> None:
    with pytest.raises(VilaError):
        obtain_component(setup.failing(error), setup.cache)
    assert names_in(setup.cache / "parts") == []


def test_read_only_cache_names_the_variable_to_set(setup: Components) -> None:
    error = OSError(errno.EROFS, "Read-only file system")
    with pytest.raises(DownloadError) as caught:
        obtain_component(setup.failing(error), setup.cache)
    assert "VILA_CACHE" in caught.value.hint and caught.value.__cause__ is error


def test_cache_below_a_file_names_the_variable_to_set(setup: Components, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError):
        obtain_component(setup.recipe, tmp_path / "file" / "cache")


def test_remains_of_a_killed_process_are_removed(setup: Components) -> None:
    for folder in ("wheels", "parts"):
        left = setup.cache / folder / ".tiny.abc.partial"
        left.mkdir(parents=True)
        (left / "half.bin").write_bytes(b"123")
        os.utime(left, (0, 0))
    setup.obtain()
    assert names_in(setup.cache / "parts") == ["tiny"]
    assert names_in(setup.cache / "wheels") == [setup.recipe.wheel.filename]


def test_two_at_once_make_the_part_once(setup: Components) -> None:
    build = setup.build

    def slow(wheel: Path, folder: Path) -> None:
        time.sleep(0.1)
        build(wheel, folder)

    recipe = ComponentSpec("tiny", setup.recipe.wheel, "", slow)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: obtain_component(recipe, setup.cache), range(2)))
    assert found[0] == found[1]
    assert setup.builds == 1


def test_cache_is_at_the_path_of_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VILA_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("VILA_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "vila"


def test_wheel_means_the_default_and_directories_and_hub_ids_are_themselves(tmp_path: Path) -> None:
    def default() -> Path:
        return tmp_path / "made"

    def never() -> Path:
        raise AssertionError("nothing to obtain")

    assert resolve_component("wheel", default) == str(tmp_path / "made")
    assert resolve_component(str(tmp_path), never) == str(tmp_path)
    assert resolve_component("HuggingFaceTB/SmolLM2-135M-Instruct", never) == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("value", ["", "whel", "./missing", "/no/such/dir", "a/b/c", "-x/y"])
def test_neither_directory_nor_hub_id_is_refused(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_component(value, Path)
    assert caught.value.value == value
