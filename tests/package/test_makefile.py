"""`make` and environment_setup.sh reject a missing or too old Python before they create anything."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OLD = "vila needs Python 3.11 or newer, but '{python}' is 3.9."


@pytest.fixture
def old_python(tmp_path: Path) -> Path:
    """A fake Python 3.9: answers the version check, and creates a file on any other use."""
    script = tmp_path / "python3.9"
    script.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo 3.9 && exit 1\ntouch {tmp_path}/used\n')
    script.chmod(0o755)
    return script


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    # Flags of a surrounding `make` must not reach the one under test.
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "VIRTUAL_ENV"))
    }
    return subprocess.run(
        [str(word) for word in command], cwd=ROOT, env={**inherited, **env}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("target", ["quickstart", "test"])
def test_make_names_the_python_it_needs(target: str, old_python: Path, tmp_path: Path) -> None:
    result = run("make", target, f"PYTHON={old_python}", f"VENV={tmp_path / 'venv'}")
    assert result.returncode == 2
    assert OLD.format(python=old_python) in result.stderr
    assert f"make PYTHON=python3.12 {target}" in result.stderr
    assert sorted(tmp_path.iterdir()) == [old_python]


def test_make_names_a_python_that_does_not_exist(tmp_path: Path) -> None:
    result = run("make", "quickstart", "PYTHON=python-of-nowhere", f"VENV={tmp_path / 'venv'}")
    assert result.returncode == 2
    assert "'python-of-nowhere'" in result.stderr and "3.11" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_environment_setup_names_the_python_it_needs(old_python: Path, tmp_path: Path) -> None:
    result = run("./environment_setup.sh", tmp_path / "venv", PYTHON=str(old_python))
    assert result.returncode == 1
    assert OLD.format(python=old_python) in result.stderr
    assert sorted(tmp_path.iterdir()) == [old_python]
