"""A package imports only from the floors below it: the contract in pyproject.toml, told in docs/architecture.md."""

from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[2]


def test_every_import_goes_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    # No cache: a cached graph would be wrong for a file changed within the resolution of its timestamp.
    assert lint_imports(config_filename="pyproject.toml", no_cache=True, no_logo=True) == 0
