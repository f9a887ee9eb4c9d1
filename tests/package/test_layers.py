"""A package imports only from layers below it: the import-linter contract in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# No cache: a cached graph would be wrong for a file changed within the resolution of its timestamp.
LINT = (
    "import sys; from importlinter.cli import lint_imports; "
    "sys.exit(lint_imports(config_filename='pyproject.toml', no_cache=True, no_logo=True))"
)


def test_packages_import_only_from_lower_layers() -> None:
    # In its own process, because import-linter disables all loggers.
    linted = subprocess.run([sys.executable, "-c", LINT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout + linted.stderr
