"""A package imports only from the floors below it: the contract in pyproject.toml, told in docs/architecture.md."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# No cache: a cached graph would be wrong for a file changed within the resolution of its timestamp.
LINT = (
    "import sys; from importlinter.cli import lint_imports; "
    "sys.exit(lint_imports(config_filename='pyproject.toml', no_cache=True, no_logo=True))"
)


def test_every_import_goes_down() -> None:
    # In a process of its own: import-linter turns off the loggers of whoever calls it.
    linted = subprocess.run([sys.executable, "-c", LINT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout + linted.stderr
